# SPDX-License-Identifier: Apache-2.0
"""Packets that a client forges: the rules forward what ``decide_forwarded()`` lets pass, and no attack gets through.

IMDS_GUARD_SEED is the first seed of the comparison.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from imds_guard.kernel.run import run
from imds_guard.policy.decide_forwarded import ACK, Direction, ForwardedPacket, decide_forwarded
from imds_guard.policy.model import Mode, Policy, Protocol
from imds_guard.policy.packet import SYN, Fragment
from tests import generate, packets
from tests.adversary.packets import Flow, checksum
from tests.kernel.routed import CLIENT, WAYS, Routed, ip, routed_machines
from tests.kernel.rules_in_a_sandbox import FOO, V4, V6, policy_for
from tests.rules.forwarded import PSH, packet

FIRST_SEED = int(os.environ.get("IMDS_GUARD_SEED", "1"))
POLICIES, PACKETS = 6, 120
POLICY = policy_for([FOO], udp=((80, 80),))
IPV6_HDRINCL = 36  # include/uapi/linux/in6.h
_ALL = 0x0003  # ETH_P_ALL in include/uapi/linux/if_ether.h
_HOPS = 77
_EXPERIMENTAL = 253  # RFC 3692
_DESTINATION_OPTIONS = 60  # RFC 8200, section 4
_QUIET = "table inet quiet { chain input { type filter hook input priority 0; tcp dport >= 20000 drop; }; }"
"""The client does not answer what the server sends first."""


@pytest.fixture(params=WAYS)
def routed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Routed]:
    """The three machines. The router sends everything to the server, and filters no sources."""
    with routed_machines(request.param, str(tmp_path)) as machines:
        machines.on_router(_open)
        machines.boxes["client"].call(lambda: _run_nft(_QUIET))
        yield machines


def _open() -> None:
    for version, via in ((4, "10.0.2.2"), (6, "fd00:2::2")):
        ip(f"-{version} route add default via {via}")
    for interface in ("all", "to-client", "to-server"):
        Path("/proc/sys/net/ipv4/conf", interface, "rp_filter").write_text("0")


def _run_nft(text: str) -> None:
    done = run(["nft", "-f", "-"], stdin=text)
    assert done.status == 0, done.complaint


# --- packets as bytes -----------------------------------------------------------------------------------------------


class Numbered(NamedTuple):
    """A packet with the source port that tells it from the others."""

    number: int
    packet: ForwardedPacket

    @property
    def source_port(self) -> int:
        """Above all that services use."""
        return 20_000 + self.number

    def octets(self) -> bytes:
        """From the IP header on. The server finds the number in the IPv4 ID, or in the flow label of IPv6.

        The limit of hops tells them from packets of the client's kernel.
        """
        version = self.packet.destination.version
        raw = bytearray(self._ipv4() if version == 4 else self._ipv6())
        struct.pack_into("!H", raw, 4 if version == 4 else 2, self.number + 1)
        raw[8 if version == 4 else 7] = _HOPS
        return bytes(raw)

    def _flow(self) -> Flow:
        here = CLIENT[self.packet.destination.version]
        return Flow(here, self.source_port, str(self.packet.destination), self.packet.port)

    def _ipv4(self) -> bytes:
        one = self.packet
        offset = {Fragment.WHOLE: 0, Fragment.FIRST: packets.MORE_FRAGMENTS, Fragment.LATER: 5}[one.fragment]
        head = packets.Ipv4(socket.inet_aton(CLIENT[4]), one.destination.packed, _number(one.protocol), offset)
        return head.packet(self._payload())

    def _ipv6(self) -> bytes:
        one = self.packet
        extensions = []
        if one.fragment is not Fragment.WHOLE:
            first = one.fragment is Fragment.FIRST
            extensions.append(packets.fragment_header(0 if first else 5, more=first))
        if one.is_cut_short:
            extensions.append(packets.extension(_DESTINATION_OPTIONS, 0, b"\x01\x04"))
        source = socket.inet_pton(socket.AF_INET6, CLIENT[6])
        payload = b"" if one.is_cut_short else self._payload()
        # Where the protocol is not told, another header of options would follow in the next fragment.
        last = _DESTINATION_OPTIONS if one.is_cut_short and one.protocol is None else _number(one.protocol)
        return packets.Ipv6(source, one.destination.packed, last, extensions).packet(payload)

    def _payload(self) -> bytes:
        """With a checksum, so that conntrack takes it, and as long as a fragment must be."""
        one = self.packet
        if one.fragment is Fragment.LATER or one.protocol is None:
            return bytes(16)
        if one.protocol is Protocol.TCP:
            body, at = packets.tcp(self.source_port, one.port, one.tcp_flags), 16
        else:
            body, at = packets.udp(self.source_port, one.port), 6
        padding = b"" if one.fragment is Fragment.WHOLE else bytes(-len(body) % 8)
        sum_ = _checksum(self._flow(), _number(one.protocol), body)
        return body[:at] + struct.pack("!H", sum_) + body[at + 2 :] + padding


def _checksum(flow: Flow, protocol: int, body: bytes) -> int:
    """Of a TCP or UDP packet. The order of the pseudo-header is that of the IP version."""
    family = socket.AF_INET if "." in flow.source else socket.AF_INET6
    ends = socket.inet_pton(family, flow.source) + socket.inet_pton(family, flow.destination)
    rest = (
        struct.pack("!HH", protocol, len(body)) if family == socket.AF_INET else struct.pack("!II", len(body), protocol)
    )
    return checksum(ends + rest + body) or 0xFFFF


def _number(protocol: Protocol | None) -> int:
    return {Protocol.TCP: packets.TCP, Protocol.UDP: packets.UDP, None: _EXPERIMENTAL}[protocol]


def is_routable(one: ForwardedPacket) -> bool:
    """True for an address that the client's kernel sends to the router, and the router to the server."""
    to = one.destination
    near = ("10.0.0.0/8", "0.0.0.0/8", "127.0.0.0/8", "240.0.0.0/4", "224.0.0.0/4", "fd00:1::/64", "fd00:2::/64")
    odd = ("fe80::/10", "ff00::/8", "::/96", "::ffff:0:0/96")
    return not any(to in ipaddress.ip_network(network) for network in (*near, *odd))


