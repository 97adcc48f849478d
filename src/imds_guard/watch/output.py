# SPDX-License-Identifier: Apache-2.0
"""Where the leader's events go: to its own output and to its followers."""

from __future__ import annotations

import select
import time

from imds_guard.watch.event import Values
from imds_guard.watch.followers import Followers
from imds_guard.watch.line_queue import LineQueue
from imds_guard.watch.timestamps import iso_time


class Output:
    """Emits events to everyone who wants them. ``allowed`` is whether our own reader wants allowed connects, too."""

    def __init__(self, queue: LineQueue, allowed: bool, followers: Followers | None) -> None:
        self._queue = queue
        self._allowed = allowed
        self._followers = followers

    @property
    def wants_allowed(self) -> bool:
        """True when somebody wants allowed connects."""
        return self._allowed or (self._followers is not None and self._followers.want_allowed)

    def emit(self, values: Values) -> None:
        """Queues one event."""
        is_allowed = values["event"] == "allowed"
        if self._allowed or not is_allowed:
            self._queue.put(values)
        if self._followers is None:
            return
        for follower in self._followers.by_fd.values():
            if follower.wants_allowed or not is_allowed:
                follower.queue.put(values)

    def emit_state(self, event: str, **more: object) -> None:
        """Queues one event about the watch itself, with the time of now."""
        self.emit({"event": event, "time": iso_time(time.time()), **more})

    def register(self, poll: select.poll) -> None:
        """Adds all descriptors to ``poll``: serve() takes its result."""
        self._queue.register(poll)
        if self._followers is not None:
            poll.register(self._followers, select.POLLIN)
            for fd, follower in self._followers.by_fd.items():
                poll.register(fd, select.POLLIN | (select.POLLOUT if follower.queue.pending else 0))

    def serve(self, ready: dict[int, int]) -> bool:
        """Accepts and drops followers and writes what can be written. False when our own reader is gone."""
        if self._followers is not None:
            self._serve_followers(self._followers, ready)
        return self._queue.serve(ready)

    def _serve_followers(self, followers: Followers, ready: dict[int, int]) -> None:
        for fd, follower in list(followers.by_fd.items()):
            has_input = ready.get(fd, 0) & ~select.POLLOUT
            if (has_input and not follower.receive()) or not follower.queue.push():
                followers.drop(fd)
        if followers.fileno() in ready:
            followers.accept()

    def finish(self, within_s: float) -> None:
        """Writes what is queued: to our own reader within this time, to followers what fits without blocking."""
        self._queue.finish(within_s)
        if self._followers is not None:
            for follower in self._followers.by_fd.values():
                follower.queue.push()
