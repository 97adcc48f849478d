# SPDX-License-Identifier: Apache-2.0
"""The socket between the watch that reads the ring buffer (the leader) and the other ones (its followers).

A follower sends one request: REQUEST_ALL or REQUEST_DENIALS. The leader sends one JSON object a line.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Callable

from imds_guard.errors import GuardError, system_text
from imds_guard.watch.event import Values
from imds_guard.watch.line_queue import LineQueue

MAX_FOLLOWERS = 16
REQUEST_ALL, REQUEST_DENIALS = b"all\n", b"denials\n"
_MAX_REQUEST_BYTES = 64
TOO_MANY = "full"
"""The only event that a follower beyond MAX_FOLLOWERS gets."""


class Follower:
    """The leader's end of one connection."""

    def __init__(self, connection: socket.socket, render: Callable[[Values], str]) -> None:
        self.connection = connection
        self.queue = LineQueue(connection.fileno(), render)
        self.wants_allowed = False

    def receive(self) -> bool:
        """Reads the request. False when the follower is gone."""
        try:
            request = self.connection.recv(_MAX_REQUEST_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if request == REQUEST_ALL:
            self.wants_allowed = True
        return bool(request)


class Followers:
    """The leader's listening socket, in a directory that only root can enter, and the connected followers."""

    def __init__(self, path: str, render: Callable[[Values], str]) -> None:
        self._path = path
        self._render = render
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self.by_fd: dict[int, Follower] = {}
        with suppress(FileNotFoundError):
            os.unlink(path)  # left by a leader that was killed: only the holder of the lock file gets here
        try:
            umask = os.umask(0o177)
            try:
                self._listener.bind(path)
            finally:
                os.umask(umask)
            self._listener.listen(MAX_FOLLOWERS)
        except OSError as error:
            self._listener.close()
            raise GuardError(f"listening for other watches at {path}: {system_text(error)}; remove it") from error

    def fileno(self) -> int:
        """Readable when a follower is waiting to be accepted."""
        return self._listener.fileno()

    def accept(self) -> None:
        """Accepts all waiting followers. One beyond MAX_FOLLOWERS is told so and disconnected."""
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            connection.setblocking(False)
            follower = Follower(connection, self._render)
            if len(self.by_fd) >= MAX_FOLLOWERS:
                follower.queue.put({"event": TOO_MANY})
                follower.queue.push()
                connection.close()
            else:
                self.by_fd[connection.fileno()] = follower

    def drop(self, fd: int) -> None:
        """Disconnects one follower."""
        self.by_fd.pop(fd).connection.close()

    @property
    def want_allowed(self) -> bool:
        """True when a follower has asked for allowed connects, too."""
        return any(follower.wants_allowed for follower in self.by_fd.values())

    def close(self) -> None:
        """Disconnects all followers. One of them becomes the next leader."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listener.close()
        for fd in list(self.by_fd):
            self.drop(fd)


class LeaderConnection:
    """The follower's end of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._partial_line = b""

    @classmethod
    def open(cls, path: str, wants_allowed: bool) -> LeaderConnection | None:
        """Connects to the leader at ``path``. None when there is none."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(path)
            connection.sendall(REQUEST_ALL if wants_allowed else REQUEST_DENIALS)
        except OSError:
            connection.close()
            return None
        return cls(connection)

    def fileno(self) -> int:
        """Readable when there are lines, or the leader is gone."""
        return self._connection.fileno()

    def read_lines(self) -> list[bytes] | None:
        """The complete lines that have arrived. None when the leader is gone."""
        try:
            received = self._connection.recv(1 << 16)
        except OSError:
            return None
        if not received:
            return None
        *lines, self._partial_line = (self._partial_line + received).split(b"\n")
        return lines

    def close(self) -> None:
        """Disconnects."""
        self._connection.close()
