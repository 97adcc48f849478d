# SPDX-License-Identifier: Apache-2.0
"""The interpreters of tests/rules/ do with a packet what the kernel does, row by row."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest

from imds_guard.kernel.credentials import become
from imds_guard.kernel.listeners import family, sockaddr
from imds_guard.kernel.run import run
from imds_guard.kernel.sandbox import Sandbox
from tests.kernel.rules_in_a_sandbox import (
    BAR,
    FOO,
    KINDS,
    NO_GROUP,
    OTHER,
    PORTS,
    SERVED,
    STAFF,
    STRANGER,
    V4,
    V6,
    one_legacy_at_a_time,
)
from tests.rules.iptables import Filter
from tests.rules.nft import Ruleset
from tests.rules.packets import Owner, Packet
from tests.tools import need

CLOSED_PORT = 81


class Sent(NamedTuple):
    """The first packet of a connect, or a datagram, to the locked address of an IP version or to another one."""

    owner: Owner
    port: int = 80
    protocol: str = "tcp"
    elsewhere: bool = False

    def to(self, version: int) -> str:
        """Its address."""
        if self.elsewhere:
            return OTHER if version == 4 else "::1"
        return V4 if version == 4 else V6

    def packet(self, version: int, *flags: str) -> Packet:
        """The packet for the interpreters."""
        to = ipaddress.ip_address(self.to(version))
        return Packet(to, self.protocol, self.port, frozenset(flags), self.owner)


SENT = (
    Sent(Owner(FOO, NO_GROUP)),
    Sent(Owner(BAR, NO_GROUP)),
    Sent(Owner(STRANGER, NO_GROUP)),
    Sent(Owner(STRANGER, STAFF)),
    Sent(Owner(STRANGER, NO_GROUP, frozenset({STAFF}))),
    Sent(Owner(FOO, STAFF), port=8080),
    Sent(Owner(FOO, NO_GROUP), elsewhere=True),
    Sent(Owner(FOO, NO_GROUP), protocol="udp"),
    Sent(Owner(BAR, NO_GROUP), protocol="udp"),
    Sent(Owner(BAR, NO_GROUP), port=8080, protocol="udp"),
)


def send_all(version: int) -> list[str]:
    """``connected`` or the errno for each of SENT. The calling process is root, and stays so."""
    return [_send(one, one.to(version)) for one in SENT]


def _send(one: Sent, to: str) -> str:
    become((one.owner.fsuid, one.owner.fsuid, 0), (one.owner.fsgid, one.owner.fsgid, 0), sorted(one.owner.groups))
    try:
        with socket.socket(family(to), socket.SOCK_STREAM if one.protocol == "tcp" else socket.SOCK_DGRAM) as client:
            client.settimeout(10)
            if one.protocol == "tcp":
                client.connect(sockaddr(to, one.port))
            else:
                client.sendto(b"?", sockaddr(to, one.port))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    finally:
        become((0, 0, 0))
        become(gids=(0, 0, 0), groups=())
    return "connected"


def as_the_sender_sees_it(rules: Filter | Ruleset, one: Sent, version: int) -> str:
    """The outcome of a connect: what becomes of its SYN, and of the ACK that follows.

    A datagram that OUTPUT stops is EPERM, rejected or not: NF_DROP in nf_hook_slow(), net/netfilter/core.c.
    """
    hook = "OUTPUT" if isinstance(rules, Filter) else "output"
    if rules.judge(hook, one.packet(version, "SYN")).verdict != "ACCEPT":
        return "EPERM" if one.protocol == "udp" else "ECONNREFUSED"
    stopped = one.protocol == "tcp" and rules.judge(hook, one.packet(version, "ACK")).verdict != "ACCEPT"
    return "ECONNRESET" if stopped else "connected"


# --- iptables -------------------------------------------------------------------------------------------------------

_TO_80 = "-p tcp -m tcp --dport 80"
_RESET = "-j REJECT --reject-with tcp-reset"
_JUDGED = ("-N A", f"OUTPUT {_TO_80} -j A")

# Rows: "-N CHAIN" makes a chain, anything else is a rule. TO, PREFIX and EVERYWHERE are of the IP version.
IPTABLES: dict[str, tuple[str, ...]] = {
    "a user": (f"OUTPUT {_TO_80} -m owner --uid-owner {FOO} {_RESET}",),
    "users": (f"OUTPUT {_TO_80} -m owner --uid-owner {FOO}-{BAR} {_RESET}",),
    "all users but one": (f"OUTPUT {_TO_80} -m owner ! --uid-owner {FOO} {_RESET}",),
    "a primary group": (f"OUTPUT {_TO_80} -m owner --gid-owner {STAFF} {_RESET}",),
    "all groups but one": (f"OUTPUT {_TO_80} -m owner ! --gid-owner {STAFF} {_RESET}",),
    "any group": (f"OUTPUT {_TO_80} -m owner --gid-owner {STAFF - 1}-{STAFF} --suppl-groups {_RESET}",),
    "not any group": (f"OUTPUT {_TO_80} -m owner ! --gid-owner {STAFF} --suppl-groups {_RESET}",),
    "a user and a group": (
        f"OUTPUT -p tcp -m tcp --dport 80:8080 -m owner --uid-owner {FOO} --gid-owner {STAFF} {_RESET}",
    ),
    "two owner matches": (
        f"OUTPUT {_TO_80} -m owner --uid-owner {STRANGER} -m owner --gid-owner {STAFF} --suppl-groups {_RESET}",
    ),
    "ports": (f"OUTPUT -p tcp -m tcp --dport 81:8080 {_RESET}",),
    "an address": (f"OUTPUT -d TO {_TO_80} {_RESET}",),
    "a prefix": (f"OUTPUT -d PREFIX {_TO_80} {_RESET}",),
    "a SYN alone": (f"OUTPUT {_TO_80} -m tcp --tcp-flags FIN,SYN,RST,ACK SYN {_RESET}",),
    "not the first packet": (
        f"OUTPUT {_TO_80} -m tcp --tcp-flags SYN,ACK ACK {_RESET}",
        f"OUTPUT {_TO_80} -m owner --uid-owner {BAR} {_RESET}",
    ),
    "UDP": (f"OUTPUT -p udp -m udp --dport 80 -m owner --uid-owner {FOO} -j REJECT",),
    "UDP, dropped": (f"OUTPUT -p udp -m udp --dport 80 -m owner --uid-owner {FOO} -j DROP",),
    "the first rule counts": (
        f"OUTPUT {_TO_80} -m owner --uid-owner {FOO} -j ACCEPT",
        f"OUTPUT {_TO_80} {_RESET}",
    ),
    "RETURN in a built-in chain": (
        f"OUTPUT {_TO_80} -m owner --uid-owner {FOO} -j RETURN",
        f"OUTPUT {_TO_80} {_RESET}",
    ),
    "RETURN after a jump": (
        *_JUDGED,
        f"A -m owner --uid-owner {FOO} -j RETURN",
        f"A -p tcp -m owner --uid-owner {BAR} {_RESET}",
        f"OUTPUT {_TO_80} -m owner --uid-owner {FOO} {_RESET}",
    ),
    "RETURN after a goto": (
        *("-N B", *_JUDGED, f"A -m owner --uid-owner {FOO}-{BAR} -g B", f"A -p tcp {_RESET}"),
        f"B -m owner --uid-owner {FOO} -j RETURN",
        f"OUTPUT {_TO_80} -m owner --uid-owner {BAR} {_RESET}",
    ),
    "the end after a goto": (
        *("-N B", *_JUDGED, f"A -m owner --uid-owner {FOO}-{BAR} -g B", f"A -p tcp {_RESET}"),
        "B -m comment --comment nothing",
    ),
    "a goto from a built-in chain": (
        *("-N A", f"OUTPUT {_TO_80} -m owner --uid-owner {FOO} -g A", f"OUTPUT {_TO_80} {_RESET}"),
        "A -m comment --comment nothing",
    ),
    "LOG and rules without a target go on": (
        f"OUTPUT {_TO_80} -j LOG --log-prefix test --log-uid",
        f"OUTPUT {_TO_80} -m owner --uid-owner {FOO}",
        f"OUTPUT {_TO_80} -m owner --uid-owner {FOO}-{BAR} {_RESET}",
    ),
}


def restore_text(row: tuple[str, ...], version: int, table: str = "filter") -> str:
    chains = [f":{line[3:]} - [0:0]" for line in row if line.startswith("-N ")]
    rules = [f"-A {line}" for line in row if not line.startswith("-N ")]
    to, prefix = ("169.254.169.254/32", "169.254.168.0/23") if version == 4 else ("fd00:ec2::254/128", "fd00::/9")
    text = "\n".join([f"*{table}", *chains, *rules, "COMMIT", ""])
    return text.replace(" TO ", f" {to} ").replace(" PREFIX ", f" {prefix} ")


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    """A namespace with a fake metadata service."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    with Sandbox(SERVED) as sandbox:
        sandbox.serve(SERVED, PORTS)
        yield sandbox


