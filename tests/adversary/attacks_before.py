# SPDX-License-Identifier: Apache-2.0
"""Sockets and connections that are older than the lock, or than the list of who is allowed."""

from __future__ import annotations

import socket
from typing import Callable

from imds_guard.policy.model import Policy
from tests.adversary.model import Attack, Run, Verdict, Way
from tests.adversary.rings import Ring
from tests.adversary.scene import ATTACKER_TOO, ELSEWHERE, IPV6, OPEN4, USUAL
from tests.adversary.talk import ask, connected, make_socket, packed, there
from tests.conformance.attempts import TCP_FASTOPEN_CONNECT

Pause = Callable[[], None]
Prepare = Callable[[], socket.socket]


def _kept_alive() -> socket.socket:
    """A connection that has been used, as an SDK keeps one."""
    one = connected()
    ask(one)
    return one


def _connected_ipv6() -> socket.socket:
    one = make_socket(IPV6)
    one.connect(there(IPV6))
    ask(one)
    return one


def _connected_udp() -> socket.socket:
    one = make_socket(kind=socket.SOCK_DGRAM)
    one.connect(there())
    return one


def _begun_fastopen() -> socket.socket:
    """connect(2) was called, nothing was sent yet (TCP_FASTOPEN_CONNECT in tcp(7))."""
    one = make_socket()
    one.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    one.connect(there())
    return one


def _used_afterwards(prepare: Prepare, first: Policy, then: Policy) -> Run:
    """The socket is made under the first policy and used under the second."""

    def attack(pause: Pause) -> bytes:
        with prepare() as one:
            pause()
            return ask(one)

    return lambda scene: scene.across_a_change(first, then, attack)


def _connected_afterwards(pause: Pause) -> bytes:
    with make_socket() as one:
        one.bind((OPEN4, 0))
        pause()
        one.connect(there())
        return ask(one)


def _ring_from_before(pause: Pause) -> bytes:
    """A ring with a polling thread of its own, from before; the request comes afterwards."""
    ring = Ring(sqpoll=True)
    with make_socket() as one:
        try:
            pause()
            ring.take(one.fileno(), packed())
            return ask(one)
        finally:
            ring.close()


_FROM_BEFORE = {
    "tcp": Way(_used_afterwards(connected, ELSEWHERE, USUAL)),
    "tcp-ipv6": Way(_used_afterwards(_connected_ipv6, ELSEWHERE, USUAL)),
    "udp": Way(_used_afterwards(_connected_udp, ELSEWHERE, USUAL)),
    "fastopen": Way(_used_afterwards(_begun_fastopen, ELSEWHERE, USUAL), ("fastopen",)),
}

ATTACKS = (
    Attack(
        "socket-before",
        "A socket, or a ring of io_uring, that was made before the lock and connects behind it",
        Verdict.BLOCKED,
        "The connect is judged, not the socket.",
        {
            "socket": Way(lambda scene: scene.across_a_change(ELSEWHERE, USUAL, _connected_afterwards)),
            "ring": Way(lambda scene: scene.across_a_change(ELSEWHERE, USUAL, _ring_from_before), ("io_uring",)),
        },
    ),
    Attack(
        "connection-cut",
        "A connection that was open before `start`, or before `revoke` took the right to it away",
        Verdict.BLOCKED,
        "Both commands look for such connections and cut them.",
        test="kernel/test_connections.py",
    ),
    Attack(
        "connection-before",
        "The same when it is not cut: with `--keep-existing`, or when a kernel can't",
        Verdict.STRICT,
        "Nobody approved its socket.",
        _FROM_BEFORE,
    ),
    Attack(
        "connection-revoked",
        "A kept-alive connection that is not cut, of a user who was allowed when it was opened and no longer is",
        Verdict.STRICT,
        "What its socket was approved for is asked again with every packet.",
        {
            "tcp": Way(_used_afterwards(_kept_alive, ATTACKER_TOO, USUAL)),
            "udp": Way(_used_afterwards(_connected_udp, ATTACKER_TOO, USUAL)),
        },
    ),
)
