# SPDX-License-Identifier: Apache-2.0
"""Ways past the rules that lead callers to filters under iptables. Each works before there are rules."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.backends.iptables.rules import DENIED_MARK, FILTERED_MARK
from imds_guard.commands import filter_refusals
from imds_guard.policy.filters import FILTER_PORT
from imds_guard.policy.model import Endpoint, make_policy
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
    RESET,
    SECRET,
    STRANGER,
    FallbackScene,
    ask_on,
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
        with (
            _sniffer() as seen,
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as one,
        ):

            def send(packet: bytes) -> None:
                for part in packets(packet):
                    one.sendto(part, (METADATA, 0))

            return shake_hands_and_ask(flow, send, lambda: seen.recv(65536)).split(b" ")[1].decode()

    return attack


def _sniffer() -> socket.socket:
    one = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    one.bind(("lo", 3))
    one.settimeout(WAIT_S)
    return one


def _reversed(packet: bytes) -> tuple[bytes, ...]:
    first, last = fragments(packet, 8)
    return last, first


WAYS: dict[str, Way] = {
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
    "raw socket": _by_hand(lambda packet: (packet,)),
    "raw socket, options": _by_hand(lambda packet: (with_options(packet, bytes([NO_OPERATION] * 8)),)),
    "raw socket, flags in the later fragment": _by_hand(lambda packet: fragments(packet, 8)),
    "raw socket, flags in the first fragment": _by_hand(lambda packet: fragments(packet, 16)),
    "raw socket, later fragment first": _by_hand(_reversed),
}


def _tried(machine: Machine, user: int, way: Way) -> str:
    """With CAP_NET_RAW and CAP_NET_ADMIN, which raw sockets and marks take."""

    def inside() -> str:
        privileges.become_user(user, OTHER_GROUP, [OTHER_GROUP], [CAP_NET_RAW, CAP_NET_ADMIN])
        try:
            return way()
        except OSError as error:
            return errno.errorcode[error.errno] if error.errno else type(error).__name__

    return machine.call(inside)


def _prepare() -> None:
    privileges.command("ip", "address", "add", f"{NEIGHBOUR}/32", "dev", "lo")
    privileges.command("ip", "address", "add", f"{NEIGHBOUR6}/128", "dev", "lo")
    privileges.prepare_network()


def test_no_detour_gets_an_answer_past_the_rules(machine: Machine) -> None:
    """Neither of a caller of a filter, nor of a denied one. Before there are rules each is answered."""
    scene = FallbackScene(machine)
    machine.call(_prepare)
    scene.serve_metadata()
    before = {name: _tried(machine, STRANGER, way) for name, way in WAYS.items()}
    assert before == dict.fromkeys(WAYS, "200")
    machine.apply(POLICY)
    scene.start()
    after = {name: [_tried(machine, user, way) for user in (BY_USER, STRANGER)] for name, way in WAYS.items()}
    assert {name: found for name, found in after.items() if "200" in found} == {}


# --- a route in the packet --------------------------------------------------------------------------------------------


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
    assert (_tried(machine, STRANGER, way) == "200", machine.faults()) == (False, [])

    def switch_on() -> None:
        for switch in switches:
            Path("/proc/sys/net", switch).write_text("1", encoding="ascii")

    machine.call(switch_on)
    assert _tried(machine, STRANGER, way) == "200"
    (fault,) = machine.faults()
    assert f"{name} is 1" in fault


# --- ports of connections that have ended -----------------------------------------------------------------------------


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
        assert _tried(by_iptables.machine, BY_USER, _by_socket(_bound(address))) == "403"
    refusals = by_iptables.call(filter_refusals.read_refusals)
    assert refusals is not None
    assert [(row.uid, row.times) for row in refusals.rows] == [(BY_USER, 4)]


def test_no_address_of_ipv6_is_a_filters(by_iptables: FallbackScene) -> None:
    """Nobody listens at ::1, and the mapped address of a filter is its address."""
    by_iptables.start()
    for to in ("::1", "::ffff:127.169.1.1"):
        for user in (BY_USER, ALLOWED, STRANGER, 0):
            assert by_iptables.machine.reach(user, to, FILTER_PORT) == "ECONNREFUSED"