def send_raw(forged: Iterable[bytes]) -> None:
    """In the client: each packet through a raw socket."""
    raw = (socket.SOCK_RAW, socket.IPPROTO_RAW)
    with socket.socket(socket.AF_INET, *raw) as four, socket.socket(socket.AF_INET6, *raw) as six:
        six.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
        for data in forged:
            if data[0] >> 4 == 4:
                four.sendto(data, (socket.inet_ntoa(data[16:20]), 0))
            else:
                six.sendto(data, (socket.inet_ntop(socket.AF_INET6, data[24:40]), 0))


def arrivals(machines: Routed, forged: Sequence[bytes]) -> list[bytes]:
    """What arrives at the server while the client sends these packets."""
    ours, theirs = socket.socketpair()
    end = packets.Ipv4(socket.inet_aton(CLIENT[4]), socket.inet_aton("10.0.2.2"), _EXPERIMENTAL).packet(b"end")

    def watch() -> list[bytes]:
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL)) as seen:
            seen.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            seen.bind(("eth0", _ALL))
            seen.settimeout(10)
            theirs.send(b".")
            found: list[bytes] = []
            while not found or found[-1][-3:] != b"end":
                found.append(seen.recv(65536))
            return found

    def send() -> None:
        ours.recv(1)
        send_raw([*forged, end])

    with ours, theirs:
        machines.boxes["client"].spawn(send)
        return machines.boxes["server"].call(watch, timeout_s=60)


def arrived(machines: Routed, series: Sequence[Numbered]) -> set[int]:
    """The numbers of the packets that reach the server."""
    return {number for data in arrivals(machines, [one.octets() for one in series]) for number in _numbers(data)}


