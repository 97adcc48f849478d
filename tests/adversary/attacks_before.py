# SPDX-License-Identifier: Apache-2.0
"""Attacks by sockets and connections that are older than the lock, or than the current allowlist."""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import Callable

from imds_guard.policy.model import Policy
from tests.adversary.model import Attack, Run, Verdict, Way
from tests.adversary.rings import Ring
from tests.adversary.scene import ATTACKER_TOO, ELSEWHERE, IPV6, OPEN4, USUAL, as_attacker
from tests.adversary.talk import REQUEST, answer, ask, connected, make_socket, packed, set_timeouts, there
from tests.conformance.attempts import TCP_FASTOPEN_CONNECT

_libc = ctypes.CDLL(None, use_errno=True)
_UDP_CORK = 1  # include/uapi/linux/udp.h

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


def _corked() -> socket.socket:
    """A datagram that was begun before (MSG_MORE in send(2)): its address is settled."""
    one = make_socket(kind=socket.SOCK_DGRAM)
    one.sendto(REQUEST, socket.MSG_MORE, there())
    return one


def _connected_corked() -> socket.socket:
    one = _connected_udp()
    one.send(REQUEST, socket.MSG_MORE)
    return one


def _sent_afterwards(prepare: Prepare) -> Run:
    """The datagram leaves when the cork is taken off (UDP_CORK in udp(7)). No hook sees that."""

    def attack(pause: Pause) -> bytes:
        with prepare() as one:
            pause()
            for corked in (1, 0):
                one.setsockopt(socket.IPPROTO_UDP, _UDP_CORK, corked)
            return answer(one)

    return lambda scene: scene.across_a_change(ELSEWHERE, USUAL, attack)


def _beside_a_listener(pause: Pause) -> bytes:
    """A connection from before, with a listener on its own port, as if the peer had made it."""
    with make_socket() as one, make_socket() as listening:
        for each in (one, listening):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.connect(there())
        pause()
        listening.bind(one.getsockname())
        listening.listen(1)
        return ask(one)


def _accepted_and_used_again() -> bytes:
    """A socket that accept() has made is disconnected, and connects (AF_UNSPEC in connect(2))."""
    with make_socket(OPEN4) as listening, make_socket(OPEN4) as peer:
        listening.bind((OPEN4, 0))
        listening.listen(1)
        peer.connect(listening.getsockname())
        one = listening.accept()[0]
    with one:
        set_timeouts(one)
        one.recv(1)
        unspecified = struct.pack("=H14x", socket.AF_UNSPEC)
        _libc.connect(one.fileno(), unspecified, len(unspecified))
        one.connect(there())
        return ask(one)


_FROM_BEFORE = {
    "tcp": Way(_used_afterwards(connected, ELSEWHERE, USUAL)),
    "tcp-ipv6": Way(_used_afterwards(_connected_ipv6, ELSEWHERE, USUAL)),
    "udp": Way(_used_afterwards(_connected_udp, ELSEWHERE, USUAL)),
    "fastopen": Way(_used_afterwards(_begun_fastopen, ELSEWHERE, USUAL), ("fastopen",)),
    "beside-a-listener": Way(lambda scene: scene.across_a_change(ELSEWHERE, USUAL, _beside_a_listener)),
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
        "socket-accepted",
        "A socket of a connection that others made to the attacker, which `--strict` lets answer, is disconnected and "
        "connects",
        Verdict.BLOCKED,
        "The hooks judge the connect. What `--strict` knows of the socket is good for that one connection.",
        {"reused": Way(as_attacker(_accepted_and_used_again))},
    ),
    Attack(
        "connection-cut",
        "A connection that was opened before `start`, or before `revoke` removed its user",
        Verdict.BLOCKED,
        "Both commands find such connections and cut them.",
        test="kernel/test_connections.py",
    ),
    Attack(
        "connection-hidden",
        "A connection from before whose maker hides: a set-user-ID program is the only holder, a copy is in the queue "
        "of a Unix socket",
        Verdict.BLOCKED,
        "The user who made the socket is judged, too, where no holder runs as that user.",
        test="kernel/test_connection_tricks.py",
    ),
    Attack(
        "connection-disguised",
        "A connection from before to a port above 1023, with a listener at its own port, as if its peer had made it",
        Verdict.BLOCKED,
        "The kernel's counters tell who has sent the SYN. Where they don't, the connection is cut.",
        test="kernel/test_connection_tricks.py",
    ),
    Attack(
        "connection-held",
        "A connection from before whose socket is locked by a `send` that does not end (a FUSE server that does not "
        "answer), so that the kernel can't cut it",
        Verdict.STRICT,
        "It is cut as soon as the kernel gets the lock of the socket, but other calls may have queued for that lock "
        "before. The command ends in time and names the connection; all others are cut. Before Linux 6.9 no command "
        "can list connections from then on, until the socket is let go: others from before a later change stay open.",
        test="kernel/test_held_connections.py",
    ),
    Attack(
        "connection-in-progress",
        "A connect that is past the hook and has no port yet while the policy changes, on a CPU that never gets to it",
        Verdict.STRICT,
        "Nobody can see such a socket. Two searches follow the change, and one each `verify --repair`: it is cut then.",
        test="kernel/test_connection_search.py",
    ),
    Attack(
        "datagram-corked",
        "A UDP datagram that was begun before the lock (`MSG_MORE`, `UDP_CORK`) and leaves afterwards",
        Verdict.STRICT,
        "No hook sees it leave, and cutting the socket does not drop it.",
        {
            "unconnected": Way(_sent_afterwards(_corked)),
            "connected": Way(_sent_afterwards(_connected_corked)),
        },
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
