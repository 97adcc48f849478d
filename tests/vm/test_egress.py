# SPDX-License-Identifier: Apache-2.0
"""The egress hook does with every packet what decide_packet() says, and records it so.

Random packets, and all packets of some small spaces: every row of tests/packet_rows.py cut at every length, every value
of every byte of a header, every mark, every pair of sockets.
"""

from __future__ import annotations

import ipaddress
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from socket import IPPROTO_SCTP, IPPROTO_TCP, SOCK_RAW, SOCK_STREAM

import pytest

from imds_guard.backends.ebpf import abi
from imds_guard.policy.decide_packet import PacketReason
from imds_guard.policy.model import NOBODY, Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.packet import (
    AUTHENTICATION,
    DESTINATION_OPTIONS,
    EXTENSION_HEADERS,
    HOP_BY_HOP,
    MAX_EXTENSION_HEADERS,
    ROUTING,
)
from imds_guard.policy.ports import ALL_PORTS, Ports
from tests import packets
from tests.packet_rows import FROM4, FROM6, IPV4, IPV6, TO4, TO6, ipv4, ipv6
from tests.packets import Ipv4, Ipv6, extension, fragment_header
from tests.vm.egress import EgressScene, differences, egress_scene
from tests.vm.machine import Machine
from tests.vm.packets import LOOPBACK, NOT_FULL, PacketCase
from tests.vm.values import (
    CLOSE,
    ESTABLISHED,
    ETH_P_IP,
    ETH_P_IPV6,
    LISTEN,
    NEW_SYN_RECV,
    SYN_RECV,
    SYN_SENT,
    TIME_WAIT,
    Packet,
    Socket,
)

FIXED_SEED = 17
ALL_REASONS = 50_000
"""So many random packets meet every reason."""
SERIAL, EARLIER = 7, 6
USER, GROUP, DENIED = 1001, 2002, 3003


def endpoints(tcp: Ports, udp: Ports) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(ipaddress.ip_network(address), tcp, udp) for address in (TO4, TO6))


def strict(*locks: Lock, mode: Mode = Mode.ENFORCE, containers: Verdict = Verdict.DENY) -> Policy:
    return make_policy(locks, mode, containers, strict=True)


ALLOWED = Identities(frozenset({USER}), frozenset({GROUP}))
ALL_OF_IT = strict(Lock("imds", endpoints(ALL_PORTS, ALL_PORTS), ALLOWED))
"""Every packet to the address is recorded, with the port that was found in it."""
ANOTHER_PORT = strict(Lock("imds", endpoints(((443, 443),), ((443, 443),)), ALLOWED))
"""Of the packets in these tests, only those that can't be read are dropped."""
POLICIES = {
    "all-ports": ALL_OF_IT,
    "another-port": ANOTHER_PORT,
    "audit": ALL_OF_IT._replace(mode=Mode.AUDIT),
    "not-strict": ALL_OF_IT._replace(strict=False),
    "around-it": strict(
        Lock("v6", (Endpoint(ipaddress.ip_network("::/0"), ALL_PORTS, ALL_PORTS),), ALLOWED),
        Lock("beside", (Endpoint(ipaddress.ip_network("169.254.0.0/24"), ALL_PORTS, ALL_PORTS),), ALLOWED),
    ),
}
"""The last one has an entry for all IPv4 addresses, which locks nothing, and the first look does not exclude ours."""
WHOLE, FIRST = fragment_header(0, more=False), fragment_header(0, more=True)
NO_SOCKET = (Socket(),)


def require_same(machine: Machine, policy: Policy, cases: Sequence[PacketCase]) -> Counter[PacketReason]:
    """Fails for the first packet that is not treated as decide_packet() says. Returns what was met."""
    reasons: Counter[PacketReason] = Counter()
    scene = EgressScene(policy, 1, SERIAL, tuple(cases))
    found = next(differences(scene, machine, reasons), None)
    assert found is None, f"\n{found}"
    return reasons


def plain(data: bytes, ethertype: int, sockets: Sequence[Socket] = NO_SOCKET, interface: int = LOOPBACK) -> PacketCase:
    return PacketCase(Packet(data, ethertype, interface, socket=0), tuple(sockets))


