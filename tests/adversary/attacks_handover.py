# SPDX-License-Identifier: Apache-2.0
"""Sockets and identities that were somebody else's, or another time's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
from typing import Callable, Iterator, Tuple

from imds_guard.kernel.credentials import become
from tests.adversary.model import Attack, Run, Verdict, Way
from tests.adversary.privileges import CAP_SYS_PTRACE, become_user
from tests.adversary.rings import Ring
from tests.adversary.scene import (
    ALLOWED,
    ALLOWED_GID,
    ATTACKER,
    ATTACKER_GID,
    ATTACKER_TOO,
    ELSEWHERE,
    IPV4,
    IPV6,
    OPEN4,
    USUAL,
    WAIT_S,
    alongside,
    as_root,
    by_attacker,
)
from tests.adversary.talk import ask, make_socket, packed, patient, there
from tests.conformance.attempts import TCP_FASTOPEN_CONNECT

_libc = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438  # pidfd_getfd(2), the same on every architecture but alpha

Pause = Callable[[], None]
Prepare = Callable[[], socket.socket]


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# --- sockets from before ----------------------------------------------------------------------------------------------


def _connected() -> socket.socket:
    one = make_socket()
    one.connect(there())
    return one


def _kept_alive() -> socket.socket:
    """A connection that has been used, as an SDK keeps one."""
    one = _connected()
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


def _used_afterwards(prepare: Prepare, first: object, then: object) -> Run:
    """The socket is made under the first policy and used under the second."""

    def attack(pause: Pause) -> bytes:
        with prepare() as one:
            pause()
            return ask(one)

    return lambda scene: scene.across_a_change(first, then, attack)  # type: ignore[arg-type]


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


# --- sockets of others ------------------------------------------------------------------------------------------------


def _not_connected() -> socket.socket:
    return make_socket()


@contextlib.contextmanager
def _giver(prepare: Prepare) -> Iterator[Tuple[int, socket.socket]]:
    """An allowed process that has prepared a socket: its process ID, and a channel on which it is asked for it."""
    ours, theirs = socket.socketpair()

    def give() -> None:
        ours.close()
        become_user(ALLOWED, ALLOWED_GID)
        with prepare() as one:
            theirs.send(struct.pack("=i", one.fileno()))
            theirs.recv(1)
            socket.send_fds(theirs, [b"."], [one.fileno()])
            theirs.recv(1)

    ours.settimeout(WAIT_S)
    with ours, alongside(give) as pid:
        theirs.close()
        yield pid, ours


def _use(one: socket.socket, connect: bool) -> bytes:
    patient(one)
    if connect:
        one.connect(there())
    return ask(one)


def _passed(prepare: Prepare, connect: bool) -> Callable[[], bytes]:
    """By SCM_RIGHTS (unix(7))."""

    def attack() -> bytes:
        with _giver(prepare) as (_, channel):
            channel.recv(4)
            return by_attacker(lambda: take(channel))

    def take(channel: socket.socket) -> bytes:
        channel.send(b".")
        (fd,) = socket.recv_fds(channel, 1, 1)[1]
        with socket.socket(fileno=fd) as one:
            return _use(one, connect)

    return attack


def _taken(prepare: Prepare, connect: bool) -> Callable[[], bytes]:
    """By pidfd_getfd(2), which asks for the right to trace the process."""

    def attack() -> bytes:
        with _giver(prepare) as (pid, channel):
            number = struct.unpack("=i", channel.recv(4))[0]
            return by_attacker(lambda: take(pid, number), CAP_SYS_PTRACE)

    def take(pid: int, number: int) -> bytes:
        process = os.pidfd_open(pid)
        with socket.socket(fileno=_checked(_libc.syscall(_PIDFD_GETFD, process, number, 0), "pidfd_getfd")) as one:
            os.close(process)
            return _use(one, connect)

    return attack


_ASK_ON_3 = "printf '%s\\r\\n\\r\\n' 'GET /' >&3; read -r -t 3 -u 3 line; echo \"$line\""


def _inherited() -> bytes:
    """An allowed process connects, then becomes somebody else and another program (execve(2))."""
    become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ALLOWED, ALLOWED, 0))
    with _connected() as one:
        become(uids=(ALLOWED, 0, 0))
        os.dup2(one.fileno(), 3)
        done = subprocess.run(
            ["/bin/bash", "-c", _ASK_ON_3],
            pass_fds=[3],
            stdout=subprocess.PIPE,
            check=False,
            user=ATTACKER,
            group=ATTACKER_GID,
            extra_groups=[],
        )
    return done.stdout.strip()


def _inherited_not_connected() -> bytes:
    become(groups=(), gids=(ALLOWED_GID,) * 3, uids=(ALLOWED, ALLOWED, 0))
    with make_socket() as one:
        become(uids=(ALLOWED, 0, 0))
        become_user(ATTACKER, ATTACKER_GID)
        one.connect(there())
        return ask(one)


def _accepted_personality() -> bytes:
    """An allowed process leaves its credentials in a ring and becomes somebody else (io_uring_register(2))."""
    become(groups=(), gids=(ALLOWED_GID,) * 3, uids=(ALLOWED, ALLOWED, 0))
    ring = Ring()
    personality = ring.register_personality()
    become(uids=(ALLOWED, 0, 0))
    become_user(ATTACKER, ATTACKER_GID)
    with make_socket() as one:
        try:
            ring.take(one.fileno(), packed(), 0, personality)
            return ask(one)
        finally:
            ring.close()


# --- tracing --------------------------------------------------------------------------------------------------------

_TARGET, _ANSWER, _OCTETS = 0, 64, 128


def _honest_program(memory: ctypes.Array[ctypes.c_char], channel: socket.socket) -> None:
    """Of an allowed user: connects to the address in its memory when told so, and keeps the answer there."""
    become_user(ALLOWED, ALLOWED_GID)
    channel.recv(1)
    with make_socket() as one:
        host = ctypes.string_at(ctypes.addressof(memory) + _TARGET).decode()
        one.connect(there(host))
        line = ask(one)
    ctypes.memmove(ctypes.addressof(memory) + _ANSWER, line, len(line))
    channel.send(b".")
    channel.recv(1)


class _Vector(ctypes.Structure):
    """struct iovec (readv(2))."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def _traced() -> bytes:
    """Writes another address into an allowed process and reads the answer out of it (process_vm_writev(2))."""
    memory = ctypes.create_string_buffer(OPEN4.encode(), _OCTETS)
    ours, theirs = socket.socketpair()
    with ours, theirs, alongside(lambda: _honest_program(memory, theirs)) as pid:
        return by_attacker(lambda: _trace(pid, ctypes.addressof(memory), ours), CAP_SYS_PTRACE)


