# SPDX-License-Identifier: Apache-2.0
"""Lines on their way to a reader who may be slow: nobody waits for it, and what it misses is counted."""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from contextlib import suppress
from typing import Callable

from imds_guard.errors import GuardError, system_text
from imds_guard.watch.event import Values
from imds_guard.watch.process_info import iso_time

MOST_LINES = 2000
MOST_FOLLOWERS = 16
_PIECE = 4096
"""A pipe that poll(2) calls writable takes so many octets without a wait (PIPE_BUF in pipe(7))."""
ALL, DENIALS = b"all\n", b"denials\n"
"""What a follower says first."""
FULL = "full"


class Outlet:
    """A bounded queue of lines before a file descriptor, which may be a blocking one."""

    def __init__(self, fd: int, render: Callable[[Values], str]) -> None:
        self.fd = fd
        self._render = render
        self._lines: deque[bytes] = deque()
        self._missed: dict[str, int] = {}
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    @property
    def pending(self) -> bool:
        """True while something waits to be written."""
        return bool(self._lines)

    def put(self, values: Values) -> None:
        """Takes a line, or counts it as missed: ``gap`` tells the number once there is room again."""
        if len(self._lines) >= MOST_LINES:
            kind = "lost" if values["event"] == "lost" else "count"
            self._missed[kind] = self._missed.get(kind, 0) + int(values.get("count", 0))
            return
        self._lines.append(self._render(values).encode() + b"\n")

    def push(self) -> bool:
        """Writes what can be written without a wait; False when nobody reads any more."""
        while self._lines:
            ready = self._poll.poll(0)
            if not ready:
                return True
            if ready[0][1] & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                return False
            line = self._lines[0]
            try:
                done = os.write(self.fd, line[:_PIECE])
            except BlockingIOError:
                return True
            except OSError:
                return False
            if done == len(line):
                self._lines.popleft()
                self._tell_gap()
            else:
                self._lines[0] = line[done:]
        return True

    def _tell_gap(self) -> None:
        if self._missed and len(self._lines) <= MOST_LINES // 2:
            missed, self._missed = self._missed, {}
            self.put({"event": "gap", "time": iso_time(time.time()), **missed})

    def finish(self, within_s: float) -> None:
        """Writes the rest, as far as the reader takes it in time."""
        deadline = time.monotonic() + within_s
        while self.push() and self.pending:
            left = deadline - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1000):
                return


# --- followers ------------------------------------------------------------------------------------------------------


class Follower:
    """Another watch, which prints what this one reads."""

    def __init__(self, connection: socket.socket, render: Callable[[Values], str]) -> None:
        self.connection = connection
        self.outlet = Outlet(connection.fileno(), render)
        self.wants_allowed = False

    def listen(self) -> bool:
        """Takes in what it says; False when it is gone."""
        try:
            said = self.connection.recv(64)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if said == ALL:
            self.wants_allowed = True
        return bool(said)


class Followers:
    """The socket that followers come to, in a folder that only root can enter, and those who came."""

    def __init__(self, path: str, render: Callable[[Values], str]) -> None:
        self._path = path
        self._render = render
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self.by_fd: dict[int, Follower] = {}
        with suppress(FileNotFoundError):
            os.unlink(path)  # of one that was killed: who holds the lock may
        try:
            before = os.umask(0o177)
            try:
                self._listening.bind(path)
            finally:
                os.umask(before)
            self._listening.listen(MOST_FOLLOWERS)
        except OSError as error:
            self._listening.close()
            raise GuardError(f"listening for other watches at {path}: {system_text(error)}; remove it") from error

    def fileno(self) -> int:
        """Readable when somebody came."""
        return self._listening.fileno()

    def accept(self) -> None:
        """Takes in whoever came; one too many is told so."""
        while True:
            try:
                connection = self._listening.accept()[0]
            except OSError:
                return
            connection.setblocking(False)
            follower = Follower(connection, self._render)
            if len(self.by_fd) >= MOST_FOLLOWERS:
                follower.outlet.put({"event": FULL})
                follower.outlet.push()
                connection.close()
            else:
                self.by_fd[connection.fileno()] = follower

    def drop(self, fd: int) -> None:
        """Forgets one."""
        self.by_fd.pop(fd).connection.close()

    @property
    def want_allowed(self) -> bool:
        """True when one of them asked for what is let through, too."""
        return any(follower.wants_allowed for follower in self.by_fd.values())

    def close(self) -> None:
        """Each follower sees it, and one of them takes over."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listening.close()
        for fd in list(self.by_fd):
            self.drop(fd)


class Lead:
    """The other end: what the watch that reads the ring buffer says to a follower."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    @classmethod
    def find(cls, path: str, wants_allowed: bool) -> Lead | None:
        """None when nobody listens there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(path)
            connection.sendall(ALL if wants_allowed else DENIALS)
        except OSError:
            connection.close()
            return None
        return cls(connection)

    def fileno(self) -> int:
        """Readable when it said something, or is gone."""
        return self._connection.fileno()

    def read(self) -> list[bytes] | None:
        """Whole lines; None when it is gone."""
        try:
            said = self._connection.recv(1 << 16)
        except OSError:
            return None
        if not said:
            return None
        *lines, self._rest = (self._rest + said).split(b"\n")
        return lines

    def close(self) -> None:
        """Leaves."""
        self._connection.close()