def try_small_spaces(machine: Machine) -> None:
    """The small spaces that take all paths which random packets take too seldom: for coverage.py and mutate.py."""
    for policy in POLICIES:
        test_every_row_cut_at_every_length(machine, policy)
    test_a_reset_that_is_cut_at_every_length(machine)
    test_every_chain_of_four_extension_headers(machine)
    test_every_protocol_behind_a_chain_of_each_length(machine)
    test_a_protocol_that_only_resembles_an_extension_header(machine)
    test_long_chains_cut_at_every_length(machine, packets.UDP)
    for lists in LISTS:
        test_every_mark_of_the_sending_socket(machine, lists)
        test_every_mark_of_the_client(machine, lists)
    for address, port in itertools.product((TO4.packed, TO6.packed), (SERVICE_PORT, OPEN_PORT)):
        test_every_pair_of_sockets_at_the_two_ends(machine, address, port)
    for version in (4, 6):
        test_every_socket_that_a_connection_of_others_can_have(machine, version)


# --- random packets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["fixed", "fresh"])
def test_random_packets(machine: Machine, which: str, pytestconfig: pytest.Config) -> None:
    """Verdict, counters, record, row of the report are right to the last byte, and no mark changes."""
    given, wanted = pytestconfig.getoption("vm_seed"), pytestconfig.getoption("vm_cases") // 3
    if given and which == "fixed":
        pytest.skip("--vm-seed names the one seed to try")
    seed, first = given or (FIXED_SEED if which == "fixed" else random.SystemRandom().getrandbits(32), 0)
    met = Counter[PacketReason]()
    for number in itertools.count(first):
        found = next(differences(egress_scene(seed, number), machine, met), None)
        again = f"pytest tests/vm/test_egress.py --vm-seed {seed}:{number} --vm-cases 1"
        assert found is None, f"to repeat: {again}\n{found}"
        if sum(met.values()) >= wanted / 2:
            break
    assert wanted < ALL_REASONS or set(met) == set(PacketReason)


# --- what counts of a packet ------------------------------------------------------------------------------------------


def cut(data: bytes, kind: int) -> list[PacketCase]:
    """The packet, and all that is left of it when it is cut short."""
    return [plain(data[:length], kind) for length in range(len(data) + 1)]


ROWS = [*((data, ETH_P_IP) for data, _ in IPV4.values()), *((data, ETH_P_IPV6) for data, _ in IPV6.values())]
SHORT_ROWS = [(data, kind) for data, kind in ROWS if len(data) < 200]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_row_cut_at_every_length(machine: Machine, policy: str) -> None:
    made = [one for data, kind in SHORT_ROWS for one in cut(data, kind)]
    made += [plain(data, kind) for data, kind in ROWS]
    met = require_same(machine, POLICIES[policy], made)
    assert {PacketReason.NOT_IP, PacketReason.OTHER_PROTOCOL, PacketReason.LATER_FRAGMENT} < set(met)


def test_a_reset_that_is_cut_at_every_length(machine: Machine) -> None:
    """It is one when its flags are there."""
    for data, kind in (
        (ipv4(payload=packets.tcp(1, 80, packets.RST)), ETH_P_IP),
        (ipv6(WHOLE, payload=packets.tcp(1, 80, packets.RST)), ETH_P_IPV6),
    ):
        head = 20 if kind == ETH_P_IP else 48
        met = require_same(machine, ALL_OF_IT, cut(data, kind))
        assert met[PacketReason.RESET] == len(data) - (head + 13)


@pytest.mark.parametrize("protocol", [packets.UDP, packets.NO_NEXT_HEADER])
def test_long_chains_cut_at_every_length(machine: Machine, protocol: int) -> None:
    for length in range(10):
        data = ipv6(*[extension(DESTINATION_OPTIONS)] * length, protocol=protocol, payload=packets.udp(1, 80))
        require_same(machine, ALL_OF_IT, cut(data, ETH_P_IPV6))