def _trace(pid: int, there: int, channel: socket.socket) -> bytes:
    address = IPV4.encode() + b"\0"
    own = ctypes.create_string_buffer(address, len(address))
    here, away = _Vector(ctypes.addressof(own), len(address)), _Vector(there + _TARGET, len(address))
    _checked(_libc.process_vm_writev(pid, ctypes.byref(here), 1, ctypes.byref(away), 1, 0), "process_vm_writev")
    channel.settimeout(WAIT_S)
    channel.send(b".")
    channel.recv(1)
    found = ctypes.create_string_buffer(_OCTETS - _ANSWER)
    here, away = _Vector(ctypes.addressof(found), len(found)), _Vector(there + _ANSWER, len(found))
    _checked(_libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(away), 1, 0), "process_vm_readv")
    return found.value


_FROM_BEFORE = {
    "tcp": Way(_used_afterwards(_connected, ELSEWHERE, USUAL)),
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
        "connection-before",
        "A connection that was open before the lock",
        Verdict.STRICT,
        "Nobody approved its socket.",
        _FROM_BEFORE,
    ),
    Attack(
        "connection-revoked",
        "A kept-alive connection of a user who was allowed when it was opened, and no longer is (`revoke`)",
        Verdict.STRICT,
        "What its socket was approved for is asked again with every packet.",
        {
            "tcp": Way(_used_afterwards(_kept_alive, ATTACKER_TOO, USUAL)),
            "udp": Way(_used_afterwards(_connected_udp, ATTACKER_TOO, USUAL)),
        },
    ),
    Attack(
        "handed-over-connected",
        "A connection, or its own credentials, that an allowed process hands over: `SCM_RIGHTS`, `execve`, "
        "`pidfd_getfd` by a tracer, a personality in a ring of io_uring",
        Verdict.OPEN,
        "It was the allowed process's to give away.",
        {
            "scm-rights": Way(as_root(_passed(_connected, connect=False))),
            "pidfd-getfd": Way(as_root(_taken(_connected, connect=False))),
            "exec": Way(as_root(_inherited)),
            "personality": Way(as_root(_accepted_personality), ("io_uring",)),
        },
    ),
    Attack(
        "handed-over",
        "A socket of an allowed process, handed over before it was connected",
        Verdict.BLOCKED,
        "Who connects is judged.",
        {
            "scm-rights": Way(as_root(_passed(_not_connected, connect=True))),
            "pidfd-getfd": Way(as_root(_taken(_not_connected, connect=True))),
            "exec": Way(as_root(_inherited_not_connected)),
        },
    ),
    Attack(
        "ptrace",
        "Tracing an allowed process (the same user may, and `CAP_SYS_PTRACE`)",
        Verdict.OPEN,
        "Whoever may write into an allowed process is that process.",
        {"memory": Way(as_root(_traced))},
    ),
)