def _numbers(data: bytes) -> set[int]:
    """The number of a packet from Numbered.octets(), one hop later."""
    is_ipv4 = data[0] >> 4 == 4
    if data[8 if is_ipv4 else 7] != _HOPS - 1:
        return set()
    return {struct.unpack_from("!H", data, 4 if is_ipv4 else 2)[0] - 1}


# --- the comparison -------------------------------------------------------------------------------------------------


def expected(machines: Routed, policy: Policy, one: ForwardedPacket, tracked: bool) -> set[bool]:
    """What may become of a packet. Conntrack calls odd ones invalid, and then it does not know their direction."""
    directions = [Direction.UNKNOWN]
    if tracked:
        directions = [Direction.ORIGINAL]
        if one.protocol is Protocol.TCP and one.tcp_flags not in (SYN, ACK, PSH | ACK):
            directions.append(Direction.UNKNOWN)
    found = set()
    for direction in directions:
        decision = decide_forwarded(policy, _in_direction(one, direction))
        found.add(decision.passes)
    if one.fragment is Fragment.FIRST and machines.way != "nft" and one.destination.version == 4:
        found.add(True)  # iptables drops all fragments but the first one
    return found


def _in_direction(one: ForwardedPacket, direction: Direction) -> ForwardedPacket:
    return ForwardedPacket(**{**one.__dict__, "direction": direction})


@pytest.mark.parametrize("tracked", [False, True])
def test_the_kernel_forwards_what_the_specification_says(routed: Routed, tracked: bool) -> None:
    """Random policies, and random packets of all kinds; fragments only where nobody puts them together."""
    if tracked:
        routed.track()
    wrong = []
    for seed in range(FIRST_SEED, FIRST_SEED + POLICIES):
        random = Random(seed)
        policy = generate.policy(random)._replace(mode=Mode.ENFORCE)
        routed.enforce(policy, "drop" if policy.containers.value == "deny" else None)
        if routed.describe(policy).by is None:
            continue
        series = [packet(random, policy) for _ in range(PACKETS)]
        series = [one for one in series if is_routable(one) and not (tracked and one.fragment is not Fragment.WHOLE)]
        numbered = [Numbered(number, one) for number, one in enumerate(series)]
        passed = arrived(routed, numbered)
        wrong += [
            f"IMDS_GUARD_SEED={seed} ./run test {__file__} -k {routed.way}  # {number in passed}: {one} under {policy}"
            for number, one in numbered
            if (number in passed) not in expected(routed, policy, one, tracked)
        ]
    assert wrong == [], "\n".join(wrong)


# --- attacks --------------------------------------------------------------------------------------------------------

GHOST = "10.0.1.3"
"""An address that the router sends to the client, and that the client does not have: its kernel stays out."""


def _segment(flow: Flow, flags: int) -> bytes:
    """A TCP segment with its checksum."""
    body = packets.tcp(flow.source_port, flow.destination_port, flags)
    return body[:16] + struct.pack("!H", _checksum(flow, packets.TCP, body)) + body[18:]


def _split_syn(version: int, source_port: int) -> list[bytes]:
    """The beginning of a connection in two fragments: the ports in the first one, the flags in the second."""
    flow = Flow(CLIENT[version], source_port, V4 if version == 4 else V6, 80)
    body = _segment(flow, SYN)
    if version == 4:
        ends = (socket.inet_aton(flow.source), socket.inet_aton(flow.destination))
        parts = ((packets.MORE_FRAGMENTS, body[:8]), (1, body[8:]))
        return [packets.Ipv4(*ends, packets.TCP, offset).packet(part) for offset, part in parts]
    ends = (socket.inet_pton(socket.AF_INET6, flow.source), socket.inet_pton(socket.AF_INET6, flow.destination))
    heads = (packets.fragment_header(0, more=True), packets.fragment_header(1, more=False))
    return [packets.Ipv6(*ends, packets.TCP, (head,)).packet(part) for head, part in zip(heads, (body[:8], body[8:]))]


