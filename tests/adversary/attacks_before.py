# SPDX-License-Identifier: Apache-2.0
"""Attacks by sockets and connections that are older than the lock, or than the current allowlist."""

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
    """Opens and uses a connection before the change, and uses it again afterwards, as an SDK does."""
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
    """Calls connect(2) before the change; data is first sent afterwards (TCP_FASTOPEN_CONNECT in tcp(7))."""
    one = make_socket()
    one.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    one.connect(there())
    return one


def _used_afterwards(prepare: Prepare, first: Policy, then: Policy) -> Run:
    """Makes a socket under the first policy and uses it under the second."""

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
    """Makes an io_uring with a polling thread before the change, and requests the connect afterwards."""
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
        "A socket or an io_uring that was made before the lock and connects afterwards",
        Verdict.BLOCKED,
        "The hooks judge the connect, whenever the socket was made.",
        {
            "socket": Way(lambda scene: scene.across_a_change(ELSEWHERE, USUAL, _connected_afterwards)),
            "ring": Way(lambda scene: scene.across_a_change(ELSEWHERE, USUAL, _ring_from_before), ("io_uring",)),
        },
    ),
    Attack(
        "connection-cut",
        "A connection that was opened before `start`, or before `revoke` removed its user",
        Verdict.BLOCKED,
        "Both commands find such connections and cut them.",
        test="kernel/test_connections.py",
    ),
    Attack(
        "connection-before",
        "A connection from before `start` that is not cut: with `--keep-existing`, or where the kernel can't cut",
        Verdict.STRICT,
        "No hook has approved its socket, so its packets are dropped.",
        _FROM_BEFORE,
    ),
    Attack(
        "connection-revoked",
        "A connection that is kept alive and not cut, of a user who was allowed when it was opened and no longer is",
        Verdict.STRICT,
        "Every packet is checked: the reason for which its socket was approved must still be valid.",
        {
            "tcp": Way(_used_afterwards(_kept_alive, ATTACKER_TOO, USUAL)),
            "udp": Way(_used_afterwards(_connected_udp, ATTACKER_TOO, USUAL)),
        },
    ),
)
