# SPDX-License-Identifier: Apache-2.0
"""Attacks by sockets and credentials that belong to another process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from typing import Callable

from imds_guard.kernel.credentials import become
from imds_guard.kernel.syscall_numbers import syscall_number
from tests.adversary.model import Attack, Verdict, Way
from tests.adversary.privileges import CAP_SYS_PTRACE, become_user
from tests.adversary.rings import Ring
from tests.adversary.scene import (
    ALLOWED,
    ALLOWED_GID,
    ATTACKER,
    ATTACKER_GID,
    IPV4,
    OPEN4,
    WAIT_S,
    alongside,
    as_root,
    by_attacker,
)
from tests.adversary.talk import ask, connected, make_socket, packed, set_timeouts, there

_libc = ctypes.CDLL(None, use_errno=True)

Prepare = Callable[[], socket.socket]


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# --- sockets of others ------------------------------------------------------------------------------------------------


def _not_connected() -> socket.socket:
    return make_socket()


@contextlib.contextmanager
def _giver(prepare: Prepare) -> Iterator[tuple[int, socket.socket]]:
    """An allowed process with a prepared socket: its PID, and a channel to ask for the socket."""
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
    set_timeouts(one)
    if connect:
        one.connect(there())
    return ask(one)


def _passed(prepare: Prepare, connect: bool) -> Callable[[], bytes]:
    """Receives the socket by SCM_RIGHTS (unix(7))."""

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
    """Takes the socket by pidfd_getfd(2), which needs the permission to trace the process."""

    def attack() -> bytes:
        with _giver(prepare) as (pid, channel):
            number = struct.unpack("=i", channel.recv(4))[0]
            return by_attacker(lambda: take(pid, number), CAP_SYS_PTRACE)

    def take(pid: int, number: int) -> bytes:
        process = os.pidfd_open(pid)
        with socket.socket(
            fileno=_checked(_libc.syscall(syscall_number("pidfd_getfd"), process, number, 0), "pidfd_getfd")
        ) as one:
            os.close(process)
            return _use(one, connect)

    return attack


_ASK_ON_3 = "printf '%s\\r\\n\\r\\n' 'GET /' >&3; read -r -t 3 -u 3 line; echo \"$line\""


def _inherited() -> bytes:
    """An allowed process connects, changes its user ID and calls execve(2)."""
    become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ALLOWED, ALLOWED, 0))
    with connected() as one:
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
    """An allowed process registers its credentials in an io_uring (io_uring_register(2)) and changes its user ID."""
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
    """A program of an allowed user. On request it connects to the address in its memory and stores the answer."""
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
    """Writes the locked address into an allowed process and reads the answer from it (process_vm_writev(2))."""
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


ATTACKS = (
    Attack(
        "handed-over-connected",
        "A connection, or its own credentials, that an allowed process hands over: `SCM_RIGHTS`, `execve`, "
        "`pidfd_getfd` by a tracer, a personality in a ring of io_uring",
        Verdict.OPEN,
        "An allowed process may pass on what it has. Nothing is judged again.",
        {
            "scm-rights": Way(as_root(_passed(connected, connect=False))),
            "pidfd-getfd": Way(as_root(_taken(connected, connect=False))),
            "exec": Way(as_root(_inherited)),
            "personality": Way(as_root(_accepted_personality), ("io_uring",)),
        },
    ),
    Attack(
        "handed-over",
        "A socket of an allowed process that is handed over before it is connected",
        Verdict.BLOCKED,
        "The process that connects is judged, not the one that made the socket.",
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
        "A process that can write into the memory of an allowed process can make it do anything.",
        {"memory": Way(as_root(_traced))},
    ),
)