def answered(machines: Routed, forged: Sequence[bytes], source_port: int) -> bool:
    """Whether a SYN-ACK to this port comes to the client after it has sent these packets."""

    def attack() -> bool:
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL)) as seen:
            seen.bind(("eth0", _ALL))
            seen.settimeout(1)
            send_raw(forged)
            while True:
                try:
                    data = seen.recv(65536)
                except TimeoutError:
                    return False
                if _is_syn_ack(data, source_port):
                    return True

    return machines.boxes["client"].call(attack)


def _is_syn_ack(data: bytes, port: int) -> bool:
    """One without options in its IP header, to a port."""
    head = 20 if data[0] >> 4 == 4 else 40
    if len(data) < head + 14 or data[head + 13] & (SYN | ACK) != SYN | ACK:
        return False
    return struct.unpack_from("!H", data, head + 2) == (port,)


def _is_whole(seen: Sequence[bytes], forged: Sequence[bytes]) -> bool:
    """Whether all fragments arrived, each for itself or put together by conntrack."""
    return all(any(part[-8:] in data for data in seen) for part in forged)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("tracked", [False, True])
def test_the_beginning_of_a_connection_in_two_fragments(routed: Routed, tracked: bool, version: int) -> None:
    """It arrives without the rules, and does not with them, whether or not conntrack puts it together before.

    Where conntrack puts IPv6 together, it wants the whole header in the first fragment (RFC 7112).
    """
    if tracked:
        routed.track()
    forged = _split_syn(version, 21_000)
    assert _is_whole(arrivals(routed, forged), forged) is not (tracked and version == 6)
    routed.enforce(POLICY)
    forged = _split_syn(version, 21_001)
    assert not _is_whole(arrivals(routed, forged), forged)


def test_linux_answers_the_beginning_of_a_connection_in_two_fragments(tmp_path: Path) -> None:
    """Over IPv4. Over IPv6, Linux wants the whole header in the first fragment (RFC 7112), other services may not."""
    with routed_machines("nft", str(tmp_path)) as routed:
        assert answered(routed, _split_syn(4, 21_000), 21_000)


def _ghost(version: int) -> tuple[str, str]:
    return (GHOST, V4) if version == 4 else ("fd00:1::3", V6)


def _haunt(machines: Routed) -> None:
    """What the router sends to the ghost comes to the client, whose packets to it go by the router."""
    client, router = machines.boxes["client"], machines.boxes["router"]
    mac = client.call(lambda: run(["ip", "-br", "link", "show", "eth0"]).stdout.split()[2])
    for version, via in ((4, "10.0.1.1"), (6, "fd00:1::1")):
        ghost = _ghost(version)[0]
        router.call(lambda: ip(f"-{version} neigh add {ghost} lladdr {mac} dev to-client"))  # noqa: B023
        client.call(lambda: ip(f"-{version} route add {ghost} via {via}"))  # noqa: B023


@pytest.mark.parametrize("version", [4, 6])
def test_a_forged_first_packet_does_not_make_an_answer_of_a_beginning(routed: Routed, version: int) -> None:
    """Conntrack then takes the client's SYN for a reply: it has seen a packet in the other direction first."""
    routed.track()
    _haunt(routed)
    ghost, locked = _ghost(version)

    def forged(port: int) -> list[bytes]:
        return [_whole(Flow(locked, 80, ghost, port), SYN), _whole(Flow(ghost, port, locked, 80), SYN)]

    assert answered(routed, forged(22_000), 22_000)
    routed.enforce(POLICY)
    assert not answered(routed, forged(22_001), 22_001)


def _whole(flow: Flow, flags: int) -> bytes:
    family, make = (socket.AF_INET, packets.Ipv4) if "." in flow.source else (socket.AF_INET6, packets.Ipv6)
    ends = (socket.inet_pton(family, flow.source), socket.inet_pton(family, flow.destination))
    return make(*ends, packets.TCP).packet(_segment(flow, flags))
