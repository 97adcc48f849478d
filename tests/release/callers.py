# SPDX-License-Identifier: Apache-2.0
"""Processes that connect again and again, or talk over one open connection, and count in shared memory."""

from __future__ import annotations

import mmap
import os
import select
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Callable, NamedTuple

from imds_guard.kernel import listeners
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from tests.command import MAPPED, SERVICE, SERVICE_V6

OLD, NEW, BOTH, STRANGER = 41_101, 41_102, 41_103, 41_104
"""User IDs: allowed by the first policy alone, by the second alone, by both, by neither."""
_GROUP = 51_101

CONNECT_PORT, TALK_PORT = 80, 81
"""Datagrams of the callers that connect must not push those of an open connection out of the service's queue."""
_BACKLOG = 4096  # net.core.somaxconn

_MAX_ROUNDS = 300_000
_MAX_MESSAGES = 100_000
_PAUSE_S = 0.001
_ROUNDS = 20
_STANDS_STILL_S = 60.0
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER 0: no TIME_WAIT, so the local ports never run out
_NICE = 10  # on two processors the command under test would come last


class Way(NamedTuple):
    """One kind of connect: each hook has at least one."""

    name: str
    address: str
    kind: socket.SocketKind


WAYS = (
    Way("TCP, IPv4", SERVICE, socket.SOCK_STREAM),
    Way("TCP, IPv6", SERVICE_V6, socket.SOCK_STREAM),
    Way("TCP, mapped", MAPPED, socket.SOCK_STREAM),
    Way("UDP, IPv4", SERVICE, socket.SOCK_DGRAM),
    Way("UDP, IPv6", SERVICE_V6, socket.SOCK_DGRAM),
)


class Counts(NamedTuple):
    """What became of the connects of one caller by one way."""

    connected: int = 0
    denied: int = 0
    cut_off: int = 0
    """Judged by the first policy, and cut off as the second came: no answer, or the socket was destroyed."""
    failed: int = 0
    """Any other error."""
    changes: int = 0
    """How often the verdict was another one than that of the connect before."""
    errno: int = 0
    """The last error that was counted under ``failed``."""


_COUNTS = struct.Struct("=6Q")


class _Shared:
    """Numbers that a child writes and its parent reads. The parent can wait for the next ones."""

    def __init__(self, layout: struct.Struct, rows: int) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._layout = layout
        self._rows = rows
        self._written, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self._written)
        os.close(self._writer)

    def write(self, row: int, numbers: Sequence[int]) -> None:
        at = row * self._layout.size
        self._memory[at : at + self._layout.size] = self._layout.pack(*numbers)
        with suppress(BlockingIOError):  # the pipe is full: it tells already that there is something new
            os.write(self._writer, b"!")

    def wait_until(self, reached: Callable[[], bool], describe: Callable[[], object]) -> None:
        """Returns when ``reached()``, which is asked after each write."""
        deadline = time.monotonic() + _STANDS_STILL_S
        while not reached():
            left = deadline - time.monotonic()
            assert left > 0, f"nothing moves any more: {describe()}"
            if select.select([self._written], [], [], left)[0]:
                os.read(self._written, mmap.PAGESIZE)

    def read(self) -> list[tuple[int, ...]]:
        return [self._layout.unpack_from(self._memory, row * self._layout.size) for row in range(self._rows)]


# --- callers that connect again and again ---------------------------------------------------------------------------


class Caller:
    """A process of one user that connects by every way in turn, at most ``_MAX_ROUNDS`` times; killed with its sandbox.

    A caller whose verdict changes does not wait long for an answer that will not come.
    """

    def __init__(self, sandbox: Sandbox, user: int) -> None:
        self._shared = _Shared(_COUNTS, len(WAYS))
        patience_s = 20.0 if user in (BOTH, STRANGER) else 2.0
        sandbox.spawn(lambda: self._connect_forever(user, patience_s))

    def counts(self) -> dict[str, Counts]:
        """So far, by the name of the way."""
        return {way.name: Counts(*row) for way, row in zip(WAYS, self._shared.read())}

    def settle(self) -> None:
        """Returns when it has begun and ended some more rounds."""
        goal = self._rounds() + 1 + _ROUNDS
        self._shared.wait_until(lambda: self._rounds() >= goal, self.counts)

    def _rounds(self) -> int:
        """How often every way was tried."""
        return min(sum(counts[: Counts._fields.index("changes")]) for counts in self.counts().values())

    def _connect_forever(self, user: int, patience_s: float) -> None:
        become(uids=(user,) * 3, gids=(_GROUP,) * 3, groups=())
        os.nice(_NICE)
        counts = [Counts()] * len(WAYS)
        verdicts: list[str | None] = [None] * len(WAYS)
        for _ in range(_MAX_ROUNDS):
            for at, way in enumerate(WAYS):
                counts[at], verdicts[at] = _counted(counts[at], verdicts[at], _attempt(way, patience_s))
                self._shared.write(at, counts[at])


class Attempt(NamedTuple):
    """What became of one connect, or of one datagram of an unconnected socket."""

    outcome: str
    """The field of Counts that counts it."""
    errno: int = 0


