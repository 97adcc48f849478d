# SPDX-License-Identifier: Apache-2.0
"""Runs a function in a forked child and returns its result: for work that needs other namespaces or IDs.

No other module forks. Work that an unprivileged process can make hang belongs to abandonable.py, which forks here, too.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Callable, TypeVar

from imds_guard.errors import GuardError
from imds_guard.kernel import syscalls

T = TypeVar("T")

_LENGTH = struct.Struct("=Q")
_END_WITHIN_S = 5.0


class ChildFailed(GuardError):
    """A function in a child raised an error, or the child ended or hung before it had a result."""


def run_in_child(fn: Callable[[], T], *, timeout_s: float = 20.0) -> T:
    """Calls ``fn`` in a forked child and returns its result, which must be picklable.

    Raises the GuardError that ``fn`` raised; ChildFailed with the text of any other error, or when there is no result
    after ``timeout_s``.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0), os.fdopen(writer, "wb", buffering=0):
        pid = fork(
            lambda: send(writer, pickle.dumps((True, fn()))),
            lambda error: send(writer, pickle.dumps((False, portable(error)))),
        )
        try:
            message = _receive(reader, pid, time.monotonic() + timeout_s)
        finally:
            end(pid)
    succeeded, result = pickle.loads(message)  # noqa: S301 - written by our own child
    if not succeeded:
        raise result
    return result  # type: ignore[no-any-return]


def portable(error: BaseException) -> GuardError:
    """A GuardError as it is, since it holds nothing but its text; any other error as text with its traceback."""
    return error if isinstance(error, GuardError) else ChildFailed(_text(error))


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def fork(fn: Callable[[], object], failed: Callable[[BaseException], None] | None = None) -> int:
    """Forks a child that runs ``fn`` and exits; returns its process ID.

    ``failed`` is called with the error that ``fn`` raised; without ``failed`` the error is written to stderr. The child
    dies with its parent, unless it changes its IDs.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    return _fork(fn, failed or _write_to_stderr)


def _fork(fn: Callable[[], object], failed: Callable[[BaseException], None]) -> int:
    pid = os.fork()
    if pid == 0:
        with _Top(failed):
            _abandoned.clear()  # they are the parent's
            syscalls.die_with_parent()
            fn()
    return pid


def end(pid: int) -> None:
    """Kills and reaps a child. It may have ended already: its process ID is not reused before it is reaped.

    One that hangs in the kernel is abandoned.
    """
    abandon(pid, _END_WITHIN_S)


# --- children that may hang in the kernel ---------------------------------------------------------------------------

_is_detached = False
_abandoned: list[int] = []
"""Children that were killed and had not ended. A zombie keeps its process ID until it is reaped."""


def fork_detached(fn: Callable[[], object], keep: Sequence[int]) -> int:
    """Forks a child that runs ``fn`` and holds nothing of its parent but the descriptors ``keep`` (and its memory).

    In state D it outlives its parent. A lock, a pin or the terminal that it held would then be held for good.
    """

    def detached() -> None:
        _detach(frozenset(keep))
        fn()

    return _fork(detached, lambda error: None)


def is_detached() -> bool:
    """True in a child of fork_detached()."""
    return _is_detached


def require_detached() -> None:
    """Raises ChildFailed unless this process is a child of fork_detached(): what may hang is done there alone."""
    if not _is_detached:
        raise ChildFailed("something that may hang was called outside a child that can be abandoned")


def _detach(keep: frozenset[int]) -> None:
    """Its parent decides what a signal from the terminal means. Standard input, output and errors become /dev/null."""
    global _is_detached  # noqa: PLW0603
    _is_detached = True
    signal.set_wakeup_fd(-1)
    for number, action in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, action)
    os.chdir("/")
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            with suppress(OSError):  # the one that listed them is closed
                os.close(int(name))
    with suppress(OSError):  # nothing writes there, but a file must not get these numbers
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(fd)


def abandon(pid: int, within_s: float = 0.1) -> None:
    """Kills a child, and reaps it if it ends within ``within_s``; otherwise a later call does, or init.

    Nobody can wait for a process in state D, and SIGKILL does not end it.
    """
    os.kill(pid, signal.SIGKILL)
    child = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(child, select.POLLIN)
        poll.poll(within_s * 1000)
    finally:
        os.close(child)
    _abandoned.append(pid)
    abandoned()


def abandoned() -> int:
    """How many killed children have not ended. Reaps those that have."""
    _abandoned[:] = [pid for pid in _abandoned if not _reaped(pid)]
    return len(_abandoned)


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True  # SIGCHLD is ignored


class _Top:
    """The outermost frame of a child: it reports any error and exits; a child must never run its parent's code."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._failed(error)
        finally:
            os._exit(0 if error is None else 1)


def _write_to_stderr(error: BaseException) -> None:
    with suppress(OSError):  # standard error may be closed or full
        os.write(2, _text(error).encode())


def send(fd: int, message: bytes) -> None:
    """Writes a message behind its length."""
    rest = memoryview(_LENGTH.pack(len(message)) + message)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _receive(fd: int, pid: int, deadline: float) -> bytes:
    """The message of child ``pid``. It begins with its length, since a grandchild may hold the pipe open."""
    child = os.pidfd_open(pid)
    try:
        (size,) = _LENGTH.unpack(_read_exactly(fd, child, _LENGTH.size, deadline))
        return _read_exactly(fd, child, size, deadline)
    finally:
        os.close(child)


def _read_exactly(fd: int, child: int, size: int, deadline: float) -> bytes:
    """Reads ``size`` bytes. The pipe is read first: it still holds what the child wrote before it ended."""
    chunks, poll = b"", select.poll()  # select(2) can't wait for a descriptor above 1023
    poll.register(fd, select.POLLIN)
    poll.register(child, select.POLLIN)
    while len(chunks) < size:
        ready = [one for one, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
        if fd in ready:
            chunks += os.read(fd, size - len(chunks))
        elif child in ready:
            raise ChildFailed("a child ended before it had a result; it was killed, or left by os._exit()")
        else:
            raise ChildFailed("a child had no result before its deadline and was killed")
    return chunks
