# SPDX-License-Identifier: Apache-2.0
"""Lines for a reader who may be slow: nobody waits for it, and the events that it misses are counted."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from typing import Callable

from imds_guard.watch.event import Values
from imds_guard.watch.timestamps import iso_time

MAX_LINES = 2000
_CHUNK_BYTES = 4096
"""A pipe that poll(2) reports as writable takes this many bytes without blocking (PIPE_BUF in pipe(7))."""


class LineQueue:
    """A bounded queue of lines in front of a file descriptor, which may be a blocking one."""

    def __init__(self, fd: int, render: Callable[[Values], str], encoding: str = "utf-8") -> None:
        self.fd = fd
        self.error: OSError | None = None
        """Why lines could not be written, where the reader has not left."""
        self._render = render
        self._encoding = encoding
        self._lines: deque[bytes] = deque()
        self._missed: dict[str, int] = {}
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    @property
    def pending(self) -> bool:
        """True while there are lines to write."""
        return bool(self._lines)

    def register(self, poll: select.poll) -> None:
        """Adds the descriptor to ``poll``. serve() takes its result."""
        poll.register(self.fd, select.POLLOUT if self._lines else 0)

    def serve(self, ready: dict[int, int]) -> bool:
        """Writes what can be written without blocking. False when the reader is gone."""
        return self.push() and not ready.get(self.fd, 0) & (select.POLLERR | select.POLLHUP)

    def put(self, values: Values) -> None:
        """Appends a line. When the queue is full, the event is counted and reported later by a ``gap`` event."""
        if len(self._lines) >= MAX_LINES:
            kind = "lost" if values["event"] == "lost" else "count"
            self._missed[kind] = self._missed.get(kind, 0) + int(values.get("count", 0))
            return
        self._lines.append(self._render(values).encode(self._encoding, "backslashreplace") + b"\n")

    def push(self) -> bool:
        """Writes what can be written without blocking. False when the reader is gone."""
        while self._lines:
            ready = self._poll.poll(0)
            if not ready:
                return True
            if ready[0][1] & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                return False
            line = self._lines[0]
            try:
                written = os.write(self.fd, line[:_CHUNK_BYTES])
            except BlockingIOError:
                return True
            except OSError as error:
                self.error = error
                return False
            if written == len(line):
                self._lines.popleft()
                self._put_gap()
            else:
                self._lines[0] = line[written:]
        return True

    def _put_gap(self) -> None:
        if self._missed and len(self._lines) <= MAX_LINES // 2:
            missed, self._missed = self._missed, {}
            self.put({"event": "gap", "time": iso_time(time.time()), **missed})

    def finish(self, within_s: float) -> None:
        """Writes the remaining lines, and stops when the reader is gone or has not read them in time."""
        deadline = time.monotonic() + within_s
        while self.push() and self.pending:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._poll.poll(left_s * 1000):
                return