def _counted(counts: Counts, verdict: str | None, attempt: Attempt) -> tuple[Counts, str | None]:
    """The counts with one more attempt, and the verdict so far."""
    counts = counts._replace(**{attempt.outcome: getattr(counts, attempt.outcome) + 1})
    if attempt.outcome == "failed":
        counts = counts._replace(errno=attempt.errno)
    if attempt.outcome not in ("connected", "denied"):
        return counts, verdict
    changed = verdict not in (None, attempt.outcome)
    return counts._replace(changes=counts.changes + changed), attempt.outcome


def _attempt(way: Way, patience_s: float) -> Attempt:
    with socket.socket(socket.AF_INET6 if ":" in way.address else socket.AF_INET, way.kind) as one:
        one.settimeout(patience_s)
        try:
            if way.kind == socket.SOCK_STREAM:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                one.connect((way.address, CONNECT_PORT))
            else:
                one.sendto(b"?", (way.address, CONNECT_PORT))
        except PermissionError:
            return Attempt("denied")
        except (socket.timeout, ConnectionAbortedError):  # the latter: SOCK_DESTROY, sock_diag(7)
            return Attempt("cut_off")
        except OSError as error:
            return Attempt("failed", error.errno or 0)
        return Attempt("connected")


def try_once(sandbox: Sandbox, user: int) -> set[str]:
    """What becomes of one connect by each way of a fresh process: fields of Counts."""

    def attempt() -> set[str]:
        become(uids=(user,) * 3, gids=(_GROUP,) * 3, groups=())
        return {_attempt(way, 10.0).outcome for way in WAYS}

    return sandbox.call(attempt, timeout_s=60)


# --- callers that talk over one open connection ---------------------------------------------------------------------


class Talk:
    """A process of one user that sends a message over one connection and waits for the answer, again and again.

    A datagram that is dropped is never answered, so over UDP not one may be lost. TCP sends again what was dropped.
    """

    def __init__(
        self, sandbox: Sandbox, user: int, address: str, kind: socket.SocketKind, patience_s: float = 10.0
    ) -> None:
        self._shared = _Shared(struct.Struct("=2Q"), 1)
        sandbox.spawn(lambda: self._talk(user, address, kind, patience_s))
        self.expect_to_go_on()

    def expect_to_go_on(self) -> None:
        """Messages are answered from now on, and not one has been lost since the beginning."""
        goal = self._counts()[0] + _ROUNDS
        self._shared.wait_until(lambda: self._counts()[0] >= goal or self._counts()[1] > 0, self._counts)
        assert self._counts()[1] == 0, self._counts()

    def expect_no_answer(self) -> None:
        """No message is answered from now on."""
        answered, lost = self._counts()
        self._shared.wait_until(lambda: self._counts()[1] > lost, self._counts)
        assert self._counts()[0] <= answered + 1, self._counts()  # one may have been under way

    def _counts(self) -> tuple[int, ...]:
        """(answered, lost) so far; a message is lost that was not sent, or not answered in time."""
        return self._shared.read()[0]

    def _talk(self, user: int, address: str, kind: socket.SocketKind, patience_s: float) -> None:
        become(uids=(user,) * 3, gids=(_GROUP,) * 3, groups=())
        answered = lost = 0
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as one:
            one.settimeout(patience_s)
            one.connect((address, TALK_PORT))
            for _ in range(_MAX_MESSAGES):
                if _answered(one):
                    answered += 1
                else:
                    lost += 1
                self._shared.write(0, (answered, lost))
                if select.select([one], [], [], _PAUSE_S)[0]:  # nothing was asked: no answer may come
                    lost += 1


def _answered(one: socket.socket) -> bool:
    try:
        one.send(b"?")
        return one.recv(1) == b"?"
    except OSError:
        return False


# --- the service ----------------------------------------------------------------------------------------------------


def serve(sandbox: Sandbox) -> None:
    """Starts a service at all addresses and ports that sends back what it gets."""
    sandbox.serve_with(_listen, _echo_forever)


def _listen() -> list[socket.socket]:
    sockets = listeners.listen((SERVICE, SERVICE_V6), (CONNECT_PORT, TALK_PORT))
    for one in sockets:
        if one.type == socket.SOCK_STREAM:
            one.listen(_BACKLOG)
    return sockets


def _echo_forever(sockets: Sequence[socket.socket]) -> None:
    selector = selectors.DefaultSelector()

    def watch(one: socket.socket, act: Callable[[socket.socket], object]) -> None:
        one.setblocking(False)
        selector.register(one, selectors.EVENT_READ, act)

    def echo(connection: socket.socket) -> None:
        try:
            message = connection.recv(65536)
            connection.sendall(message)
        except OSError:
            message = b""
        if not message:
            selector.unregister(connection)
            connection.close()

    for one in sockets:
        watch(one, (lambda one: watch(one.accept()[0], echo)) if one.type == socket.SOCK_STREAM else _echo_datagram)
    while True:
        for key, _ in selector.select():
            with suppress(OSError):
                key.data(key.fileobj)


def _echo_datagram(one: socket.socket) -> None:
    message, sender = one.recvfrom(65536)
    one.sendto(message, sender)