def test_every_protocol_behind_a_chain_of_each_length(machine: Machine) -> None:
    made = [
        plain(ipv6(*[extension(DESTINATION_OPTIONS)] * length, protocol=protocol, payload=ruler(64)), ETH_P_IPV6)
        for length in range(10)
        for protocol in range(256)
    ]
    met = require_same(machine, ALL_OF_IT, made)
    assert met[PacketReason.OTHER_PROTOCOL] >= (MAX_EXTENSION_HEADERS + 1) * (256 - len(EXTENSION_HEADERS) - 2)


def ruler(length: int) -> bytes:
    """Bytes in which the ports at a place tell the place."""
    return b"".join((0x1000 + at).to_bytes(2, "big") for at in range(length // 2))


BASES = {
    "ipv4": (ipv4(payload=ruler(64)), ETH_P_IP, 24),
    "ipv4-options": (ipv4(options=bytes(8), payload=ruler(64)), ETH_P_IP, 28),
    "ipv6": (ipv6(payload=ruler(64)), ETH_P_IPV6, 44),
    "ipv6-hop-by-hop": (ipv6(extension(HOP_BY_HOP), payload=ruler(2100)), ETH_P_IPV6, 52),
    "ipv6-routing": (ipv6(extension(ROUTING, 2, b"\4\1"), payload=ruler(2100)), ETH_P_IPV6, 68),
    "ipv6-authentication": (ipv6(extension(AUTHENTICATION, 1), payload=ruler(1100)), ETH_P_IPV6, 56),
    "ipv6-options": (ipv6(extension(DESTINATION_OPTIONS), payload=ruler(2100)), ETH_P_IPV6, 52),
    "ipv6-whole": (ipv6(WHOLE, payload=ruler(64)), ETH_P_IPV6, 52),
    "ipv6-whole-options": (ipv6(WHOLE, extension(DESTINATION_OPTIONS), payload=ruler(2100)), ETH_P_IPV6, 60),
    "ipv6-first": (ipv6(FIRST, payload=ruler(64)), ETH_P_IPV6, 52),
    "ipv6-first-options": (ipv6(FIRST, extension(DESTINATION_OPTIONS), payload=ruler(64)), ETH_P_IPV6, 60),
}
"""Name -> a packet, its EtherType, and where its ports end."""


@pytest.mark.parametrize("base", BASES)
def test_every_value_of_every_byte_of_the_headers(machine: Machine, base: str) -> None:
    """Also of the length of an authentication header, and of the low byte of a fragment's offset. Addresses once."""
    data, kind, end = BASES[base]
    addresses = range(0) if base in ("ipv4", "ipv6") else range(12, 20) if kind == ETH_P_IP else range(8, 40)
    places = [at for at in range(end) if at not in addresses]
    changed = [data[:at] + bytes((value,)) + data[at + 1 :] for at in places for value in range(256)]
    require_same(machine, ALL_OF_IT, [plain(one, kind) for one in changed])


def test_every_chain_of_four_extension_headers(machine: Machine) -> None:
    kinds = [
        *(extension(HOP_BY_HOP), extension(ROUTING, 2, b"\0\1"), extension(AUTHENTICATION, 1)),
        *(extension(DESTINATION_OPTIONS, 1), WHOLE, FIRST, fragment_header(1, more=True)),
    ]
    chains = itertools.chain.from_iterable(itertools.product(kinds, repeat=length) for length in range(5))
    made = [plain(ipv6(*chain, protocol=packets.UDP, payload=ruler(64)), ETH_P_IPV6) for chain in chains]
    assert {*require_same(machine, ALL_OF_IT, made)} == {PacketReason.UNAPPROVED_SOCKET, PacketReason.LATER_FRAGMENT}


def test_a_protocol_that_only_resembles_an_extension_header(machine: Machine) -> None:
    """Numbers that are 64 more: what follows would be a chain that leads to TCP, but nobody may read it as one."""
    behind = bytes([packets.TCP, 0, 0, 0, 0, 0, 0, 0]) + packets.tcp(40_000, 80)
    made = [
        plain(ipv6(*[one] * length, protocol=number + 64, payload=behind), ETH_P_IPV6)
        for number in EXTENSION_HEADERS
        for one in (extension(DESTINATION_OPTIONS), extension(AUTHENTICATION, 1))
        for length in range(MAX_EXTENSION_HEADERS)
    ]
    assert {*require_same(machine, ALL_OF_IT, made)} == {PacketReason.OTHER_PROTOCOL}


def test_what_is_not_ip(machine: Machine) -> None:
    kinds = [1 << bit for bit in range(16)] + [0x0806, 0x0008, 0xDD86, ETH_P_IP ^ 1, ETH_P_IPV6 ^ 1]
    made = [plain(data, kind) for kind in kinds for data in (ipv4(), ipv6()) if kind not in (ETH_P_IP, ETH_P_IPV6)]
    assert {*require_same(machine, ALL_OF_IT, made)} == {PacketReason.NOT_IP}


# --- what marks are good for ------------------------------------------------------------------------------------------

TO_SERVICE = Ipv4(FROM4.packed, TO4.packed, packets.TCP).packet(packets.tcp(40_000, 80))
LISTS = {
    "user": (ALLOWED, NOBODY, Verdict.DENY),
    "nobody": (NOBODY, NOBODY, Verdict.DENY),
    "denied-user": (ALLOWED, Identities(frozenset({DENIED})), Verdict.ALLOW),
    "denied-first": (ALLOWED, ALLOWED, Verdict.ALLOW),
    "denied-group": (ALLOWED, Identities(groups=frozenset({DENIED})), Verdict.ALLOW),
    "default": (NOBODY, NOBODY, Verdict.ALLOW),
}


def every_mark() -> Iterable[bytes]:
    numbers = (0, 1, abi.NO_LIST)
    for serial, uid, gid, number, kind, unchecked in itertools.product(
        (SERIAL, EARLIER, SERIAL + (1 << 32)), (USER, DENIED, 5), (GROUP, DENIED, 5), numbers, range(8), (0, 1)
    ):
        yield abi.MARK.pack(serial, uid, gid, number, kind, unchecked)


@pytest.mark.parametrize("lists", LISTS)
def test_every_mark_of_the_sending_socket(machine: Machine, lists: str) -> None:
    made = [plain(TO_SERVICE, ETH_P_IP, [Socket(mark=mark)]) for mark in every_mark()]
    for containers, mode in itertools.product(Verdict, Mode):
        other = Lock("other", (Endpoint(ipaddress.ip_network("10.9.8.7"), ALL_PORTS),), Identities(frozenset({9})))
        policy = strict(Lock("imds", endpoints(ALL_PORTS, ()), *LISTS[lists]), other, mode=mode, containers=containers)
        met = require_same(machine, policy, made)
        assert {*met} == {PacketReason.APPROVED_SOCKET, PacketReason.UNAPPROVED_SOCKET}


def every_earlier_mark_counts(machine: Machine) -> bool:
    """A socket that another list has approved last, and this one before, at each place of its earlier marks."""
    other = Lock("other", (Endpoint(ipaddress.ip_network("10.9.8.7"), ALL_PORTS),), Identities(frozenset({9})))
    policy = strict(Lock("imds", endpoints(ALL_PORTS, ()), ALLOWED), other)
    last, mark = abi.MARK.pack(SERIAL, 9, 0, 1, abi.MARK_USER, 0), abi.MARK.pack(SERIAL, 5, 0, 0, abi.MARK_USER, 0)
    made = [
        plain(TO_SERVICE, ETH_P_IP, [Socket(mark=last, earlier=(bytes(place * len(mark)) + mark).ljust(192, b"\0"))])
        for place in range(abi.EARLIER_MARKS)
    ]
    reasons: Counter[PacketReason] = Counter()
    same = next(differences(EgressScene(policy, 1, SERIAL, tuple(made)), machine, reasons), None) is None
    assert {*reasons} == {PacketReason.APPROVED_SOCKET}
    return same


def test_every_earlier_mark_counts(machine: Machine) -> None:
    assert every_earlier_mark_counts(machine)


# --- packets without an approved socket -------------------------------------------------------------------------------

STATES = (ESTABLISHED, SYN_SENT, TIME_WAIT, CLOSE, LISTEN, NEW_SYN_RECV)
MARKS = (
    None,
    abi.MARK.pack(SERIAL, USER, 0, 0, abi.MARK_USER, 0),
    abi.MARK.pack(EARLIER, DENIED, 0, 0, abi.MARK_USER, 0),
    abi.MARK.pack(0, 0, 0, 0, abi.MARK_OPEN, 0),
    abi.MARK.pack(0, 0, 0, 0, abi.MARK_ACCEPTED, 0),
    abi.MARK.pack(0, 0, 0, 0, 0, 0),
)
SERVICE_PORT, OPEN_PORT, CLIENT_PORT = 80, 53, 40_000
LOCAL_SERVICE = strict(Lock("imds", endpoints(((80, 80), (1024, 65535)), ((80, 80),)), ALLOWED))
"""The service's address is this machine's, so its clients have that address, too."""


def socket_at(address: bytes, port: int, remote_port: int, state: int, mark: bytes | None) -> Socket:
    full = state not in NOT_FULL
    return Socket(address, address, port, remote_port, state, mark if full else None, full=full)


@pytest.mark.parametrize("lists", LISTS)
def test_every_mark_of_the_client(machine: Machine, lists: str) -> None:
    """A service of this machine answers: the client's mark must be good for the lock of the service."""
    answer = Ipv4(TO4.packed, TO4.packed, packets.TCP).packet(packets.tcp(SERVICE_PORT, CLIENT_PORT))
    client = socket_at(TO4.packed, CLIENT_PORT, SERVICE_PORT, ESTABLISHED, None)
    made = [plain(answer, ETH_P_IP, [Socket(), client._replace(mark=mark)]) for mark in every_mark()]
    for containers, mode in itertools.product(Verdict, Mode):
        lock = Lock("imds", endpoints(((80, 80), (1024, 65535)), ()), *LISTS[lists])
        met = require_same(machine, strict(lock, mode=mode, containers=containers), made)
        assert {*met} == {PacketReason.REPLY, PacketReason.UNAPPROVED_SOCKET}


@pytest.mark.parametrize("address", [TO4.packed, TO6.packed], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("port", [SERVICE_PORT, OPEN_PORT])
def test_every_pair_of_sockets_at_the_two_ends(machine: Machine, address: bytes, port: int) -> None:
    """A service of this machine answers a client: each state of each end, each mark of the client, two interfaces."""
    ends = itertools.product(STATES, STATES, MARKS, (LOOPBACK, 2), (packets.ACK, packets.SYN | packets.ACK, 0))
    made = []
    for service, client, mark, interface, flags in ends:
        segment = packets.tcp(port, CLIENT_PORT, flags)
        data, kind = (
            (Ipv4(address, address, packets.TCP).packet(segment), ETH_P_IP)
            if len(address) == 4
            else (Ipv6(address, address, packets.TCP).packet(segment), ETH_P_IPV6)
        )
        sockets = [
            socket_at(address, port, CLIENT_PORT, service, None),
            socket_at(address, CLIENT_PORT, port, client, mark),
        ]
        made.append(plain(data, kind, sockets, interface))
    met = require_same(machine, LOCAL_SERVICE, made)
    assert {*met} == {
        PacketReason.INCOMING,
        PacketReason.REPLY,
        PacketReason.CLOSED,
        PacketReason.UNAPPROVED_SOCKET,
    }


@pytest.mark.parametrize("fragment", [0, packets.MORE_FRAGMENTS], ids=["whole", "first-fragment"])
@pytest.mark.parametrize("state", [ESTABLISHED, TIME_WAIT])
def test_all_tcp_flags(machine: Machine, state: int, fragment: int) -> None:
    made = []
    for flags in range(256):
        data = Ipv4(FROM4.packed, TO4.packed, packets.TCP, fragment).packet(packets.tcp(40_000, 80, flags))
        own = Socket(FROM4.packed, TO4.packed, 40_000, 80, state, full=state not in NOT_FULL)
        made.append(plain(data, ETH_P_IP, [Socket(), own]))
    require_same(machine, ALL_OF_IT, made)


FIRST_NUMBER = 0xFFFFFFF0
ACCEPTED_MARKS = (
    *MARKS,
    abi.MARK.pack(0, 0, FIRST_NUMBER, 0, abi.MARK_ACCEPTED, 0),
    abi.MARK.pack(0, 0, FIRST_NUMBER + 1, 0, abi.MARK_ACCEPTED, 0),
    abi.MARK.pack(0, 0, FIRST_NUMBER, 0, abi.MARK_OPEN, 0),
)
KINDS_OF_SOCKETS = ((SOCK_STREAM, IPPROTO_TCP), (SOCK_RAW, IPPROTO_TCP), (SOCK_STREAM, IPPROTO_SCTP))


@pytest.mark.parametrize("version", [4, 6])
def test_every_socket_that_a_connection_of_others_can_have(machine: Machine, version: int) -> None:
    """Each state, mark, number of acknowledged bytes and kind of socket, and packets of each form."""
    flags = (packets.ACK, packets.ACK | packets.FIN, packets.ACK | packets.SYN, packets.SYN, packets.PSH)
    forms = list(itertools.product(flags, (b"x", b""), (0, packets.MORE_FRAGMENTS)))
    made = []
    for state, mark, acked, kind in itertools.product(
        (*STATES, SYN_RECV), ACCEPTED_MARKS, (0, 1, 20, 1 << 32), KINDS_OF_SOCKETS
    ):
        full = state not in NOT_FULL
        own = Socket(state=state, mark=mark if full else None, full=full, type=kind[0], protocol=kind[1])
        own = own._replace(acked=acked, snd_una=(FIRST_NUMBER + acked) & 0xFFFFFFFF)
        made += [(own, form) for form in (forms if kind == KINDS_OF_SOCKETS[0] else forms[:1])]
    ethertype = ETH_P_IP if version == 4 else ETH_P_IPV6
    cases = [plain(_segment(version, *form), ethertype, [own]) for own, form in made]
    met = require_same(machine, ALL_OF_IT, cases)
    assert {*met} == {PacketReason.APPROVED_SOCKET, PacketReason.INCOMING, PacketReason.UNAPPROVED_SOCKET}


def _segment(version: int, flags: int, data: bytes, fragment: int) -> bytes:
    segment = packets.tcp(CLIENT_PORT, SERVICE_PORT, flags, data)
    if version == 4:
        return Ipv4(FROM4.packed, TO4.packed, packets.TCP, fragment).packet(segment)
    chain = [fragment_header(0, more=True)] if fragment else []
    return Ipv6(FROM6.packed, TO6.packed, packets.TCP, chain).packet(segment)


def data_before_the_handshake_is_over() -> PacketCase:
    """With Fast Open an accepted socket sends data before."""
    own = Socket(state=SYN_RECV, type=SOCK_STREAM, protocol=IPPROTO_TCP, snd_una=FIRST_NUMBER, acked=0)
    return plain(_segment(4, packets.ACK, b"x", 0), ETH_P_IP, [own])


def connections_of_others_are_known(machine: Machine) -> bool:
    """Whether the two tests that have them pass."""
    try:
        test_every_socket_that_a_connection_of_others_can_have(machine, 4)
        test_every_pair_of_sockets_at_the_two_ends(machine, TO4.packed, OPEN_PORT)
    except AssertionError:
        return False
    return True


def test_a_lookup_compares_both_ends(machine: Machine) -> None:
    """A socket that differs in an address or a port is not the connection's."""
    for source, destination, kind in ((FROM4, TO4, ETH_P_IP), (FROM6, TO6, ETH_P_IPV6)):
        head = (Ipv4 if kind == ETH_P_IP else Ipv6)(source.packed, destination.packed, packets.TCP)
        data = head.packet(packets.tcp(40_000, 80))
        closed = Socket(source.packed, destination.packed, 40_000, 80, TIME_WAIT, full=False)
        other = bytes(len(source.packed) - 1) + b"\1"
        wrong = ({"local": other}, {"remote": other}, {"local_port": 80}, {"remote_port": 40_000})
        for fields, expected in [({}, PacketReason.CLOSED), *((one, PacketReason.UNAPPROVED_SOCKET) for one in wrong)]:
            made = plain(data, kind, [Socket(), closed._replace(**fields)])
            assert {*require_same(machine, ALL_OF_IT, [made])} == {expected}