@pytest.fixture
def quiet_box() -> Iterator[Sandbox]:
    """A namespace without a service, so that the only reset in it is the one that a test causes."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    with Sandbox(SERVED) as sandbox:
        yield sandbox


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_iptables(box: Sandbox, kind: str, version: int) -> None:
    """Each row has packets that get through and packets that do not."""
    command = KINDS[kind][0 if version == 4 else 1]
    need(command)

    def try_all() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, row in IPTABLES.items():
            loaded = run([f"{command}-restore"], stdin=restore_text(row, version))
            assert loaded.status == 0, (name, loaded.complaint)
            found[name] = send_all(version)
        assert run([f"{command}-restore"], stdin="*filter\nCOMMIT\n").status == 0
        return found

    with one_legacy_at_a_time(kind):
        tried = box.call(try_all, timeout_s=120)
    assert tried == {name: _by_interpreter(row, version) for name, row in IPTABLES.items()}
    assert [name for name, outcomes in tried.items() if len(set(outcomes)) < 2] == []


def _by_interpreter(row: tuple[str, ...], version: int) -> list[str]:
    table = Filter(version)
    table.restore(restore_text(row, version))
    return [as_the_sender_sees_it(table, one, version) for one in SENT]


_MARK = "-j MARK --set-xmark 0x696d1064/0xffffffff"
_MARKED = f"OUTPUT {_TO_80} -m mark --mark 0x696d1064 {_RESET}"

# Rows: rules in mangle, and rules in filter.
MARKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "what is marked in mangle is marked in filter": ((f"OUTPUT -m owner --uid-owner {FOO} {_MARK}",), (_MARKED,)),
    "the last mark counts": (
        (f"OUTPUT {_MARK}", f"OUTPUT -m owner --uid-owner {FOO} -j MARK --set-xmark 0x1/0xffffffff"),
        (_MARKED,),
    ),
    "ACCEPT ends the table alone": (
        (f"OUTPUT -m owner --uid-owner {FOO} {_MARK}", "OUTPUT -j ACCEPT", f"OUTPUT {_MARK}"),
        (_MARKED,),
    ),
    "RETURN": (("-N A", "OUTPUT -j A", f"A -m owner --uid-owner {FOO} -j RETURN", f"A {_MARK}"), (_MARKED,)),
}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_marks(box: Sandbox, kind: str, version: int) -> None:
    """From mangle to filter. Each row has packets that get through and packets that do not."""
    command = KINDS[kind][0 if version == 4 else 1]
    need(command)

    def try_all() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, row in MARKS.items():
            for table, rules in zip(("mangle", "filter"), row):
                loaded = run([f"{command}-restore"], stdin=restore_text(rules, version, table))
                assert loaded.status == 0, (name, loaded.complaint)
            found[name] = send_all(version)
        assert run([f"{command}-restore"], stdin="*filter\nCOMMIT\n*mangle\nCOMMIT\n").status == 0
        return found

    with one_legacy_at_a_time(kind):
        tried = box.call(try_all, timeout_s=120)
    assert tried == {name: _through_both(row, version) for name, row in MARKS.items()}
    assert [name for name, outcomes in tried.items() if len(set(outcomes)) < 2] == []


def _through_both(row: tuple[tuple[str, ...], tuple[str, ...]], version: int) -> list[str]:
    mangle, behind = Filter(version, "mangle"), Filter(version)
    for table, rules in zip((mangle, behind), row):
        table.restore(restore_text(rules, version, table.table))

    def outcome(one: Sent) -> str:
        packet = one.packet(version, "SYN")
        marked = replace(packet, mark=mangle.judge("OUTPUT", packet).mark)
        refused = "EPERM" if one.protocol == "udp" else "ECONNREFUSED"
        return "connected" if behind.judge("OUTPUT", marked).verdict == "ACCEPT" else refused

    return [outcome(one) for one in SENT]


_BEHIND = f"{OTHER}:{CLOSED_PORT}"

# Rows: rules in table nat, and rules in filter.
NAT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "DNAT by owner": ((f"OUTPUT {_TO_80} -m owner --uid-owner {FOO} -j DNAT --to-destination {_BEHIND}",), ()),
    "DNAT by a supplementary group": (
        (f"OUTPUT {_TO_80} -m owner --gid-owner {STAFF} --suppl-groups -j DNAT --to-destination {_BEHIND}",),
        (),
    ),
    "the first that translates decides": (
        (
            f"OUTPUT {_TO_80} -m owner --uid-owner {FOO} -j DNAT --to-destination {OTHER}:8080",
            f"OUTPUT {_TO_80} -j DNAT --to-destination {_BEHIND}",
        ),
        (),
    ),
    "RETURN": (
        (
            "-N A",
            "OUTPUT -j A",
            f"A -m owner --uid-owner {FOO} -j RETURN",
            f"A {_TO_80} -j DNAT --to-destination {_BEHIND}",
        ),
        (),
    ),
    "filter sees the new address": (
        (f"OUTPUT {_TO_80} -m owner --uid-owner {FOO} -j DNAT --to-destination {OTHER}:8080",),
        (f"OUTPUT -d {OTHER}/32 -p tcp -m tcp --dport 8080 -j REJECT --reject-with tcp-reset",),
    ),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nat(box: Sandbox, kind: str) -> None:
    """From table nat to filter. Each row has packets that get through and packets that do not."""
    command = KINDS[kind][0]
    need(command)

    def try_all() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, row in NAT.items():
            for table, rules in zip(("nat", "filter"), row):
                loaded = run([f"{command}-restore"], stdin=restore_text(rules, 4, table))
                assert loaded.status == 0, (name, loaded.complaint)
            found[name] = send_all(4)
        assert run([f"{command}-restore"], stdin="*filter\nCOMMIT\n*nat\nCOMMIT\n").status == 0
        return found

    with one_legacy_at_a_time(kind):
        tried = box.call(try_all, timeout_s=120)
    assert tried == {name: _through_nat(row) for name, row in NAT.items()}
    assert [name for name, outcomes in tried.items() if len(set(outcomes)) < 2] == []


def _through_nat(row: tuple[tuple[str, ...], tuple[str, ...]]) -> list[str]:
    nat, behind = Filter(4, "nat"), Filter(4)
    for table, rules in zip((nat, behind), row):
        table.restore(restore_text(rules, 4, table.table))

    def outcome(one: Sent) -> str:
        packet = one.packet(4, "SYN")
        to, port = nat.judge("OUTPUT", packet).led_to or (packet.destination, packet.port)
        passes = behind.judge("OUTPUT", replace(packet, destination=to, port=port)).verdict == "ACCEPT"
        return "connected" if passes and port in PORTS else "ECONNREFUSED"

    return [outcome(one) for one in SENT]


_RESETS = "OUTPUT -p tcp -m tcp --tcp-flags RST RST -m owner"
_OWNERLESS = (
    f"{_RESETS} --uid-owner 0-4294967294 -j LOG --log-prefix owned",
    f"{_RESETS} ! --uid-owner 0-4294967294 -j LOG --log-prefix ownerless",
    f"{_RESETS} --gid-owner 0-4294967294 --suppl-groups -j LOG --log-prefix grouped",
    f"{_RESETS} ! --gid-owner 0-4294967294 -j LOG --log-prefix groupless",
    f"{_RESETS} ! --uid-owner 0-4294967294 ! --gid-owner 5 -j LOG --log-prefix both",
    f"{_RESETS} ! --uid-owner 0-4294967294 --gid-owner 5 -j LOG --log-prefix mixed",
)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_packet_without_an_owner_in_iptables(quiet_box: Sandbox, kind: str, version: int) -> None:
    """The reset from a closed port has a socket of the kernel. What matched it is in the counters of the rules."""
    command = KINDS[kind][0 if version == 4 else 1]
    need(command)

    def try_one() -> str:
        assert run([f"{command}-restore"], stdin=restore_text(_OWNERLESS, version)).status == 0
        assert _send(SENT[0]._replace(port=CLOSED_PORT), SENT[0].to(version)) == "ECONNREFUSED"
        saved = run([f"{command}-save", "-c", "-t", "filter"]).stdout
        assert run([f"{command}-restore"], stdin="*filter\nCOMMIT\n").status == 0
        return saved

    with one_legacy_at_a_time(kind):
        saved = quiet_box.call(try_one, timeout_s=60)
    matched = re.findall(r"^\[1:\d+\] .*--log-prefix \"?(\w+)", saved, re.MULTILINE)
    table = Filter(version)
    table.restore(restore_text(_OWNERLESS, version))
    reset = Packet(ipaddress.ip_address(SENT[0].to(version)), "tcp", 40000, frozenset({"RST", "ACK"}))
    assert tuple(matched) == table.judge("OUTPUT", reset).logged


# --- nft ------------------------------------------------------------------------------------------------------------

_RESET_80 = "tcp dport 80 reject with tcp reset"

NFT: dict[str, tuple[str, ...]] = {
    "users": (f"meta skuid {{ {FOO}-{BAR} }} {_RESET_80}",),
    "a set of users": (f"meta skuid {{ {FOO}, {BAR + 1}-{BAR + 9} }} {_RESET_80}",),
    "a group, which is the primary one": (f"meta skgid {{ {STAFF} }} {_RESET_80}",),
    "an address": (f"ip daddr {V4}/32 {_RESET_80}", f"ip6 daddr {V6}/128 {_RESET_80}"),
    "a prefix": (f"ip daddr 169.254.168.0/23 {_RESET_80}", f"ip6 daddr fd00::/9 {_RESET_80}"),
    "an IP version": (f"meta nfproto ipv4 ip daddr 169.254.0.0/16 {_RESET_80}", f"meta nfproto ipv6 {_RESET_80}"),
    "ports": ("tcp dport { 53, 81-8080 } reject with tcp reset",),
    "a protocol": ("meta l4proto udp udp dport { 80 } reject with icmpx port-unreachable",),
    "a SYN alone": ("tcp flags & (fin | syn | rst | ack) == syn tcp dport 80 reject with tcp reset",),
    "not the first packet": (
        "tcp flags & (syn | ack) == ack tcp dport 80 reject with tcp reset",
        f"meta skuid {BAR} {_RESET_80}",
    ),
    "return after a jump": (
        *("-N a", "tcp dport 80 jump a", f"meta skuid {FOO} {_RESET_80}"),
        *(f"a meta skuid {FOO} return", f"a meta skuid {BAR} {_RESET_80}"),
    ),
    "return after a goto": (
        *("-N b", "-N a", "tcp dport 80 jump a", f"meta skuid {BAR} {_RESET_80}"),
        *(f"a meta skuid {FOO}-{BAR} goto b", f"a {_RESET_80}", f"b meta skuid {FOO} return"),
    ),
    "a goto from a base chain": ("-N a", f"tcp dport 80 meta skuid {FOO} goto a", _RESET_80),
    "a mark": (f"meta mark 0x00000001 {_RESET_80}", f"meta mark 0x00000000 meta skuid {FOO} {_RESET_80}"),
    "log goes on": ('log prefix "test" flags skuid', f"meta skuid {FOO} {_RESET_80}"),
}


def nft_text(row: tuple[str, ...]) -> str:
    chains: dict[str, list[str]] = {line[3:]: [] for line in row if line.startswith("-N ")}
    output = ["type filter hook output priority filter; policy accept;"]
    for line in row:
        chain, _, rule = line.partition(" ")
        if chain in chains:
            chains[chain].append(rule)
        elif chain != "-N":
            output.append(line)
    lines = ["table inet test", "delete table inet test", "table inet test {"]
    for name, rules in {**chains, "output": output}.items():
        lines += [f"chain {name} {{", *rules, "}"]
    return "\n".join([*lines, "}", ""])


def test_nft(box: Sandbox) -> None:
    """Each row has packets that get through and packets that do not."""
    need("nft")

    def try_all() -> dict[tuple[str, int], list[str]]:
        found: dict[tuple[str, int], list[str]] = {}
        for name, row in NFT.items():
            loaded = run(["nft", "-f", "-"], stdin=nft_text(row))
            assert loaded.status == 0, (name, loaded.complaint)
            for version in (4, 6):
                found[name, version] = send_all(version)
        assert run(["nft", "delete", "table", "inet", "test"]).status == 0
        return found

    tried = box.call(try_all, timeout_s=120)
    assert tried == {(name, version): _by_nft(row, version) for name, row in NFT.items() for version in (4, 6)}
    assert [name for name, outcomes in tried.items() if len(set(outcomes)) < 2] == []


def _by_nft(row: tuple[str, ...], version: int) -> list[str]:
    rules = Ruleset(nft_text(row))
    return [as_the_sender_sees_it(rules, one, version) for one in SENT]


def test_a_packet_without_an_owner_in_nft(quiet_box: Sandbox) -> None:
    """It matches neither a user nor a group."""
    need("nft")
    keys = ("meta skuid 0-4294967294", "meta skgid 0-4294967294", "tcp sport 81 tcp flags & (rst) == rst")
    row = tuple(f"tcp flags & (rst) == rst {key} counter" for key in keys[:2])

    def try_one() -> str:
        assert run(["nft", "-f", "-"], stdin=nft_text((*row, f"{keys[2]} counter"))).status == 0
        assert _send(SENT[0]._replace(port=CLOSED_PORT), V4) == "ECONNREFUSED"
        listed = run(["nft", "list", "table", "inet", "test"]).stdout
        assert run(["nft", "delete", "table", "inet", "test"]).status == 0
        return listed

    assert re.findall(r"counter packets (\d+)", quiet_box.call(try_one, timeout_s=60)) == ["0", "0", "1"]
    rules = Ruleset(nft_text(tuple(line.replace("counter", 'log prefix "met" flags skuid') for line in row)))
    reset = Packet(ipaddress.ip_address(V4), "tcp", 40000, frozenset({"RST", "ACK"}))
    assert rules.judge("output", reset).logged == ()
