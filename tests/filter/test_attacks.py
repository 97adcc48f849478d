# SPDX-License-Identifier: Apache-2.0
"""Ways past a filter, by each backend. Each works before there is a guard."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import socket
import struct
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.backends.iptables.rules import DENIED_MARK, FILTERED_MARK
from imds_guard.commands import filter_places, filter_refusals
from imds_guard.kernel import netns
from imds_guard.kernel.children import run_in_child
from imds_guard.kernel.syscall_numbers import syscall_number
from imds_guard.policy.filters import FILTER_PORT, Filter, FilterRules
from imds_guard.policy.model import Endpoint, Identities, make_policy
from imds_guard.policy.ports import ALL_PORTS
from tests.adversary import privileges
from tests.adversary.attacks_packets import NOBODY
from tests.adversary.packets import Flow, fragments, shake_hands_and_ask, with_options
from tests.adversary.privileges import CAP_NET_ADMIN, CAP_NET_RAW
from tests.filter.scene import (
    ACCOUNT,
    ALLOWED,
    BY_USER,
    METADATA,
    OTHER_GROUP,
    POLICY,
    REGION,
    RESET,
    SECRET,
    STRANGER,
    TIMED_OUT,
    FallbackScene,
    Scene,
    ask_on,
    become_caller,
    policy_of,
    request_for,
    serve_metadata,
)
from tests.kernel.rules_in_a_sandbox import V6, Machine

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="writes rules in a namespace of its own")

NEIGHBOUR, NEIGHBOUR6 = "10.66.0.1", "fd66::1"
"""Addresses of the namespace that are not locked."""
IPPROTO_MPTCP = 262  # include/uapi/linux/in.h
SO_MARK = 36  # include/uapi/asm-generic/socket.h
IP_OPTIONS = 4  # include/uapi/linux/in.h
NO_OPERATION, RECORD_ROUTE, LOOSE_SOURCE_ROUTE = 1, 7, 131  # RFC 791 section 3.1
WAIT_S = 3

Way = Callable[[], str]
"""Runs as the attacker, and returns the status of the answer, or why there is none."""
Prepare = Callable[[socket.socket], object]


def _by_socket(prepare: Prepare, family: int = socket.AF_INET, protocol: int = 0) -> Way:
    def attack() -> str:
        with socket.socket(family, socket.SOCK_STREAM, protocol) as one:
            one.settimeout(WAIT_S)
            prepare(one)
            return ask_on(one, SECRET, (METADATA if family == socket.AF_INET else f"::ffff:{METADATA}", 80))

    return attack


def _nothing(one: socket.socket) -> None:
    pass


def _option(level: int, option: int, value: int | bytes) -> Prepare:
    return lambda one: one.setsockopt(level, option, value)


def _bound(address: str) -> Prepare:
    return lambda one: one.bind((address, 0))


def _source_route(one: socket.socket) -> None:
    """By way of another address of this machine."""
    option = struct.pack("=BBB4sB", LOOSE_SOURCE_ROUTE, 7, 4, socket.inet_aton(NEIGHBOUR), NO_OPERATION)
    one.setsockopt(socket.IPPROTO_IP, IP_OPTIONS, option)


def _fast_open() -> str:
    with socket.socket() as one:
        one.settimeout(WAIT_S)
        one.sendto(request_for(SECRET), socket.MSG_FASTOPEN, (METADATA, 80))
        answer = one.recv(65536)
        return answer.split(b" ")[1].decode() if answer else RESET


Packets = Callable[[bytes], "tuple[bytes, ...]"]


def _by_hand(packets: Packets) -> Way:
    """A handshake through a raw socket, from an address that is nobody's. It takes CAP_NET_RAW.

    Each packet is sent as these packets.
    """

    def attack() -> str:
        flow = Flow(NOBODY, 32_768 + os.getpid() % 28_000, METADATA, 80)
        with _sniffer() as seen, socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as one:

            def send(packet: bytes) -> None:
                for part in packets(packet):
                    one.sendto(part, (METADATA, 0))

            return shake_hands_and_ask(flow, send, lambda: seen.recv(65536)).split(b" ")[1].decode()

    return attack


def _sniffer() -> socket.socket:
    one = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    one.bind(("lo", 3))
    one.settimeout(1)
    return one


def _reversed(packet: bytes) -> tuple[bytes, ...]:
    first, last = fragments(packet, 8)
    return last, first


SOCKETS: dict[str, Way] = {
    "tcp": _by_socket(_nothing),
    "mapped": _by_socket(_nothing, socket.AF_INET6),
    "mptcp": _by_socket(_nothing, protocol=IPPROTO_MPTCP),
    "fast open": _fast_open,
    "bound to lo": _by_socket(_option(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")),
    "from the locked address": _by_socket(_bound(METADATA)),
    "from 127.0.0.1": _by_socket(_bound("127.0.0.1")),
    "from the address of a filter": _by_socket(_bound("127.169.1.1")),
    "mark of a caller of a filter": _by_socket(_option(socket.SOL_SOCKET, SO_MARK, FILTERED_MARK)),
    "mark of a denied caller": _by_socket(_option(socket.SOL_SOCKET, SO_MARK, DENIED_MARK)),
    "another mark": _by_socket(_option(socket.SOL_SOCKET, SO_MARK, 1)),
    "no operation": _by_socket(_option(socket.IPPROTO_IP, IP_OPTIONS, bytes([NO_OPERATION] * 8))),
    "record route": _by_socket(_option(socket.IPPROTO_IP, IP_OPTIONS, bytes([RECORD_ROUTE, 7, 4, 0, 0, 0, 0, 1]))),
}
PACKETS: dict[str, Way] = {
    "raw socket": _by_hand(lambda packet: (packet,)),
    "options": _by_hand(lambda packet: (with_options(packet, bytes([NO_OPERATION] * 8)),)),
    "flags in the later fragment": _by_hand(lambda packet: fragments(packet, 8)),
    "flags in the first fragment": _by_hand(lambda packet: fragments(packet, 16)),
    "later fragment first": _by_hand(_reversed),
}


def _tried(scene: Scene, user: int, way: Way) -> str:
    """With CAP_NET_RAW and CAP_NET_ADMIN, which raw sockets and marks take."""

    def inside() -> str:
        privileges.become_user(user, OTHER_GROUP, [OTHER_GROUP], [CAP_NET_RAW, CAP_NET_ADMIN])
        try:
            return way()
        except OSError as error:
            return errno.errorcode[error.errno] if error.errno else type(error).__name__

    return scene.call(inside)


def _prepare() -> None:
    privileges.command("ip", "address", "add", f"{NEIGHBOUR}/32", "dev", "lo")
    privileges.command("ip", "address", "add", f"{NEIGHBOUR6}/128", "dev", "lo")
    privileges.prepare_network()


@pytest.fixture
def attacked(unguarded: Scene) -> Scene:
    """A metadata service, and addresses to attack from."""
    unguarded.call(_prepare)
    unguarded.serve_metadata()
    return unguarded


def _those_that_work(scene: Scene, ways: dict[str, Way], *users: int) -> set[str]:
    """An answer to SECRET with status 200 was never by the filter."""
    return {name for name, way in ways.items() if "200" in {_tried(scene, user, way) for user in users}}


def test_no_socket_gets_an_answer_past_the_filter(attacked: Scene) -> None:
    """Neither of a caller of a filter, nor of a denied one, whatever options the socket has."""
    before = {name: _tried(attacked, STRANGER, way) for name, way in SOCKETS.items()}
    before = {name: found for name, found in before.items() if found != "EPROTONOSUPPORT"}  # a kernel without MPTCP
    assert before == dict.fromkeys(before, "200")
    attacked.change(POLICY)
    attacked.start()
    assert _those_that_work(attacked, SOCKETS, BY_USER, STRANGER) == set()


def test_no_packet_gets_an_answer_past_the_filter(attacked: Scene) -> None:
    """By eBPF with --strict alone: without it raw sockets are not seen, with a filter or without one."""
    assert _those_that_work(attacked, PACKETS, STRANGER) == set(PACKETS)
    attacked.change(POLICY)
    attacked.start()
    found = _those_that_work(attacked, PACKETS, BY_USER, STRANGER)
    if attacked.cgroup is not None:
        assert found == set(PACKETS)
        attacked.change(POLICY._replace(strict=True))
        assert attacked.ask(BY_USER, REGION) == "200"
        found = _those_that_work(attacked, PACKETS, BY_USER, STRANGER)
    assert found == set()


def test_another_network_namespace_has_no_filter(by_ebpf: Scene) -> None:
    """Whatever listens there: a caller is neither led to it, nor let through to what has the locked address there.

    iptables judges one network namespace alone.
    """
    by_ebpf.start()

    def elsewhere() -> list[str]:
        netns.unshare_network((METADATA, "127.169.1.1"))
        places = ((METADATA, 80), ("127.169.1.1", FILTER_PORT))
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(socket.create_server(place))
            return [run_in_child(partial(_connects, user)) for user in (ALLOWED, BY_USER, STRANGER)]

    assert by_ebpf.call(elsewhere) == ["connected", "EPERM", "EPERM"]


def _connects(user: int) -> str:
    become_caller(user)
    with socket.socket() as one:
        return errno.errorcode.get(one.connect_ex((METADATA, 80)), "connected")


def test_a_process_that_holds_the_listener_of_a_dead_filter_opens_nothing(by_each: Scene) -> None:
    """A child that it has forked, for example. Callers wait, status says so, and a filter starts when it has ended."""
    by_each.start()
    ours, theirs = socket.socketpair()

    def hold() -> None:
        pidfd = os.pidfd_open(by_each.service)
        held = [fd for fd in map(partial(_taken, pidfd), range(3, 64)) if fd >= 0]
        theirs.send(b"%d" % len(held))
        theirs.recv(1)

    with ours, theirs:
        holder = by_each.sandbox.spawn(hold)
        ours.settimeout(10)
        assert int(ours.recv(8)) > 0
        by_each.kill(by_each.service)
        assert by_each.ask(BY_USER, SECRET) == TIMED_OUT
        assert "systemctl restart imds-guard-filter" in by_each.faults()[0]
        by_each.kill(holder)
    assert by_each.ask(BY_USER, SECRET) == by_each.denied
    by_each.start()
    assert [by_each.ask(BY_USER, path) for path in (REGION, SECRET)] == ["200", "403"]


def test_a_kept_connection_gets_nothing_by_old_rules(by_each: Scene) -> None:
    """Its next request is asked under rules that refuse it."""
    by_each.start()
    ours, theirs = socket.socketpair()

    def keep() -> None:
        become_caller(BY_USER)
        request = request_for(REGION).replace(b"Connection: close\r\n", b"")
        with socket.create_connection((METADATA, 80), WAIT_S) as one:
            one.sendall(request)
            theirs.send(one.recv(65536).split(b" ")[1])
            theirs.recv(1)
            with suppress(ConnectionError):
                one.sendall(request)
                theirs.send(one.recv(65536) or b"closed")
                return
            theirs.send(b"closed")

    with ours, theirs:
        by_each.sandbox.spawn(keep)
        ours.settimeout(10)
        assert ours.recv(64) == b"200"
        by_each.change(policy_of("GET /**", deny=("/*/meta-data/placement/**",)))
        assert by_each.reload() == []
        ours.send(b".")
        assert ours.recv(64) == b"closed"
    assert by_each.ask(BY_USER, REGION) == "403"


def _taken(pidfd: int, number: int) -> int:
    """A descriptor of the other process as our own (pidfd_getfd(2)); -1 where it has none with this number."""
    return int(ctypes.CDLL(None).syscall(syscall_number("pidfd_getfd"), pidfd, number, 0))


# --- iptables: a route in the packet ----------------------------------------------------------------------------------


def _segment_route(one: socket.socket) -> None:
    """By way of another address of this machine, with IPv6: a segment routing header (RFC 8754, section 2).

    The kernel puts the address of connect(2) into the first segment: ipv6_push_rthdr4() in Linux net/ipv6/exthdrs.c.
    """
    header = struct.pack("!6B2x", 0, 4, 4, 1, 1, 0) + bytes(16) + socket.inet_pton(socket.AF_INET6, NEIGHBOUR6)
    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RTHDR, header)


def _by_segments() -> str:
    with socket.socket(socket.AF_INET6) as one:
        one.settimeout(WAIT_S)
        _segment_route(one)
        return ask_on(one, SECRET, (V6, 80))


ROUTES: dict[str, tuple[Way, tuple[str, ...]]] = {
    "net.ipv4.conf.all.accept_source_route": (
        _by_socket(_source_route),
        ("ipv4/conf/all/accept_source_route", "ipv4/conf/lo/accept_source_route", "ipv4/conf/lo/accept_local"),
    ),
    "net.ipv6.conf.all.seg6_enabled": (
        _by_segments,
        ("ipv6/conf/all/seg6_enabled", "ipv6/conf/lo/seg6_enabled"),
    ),
}


@pytest.mark.parametrize("name", ROUTES)
def test_a_route_in_the_packet_is_named_where_it_opens(machine: Machine, name: str) -> None:
    """Rules see the address of its first hop. Where the switches are off it opens nothing."""
    way, switches = ROUTES[name]
    scene = FallbackScene(machine)
    machine.call(_prepare)
    scene.serve_metadata()
    scene.sandbox.spawn(lambda: serve_metadata(V6))
    ipv6 = Endpoint(ipaddress.ip_network(V6), ALL_PORTS)
    lock = POLICY.locks[0]._replace(endpoints=(*POLICY.locks[0].endpoints, ipv6))
    machine.apply(make_policy([lock], filters=POLICY.filters, filter_uid=ACCOUNT.uid))
    assert (_tried(scene, STRANGER, way) == "200", machine.faults()) == (False, [])

    def switch_on() -> None:
        for switch in switches:
            Path("/proc/sys/net", switch).write_text("1", encoding="ascii")

    machine.call(switch_on)
    assert _tried(scene, STRANGER, way) == "200"
    (fault,) = machine.faults()
    assert f"{name} is 1" in fault


# --- iptables: ports of connections that have ended -------------------------------------------------------------------


def test_nobody_inherits_the_way_of_a_connection_that_has_ended(by_iptables: FallbackScene) -> None:
    """Conntrack keeps an ended connection for two minutes. The same ports, another user."""
    by_iptables.start()
    assert [by_iptables.ask(ALLOWED, SECRET, port=40_010), by_iptables.ask(BY_USER, SECRET, port=40_020)] == [
        "200",
        "403",
    ]
    rows = {
        "direct, then by a caller of a filter": by_iptables.ask(BY_USER, SECRET, port=40_010),
        "filtered, then by a denied caller": by_iptables.ask(STRANGER, SECRET, port=40_020),
        "filtered, then by an allowed user": by_iptables.ask(ALLOWED, SECRET, port=40_020),
    }
    assert rows == {
        "direct, then by a caller of a filter": "403",
        "filtered, then by a denied caller": "ECONNREFUSED",
        "filtered, then by an allowed user": "200",
    }


def test_the_account_of_a_request_is_the_callers_whatever_it_is_bound_to(by_iptables: FallbackScene) -> None:
    """The service finds the caller by both ends of its socket, which DNAT does not change."""
    by_iptables.start()
    for address in (METADATA, "127.0.0.1", "127.169.1.1", "127.169.1.2"):
        assert _tried(by_iptables, BY_USER, _by_socket(_bound(address))) == "403"
    refusals = by_iptables.call(filter_refusals.read_refusals)
    assert refusals is not None
    assert [(row.uid, row.times) for row in refusals.rows] == [(BY_USER, 4)]


def test_a_mark_opens_no_filter(by_iptables: FallbackScene) -> None:
    """Neither one's own nor that of others, for whoever may set marks, at the address where it listens."""
    second = Filter("second", ("default",), Identities(frozenset((STRANGER,))), rules=FilterRules(("GET /**",)))
    by_iptables.change(make_policy(POLICY.locks, filters=(*POLICY.filters, second), filter_uid=ACCOUNT.uid))
    by_iptables.start()
    assert [by_iptables.ask(user, SECRET) for user in (BY_USER, STRANGER)] == ["403", "200"]
    found = {
        (place.filter, user, mark): _tried(by_iptables, user, partial(_directly, place.address, mark))
        for place in by_iptables.call(lambda: filter_places.wanted_places(None)).places
        for user in (BY_USER, STRANGER, ALLOWED, 0)
        for mark in (0, 1, FILTERED_MARK, DENIED_MARK)
    }
    assert (len(found), set(found.values())) == (32, {"ECONNREFUSED"})


def _directly(address: str, mark: int) -> str:
    with socket.socket() as one:
        one.settimeout(WAIT_S)
        one.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        return ask_on(one, SECRET, (address, FILTER_PORT))


def test_no_address_of_ipv6_is_a_filters(by_iptables: FallbackScene) -> None:
    """Nobody listens at ::1, and the mapped address of a filter is its address."""
    by_iptables.start()
    for to in ("::1", "::ffff:127.169.1.1"):
        for user in (BY_USER, ALLOWED, STRANGER, 0):
            assert by_iptables.machine.reach(user, to, FILTER_PORT) == "ECONNREFUSED"
