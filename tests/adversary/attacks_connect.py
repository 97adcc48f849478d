# SPDX-License-Identifier: Apache-2.0
"""Attacks by every way to connect, and to send without connecting."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
from typing import Callable

from tests.adversary import service
from tests.adversary.model import Attack, Run, Verdict, Way
from tests.adversary.rings import Ring
from tests.adversary.scene import IPV4, IPV6, OPEN4, OPEN6, WAIT_S, as_attacker
from tests.adversary.talk import REQUEST, answer, ask, fetch, make_socket, packed, there
from tests.conformance.attempts import IPPROTO_MPTCP, TCP_FASTOPEN_CONNECT, _MessageHeader, _Vector

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# --- TCP ------------------------------------------------------------------------------------------------------------


def _nonblocking() -> bytes:
    with make_socket() as one:
        one.setblocking(False)
        number = one.connect_ex(there())
        if number == errno.EINPROGRESS:
            select.select([], [one], [], WAIT_S)
            number = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
        one.settimeout(WAIT_S)
        return ask(one)


def _again_and_again() -> bytes:
    """Connects three times on the same socket, whatever the first results are."""
    with make_socket() as one:
        for _ in range(2):
            if one.connect_ex(there()) == 0:
                break
        number = one.connect_ex(there())
        if number not in (0, errno.EISCONN):
            raise OSError(number, os.strerror(number))
        return ask(one)


def _elsewhere_first(kind: int, address: str = IPV4, first: str = OPEN4) -> Callable[[], bytes]:
    """Connects to an open address, disconnects with AF_UNSPEC (connect(2)), then connects to the locked one."""

    def attack() -> bytes:
        with make_socket(address, kind) as one:
            one.connect(there(first))
            unspecified = struct.pack("=H14x", socket.AF_UNSPEC)
            _checked(_libc.connect(one.fileno(), unspecified, 16), "connect")
            one.connect(there(address))
            return ask(one)

    return attack


def _fastopen_sendto() -> bytes:
    """Sends data in the SYN, without connect(2)."""
    with make_socket() as one:
        one.sendto(REQUEST, socket.MSG_FASTOPEN, there())
        return answer(one)


def _fastopen_connect() -> bytes:
    """connect(2) sends nothing yet (TCP_FASTOPEN_CONNECT in tcp(7)); then data goes into the SYN."""
    with make_socket() as one:
        one.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        one.connect(there())
        return ask(one)


def _fastopen_in_a_ring() -> bytes:
    ring = Ring()
    with make_socket() as one:
        try:
            ring.send(one.fileno(), REQUEST, packed(), socket.MSG_FASTOPEN)
            return answer(one)
        finally:
            ring.close()


# --- UDP ------------------------------------------------------------------------------------------------------------


def _sent(send: Callable[[socket.socket], object], address: str = IPV4) -> Run:
    """A way that sends one datagram on a new socket."""

    def attack() -> bytes:
        with make_socket(address, socket.SOCK_DGRAM) as one:
            send(one)
            return answer(one)

    return as_attacker(attack)


def _connected_elsewhere() -> bytes:
    """Connects to an open address, sends to the locked one; a second socket on the same port receives the answer."""
    with make_socket(kind=socket.SOCK_DGRAM) as waiting, make_socket(kind=socket.SOCK_DGRAM) as one:
        for each in (waiting, one):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        waiting.bind(("0.0.0.0", 0))
        one.bind(waiting.getsockname())
        one.connect((OPEN4, 9))
        one.sendmsg([b"?"], [], 0, there())
        return answer(waiting)


def _two_at_once(one: socket.socket) -> None:
    """Sends two datagrams by sendmmsg(2), the first to an open address where nobody listens."""
    pairs = [(packed(OPEN4, 9), b"?"), (packed(), b"?")]
    vectors = [_Vector(payload, len(payload)) for _, payload in pairs]
    headers = (_MessageHeader * 2)(
        *(_MessageHeader(name, len(name), ctypes.addressof(vector), 1) for (name, _), vector in zip(pairs, vectors))
    )
    _checked(_libc.sendmmsg(one.fileno(), headers, 2, 0), "sendmmsg")


def _corked(one: socket.socket) -> None:
    """Starts a corked datagram to an open address and finishes it to the locked one."""
    one.sendto(b"?", socket.MSG_MORE, (OPEN4, 9))
    one.sendto(b"?", there())
    one.sendto(b"?", there())


def _unspecified_family(one: socket.socket) -> None:
    """Sends to an address of family AF_UNSPEC, which is AF_INET to the kernel (udp_sendmsg() in net/ipv4/udp.c)."""
    to = struct.pack("=H", socket.AF_UNSPEC) + packed()[2:]
    _checked(_libc.sendto(one.fileno(), b"?", 1, 0, to, 16), "sendto")


def _ipv4_on_ipv6(one: socket.socket) -> None:
    _checked(_libc.sendto(one.fileno(), b"?", 1, 0, packed(), 16), "sendto")


def _in_a_ring(one: socket.socket) -> None:
    ring = Ring()
    try:
        ring.send(one.fileno(), b"?", packed())
    finally:
        ring.close()


def _connected_ipv4_on_ipv6() -> bytes:
    with make_socket(IPV6, socket.SOCK_DGRAM) as one:
        _checked(_libc.connect(one.fileno(), packed(), 16), "connect")
        return ask(one)


# --- io_uring -------------------------------------------------------------------------------------------------------


def _ring(flags: int = 0, *, sqpoll: bool = False, personality: bool = False) -> Run:
    def attack() -> bytes:
        ring = Ring(sqpoll=sqpoll)
        with make_socket() as one:
            try:
                ring.take(one.fileno(), packed(), flags, ring.register_personality() if personality else 0)
                return ask(one)
            finally:
                ring.close()

    return as_attacker(attack)


_RING = ("io_uring",)
_FASTOPEN = ("fastopen",)

ATTACKS = (
    Attack(
        "connect-tcp",
        "A TCP connect: blocking, non-blocking, repeated after a denial, after another connection ended by `AF_UNSPEC`",
        Verdict.BLOCKED,
        "Every call of `connect` is judged.",
        {
            "ipv4": Way(as_attacker(fetch)),
            "ipv6": Way(as_attacker(lambda: fetch(IPV6))),
            "non-blocking": Way(as_attacker(_nonblocking)),
            "again": Way(as_attacker(_again_and_again)),
            "after-unspec": Way(as_attacker(_elsewhere_first(socket.SOCK_STREAM))),
            "after-unspec-ipv6": Way(as_attacker(_elsewhere_first(socket.SOCK_STREAM, IPV6, OPEN6))),
        },
    ),
    Attack(
        "connect-fastopen",
        "TCP Fast Open: data in the first packet, with `sendto` in place of `connect`",
        Verdict.BLOCKED,
        "The kernel runs the connect hook for `sendto` with Fast Open, too.",
        {
            "sendto": Way(as_attacker(_fastopen_sendto), _FASTOPEN),
            "connect": Way(as_attacker(_fastopen_connect), _FASTOPEN),
            "io_uring": Way(as_attacker(_fastopen_in_a_ring), (*_FASTOPEN, *_RING)),
        },
    ),
    Attack(
        "connect-mptcp",
        "Multipath TCP",
        Verdict.BLOCKED,
        "A lock on TCP covers it.",
        {"mptcp": Way(as_attacker(lambda: fetch(IPV4, socket.SOCK_STREAM, IPPROTO_MPTCP)), ("mptcp",))},
    ),
    Attack(
        "connect-udp",
        "UDP, where a lock covers it: connected, `sendto`, `sendmsg`, `sendmmsg`, corked, an IPv4 address on an IPv6 "
        "socket, `AF_UNSPEC` as the family",
        Verdict.BLOCKED,
        "Every connect is judged, and every datagram that is sent without one.",
        {
            "connect": Way(as_attacker(lambda: fetch(IPV4, socket.SOCK_DGRAM))),
            "connect-ipv6": Way(as_attacker(lambda: fetch(IPV6, socket.SOCK_DGRAM))),
            "after-unspec": Way(as_attacker(_elsewhere_first(socket.SOCK_DGRAM))),
            "sendto": Way(_sent(lambda one: one.sendto(b"?", there()))),
            "sendto-ipv6": Way(_sent(lambda one: one.sendto(b"?", there(IPV6)), IPV6)),
            "connected-elsewhere": Way(as_attacker(_connected_elsewhere)),
            "sendmmsg": Way(_sent(_two_at_once)),
            "corked": Way(_sent(_corked)),
            "unspec-family": Way(_sent(_unspecified_family)),
            "ipv4-on-ipv6": Way(_sent(_ipv4_on_ipv6, IPV6)),
            "connected-ipv4-on-ipv6": Way(as_attacker(_connected_ipv4_on_ipv6)),
            "io_uring": Way(_sent(_in_a_ring), _RING),
        },
    ),
    Attack(
        "connect-io-uring",
        "`connect` through io_uring: by a worker or a polling thread of the kernel, or with a registered personality",
        Verdict.BLOCKED,
        "These threads run with the credentials of the task that they work for, and the hooks read those.",
        {
            "ring": Way(_ring(), _RING),
            "worker": Way(_ring(Ring.ASYNC), _RING),
            "sqpoll": Way(_ring(sqpoll=True), _RING),
            "personality": Way(_ring(personality=True), _RING),
        },
    ),
    Attack(
        "other-protocols",
        "Other protocols, such as UDP-Lite",
        Verdict.OPEN,
        "Locks cover only TCP and UDP. No metadata service uses another protocol.",
        {
            "udp-lite": Way(
                as_attacker(lambda: fetch(IPV4, socket.SOCK_DGRAM, service.IPPROTO_UDPLITE)), ("udp-lite",)
            ),
        },
    ),
)
