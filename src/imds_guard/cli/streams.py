# SPDX-License-Identifier: Apache-2.0
"""Standard output and standard error, which may be closed, full or broken.

A command does what it was asked to do, whoever can read about it. So nothing here raises: answer_lost() says afterwards
what could not be written.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

from imds_guard.errors import AnswerLost, system_text


class Stream(io.TextIOBase):
    """Text for a file descriptor. flush() writes it with one write(2), where the system takes all of it at once.

    While this process holds a lock nothing is written that nobody takes at once: others would wait for that reader.
    """

    def __init__(self, fd: int, encoding: str) -> None:
        super().__init__()
        self._fd = fd
        self._encoding = encoding
        self._pending: list[bytes] = []
        self.reader_may_leave = True
        """False for the answer of a command that has changed something."""
        self.error: OSError | None = None
        """The first error of write(2)."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the locale. Characters that it does not have are written as escapes, like surrogates."""
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        """How str.encode() treats such characters."""
        return "backslashreplace"

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """True for a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Keeps the text until flush(). Raises TypeError for bytes, by which click tells the kind of a stream."""
        if not isinstance(text, str):
            raise TypeError("a stream of text takes no bytes")
        self.put(text.encode(self.encoding, self.errors))
        return len(text)

    def put(self, content: bytes) -> None:
        """As write(), for text that has an encoding of its own."""
        self._pending.append(content)

    def flush(self) -> None:
        """Writes what is kept. While a lock is held: what can be written without waiting for a reader."""
        content, self._pending = b"".join(self._pending), []
        try:
            rest = _write_what_fits(self._fd, content) if _is_waited_for() else _write_all(self._fd, content)
        except OSError as error:
            self.error = self.error or error
            return
        if rest:
            self._pending = [rest, *self._pending]


def is_journal(stream: TextIO) -> bool:
    """True where systemd has connected the stream to the journal (JOURNAL_STREAM in systemd.exec(5))."""
    with suppress(OSError):  # also one without a descriptor
        status = os.fstat(stream.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


def _is_waited_for() -> bool:
    """True while this process holds a lock. It can't where the module was never imported, which most commands don't."""
    lockfile = sys.modules.get("imds_guard.kernel.lockfile")
    return lockfile is not None and bool(lockfile.is_held())


def _write_what_fits(fd: int, content: bytes) -> bytes:
    """Returns the rest. Ctrl-S stops a terminal for as long as somebody likes, and the reader of a pipe may wait.

    poll(2) does not say how much a terminal takes, and others may write to it, too. So nothing here waits.
    """
    import stat  # noqa: PLC0415 -- start-up time

    mode = os.fstat(fd).st_mode
    if not (os.isatty(fd) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return _write_all(fd, content)
    try:
        while content:
            content = content[(_send if stat.S_ISSOCK(mode) else _write_by_another)(fd, content) :]
    except BlockingIOError:
        pass
    return content


def _send(fd: int, content: bytes) -> int:
    import socket  # noqa: PLC0415 -- start-up time

    with socket.socket(fileno=os.dup(fd)) as one:
        return one.send(content, socket.MSG_DONTWAIT)


def _write_by_another(fd: int, content: bytes) -> int:
    """Opens the terminal or pipe once more: whoever shares our descriptor must not find O_NONBLOCK set on it."""
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:  # no /proc, a terminal of somebody else, a pipe without a reader: it is written later
        raise BlockingIOError from error
    try:
        return os.write(own, content)
    finally:
        os.close(own)


def _write_all(fd: int, content: bytes) -> bytes:
    """Returns what is left: nothing."""
    rest = memoryview(content)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # somebody who shares the descriptor has set O_NONBLOCK
            import select  # noqa: PLC0415 -- start-up time: few descriptors are like that

            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()
    return b""


def install() -> None:
    """Puts a Stream in place of sys.stdout and sys.stderr, unless the caller of main() has put something else there.

    A stream that is closed becomes /dev/null: nobody wants to read it, and a file of ours must not get its number.
    """
    _open_what_is_closed()
    if sys.stdout is sys.__stdout__:
        sys.stdout = Stream(1, _encoding(sys.__stdout__))
    if sys.stderr is sys.__stderr__:
        sys.stderr = Stream(2, _encoding(sys.__stderr__))


def _open_what_is_closed() -> None:
    with suppress(OSError):  # without /dev/null
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)


def _encoding(stream: TextIO | None) -> str:
    return "utf-8" if stream is None else stream.encoding


def put(text: str) -> None:
    """Writes a part of the answer to standard output."""
    sys.stdout.write(text)
    sys.stdout.flush()


def put_utf8(content: bytes) -> None:
    """As put(), for a format that is UTF-8 in every locale."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.put(content)
        sys.stdout.flush()
    else:
        put(content.decode())


def flush() -> None:
    """Writes what was kept while a lock was held."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Stream):
            stream.flush()


def require_reader() -> None:
    """The answer is about a change: that nobody could read it is worth an exit status, also where the reader left."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.reader_may_leave = False


def note_error(error: OSError) -> None:
    """Something else could not write its part of the answer."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.error = sys.stdout.error or error


def answer_lost() -> AnswerLost | None:
    """The error for an answer that could not be written. A reader that left early has read what it wanted."""
    stream = sys.stdout
    if not isinstance(stream, Stream) or stream.error is None:
        return None
    if stream.error.errno == errno.EPIPE and stream.reader_may_leave:
        return None
    return AnswerLost(
        f"writing the answer to standard output: {system_text(stream.error)}; the command has done its work, and "
        "imds-guard status shows what is in force"
    )
