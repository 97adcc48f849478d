# SPDX-License-Identifier: Apache-2.0
"""Functions that run in a forked child and hand back their result: for work that needs other namespaces or IDs."""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import struct
import sys
import time
import traceback
from types import TracebackType
from typing import Callable, TypeVar

from imds_guard.errors import GuardError

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("=Q")


class ChildFailed(GuardError):
    """A function in a child raised, or the child ended or hung before it had a result."""


def run_in_child(fn: Callable[[], T], *, timeout_s: float = 20.0) -> T:
    """What ``fn`` returns in a forked child; the value must be picklable.

    Raises the GuardError that ``fn`` raised; ChildFailed with the text of any other error, or when there is no result
    after ``timeout_s``.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0), os.fdopen(writer, "wb", buffering=0):
        pid = fork(
            lambda: _send(writer, pickle.dumps((True, fn()))),
            lambda error: _send(writer, pickle.dumps((False, _portable(error)))),
        )
        try:
            message = _receive(reader, pid, time.monotonic() + timeout_s)
        finally:
            end(pid)
    done, result = pickle.loads(message)  # noqa: S301 - written by our own child
    if not done:
        raise result
    return result  # type: ignore[no-any-return]


def _portable(error: BaseException) -> GuardError:
    """An error of ours as it is: it is made of its text alone. Of any other, the text with where it was raised."""
    return error if isinstance(error, GuardError) else ChildFailed(_text(error))


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def fork(fn: Callable[[], object], failed: Callable[[BaseException], None] | None = None) -> int:
    """The process ID of a child that runs ``fn`` and exits; ``failed`` is given what it raised, else stderr its text.

    The child dies with its parent (PR_SET_PDEATHSIG in prctl(2)), unless it changes its IDs.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        with _Top(failed or _tell_stderr):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            fn()
    return pid


def end(pid: int) -> None:
    """Kills and reaps a child of ours. It may have ended: until it is reaped nobody else has its process ID."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


class _Top:
    """The very top of a child: whatever was raised is told, and the parent's stack is never returned to."""

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


def _tell_stderr(error: BaseException) -> None:
    os.write(2, _text(error).encode())


def _send(fd: int, message: bytes) -> None:
    rest = memoryview(_LENGTH.pack(len(message)) + message)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _receive(fd: int, pid: int, deadline: float) -> bytes:
    """The message of child ``pid``. The length stands in front: a grandchild may keep the pipe from ending."""
    child = os.pidfd_open(pid)
    try:
        (size,) = _LENGTH.unpack(_read_exactly(fd, child, _LENGTH.size, deadline))
        return _read_exactly(fd, child, size, deadline)
    finally:
        os.close(child)


def _read_exactly(fd: int, child: int, size: int, deadline: float) -> bytes:
    """Exactly ``size`` octets. What the child wrote before it ended is still in the pipe, so that is read first."""
    chunks = b""
    while len(chunks) < size:
        ready = select.select([fd, child], [], [], max(0.0, deadline - time.monotonic()))[0]
        if fd in ready:
            chunks += os.read(fd, size - len(chunks))
        elif child in ready:
            raise ChildFailed("a child ended before it had a result; it was killed, or left by os._exit()")
        else:
            raise ChildFailed("a child had no result before its deadline and was killed")
    return chunks
