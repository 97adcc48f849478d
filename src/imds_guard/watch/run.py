# SPDX-License-Identifier: Apache-2.0
"""Runs a watch: one leader reads a guard's ring buffer, the others follow it, and one of them takes its place."""

from __future__ import annotations

import os
import select
import time
from typing import Callable

from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.errors import GuardError
from imds_guard.kernel import lockfile
from imds_guard.watch.event import as_json
from imds_guard.watch.followers import MAX_FOLLOWERS, TOO_MANY, Followers, LeaderConnection
from imds_guard.watch.leader import FINISH_S, Leader
from imds_guard.watch.line_queue import LineQueue
from imds_guard.watch.options import WatchOptions, require_ebpf
from imds_guard.watch.output import Output
from imds_guard.watch.stop_signal import StopSignal

_RETRY_S = 0.2


def watch(options: WatchOptions, queue: LineQueue, started: Callable[[], object]) -> None:
    """Writes events to ``queue`` until SIGTERM or SIGINT, or until nobody reads it.

    ``started`` is called once it leads or follows. Raises Unsupported when the iptables backend is in force, which
    reports no denials.
    """
    require_ebpf(options.cgroup)
    location = PinLocation.of(options.cgroup)
    with StopSignal() as stop:
        if options.once:
            _read_once(location, options, queue)
            return
        while not stop.received:
            lock_fd = lockfile.attempt(_lock_name(location))
            if lock_fd is not None:
                try:
                    _lead(location, options, queue, stop, started)
                finally:
                    _release(location, lock_fd)
                return
            _follow_leader(location, options, queue, stop, started)


def _lock_name(location: PinLocation) -> str:
    return f"watch-{location.name}"


def _socket_path(location: PinLocation) -> str:
    return os.path.join(lockfile.FOLDER, f"watch-{location.name}.sock")


def _release(location: PinLocation, lock_fd: int) -> None:
    if not location.is_root:
        lockfile.forget(_lock_name(location))
    os.close(lock_fd)


# --- following ------------------------------------------------------------------------------------------------------


def _follow_leader(
    location: PinLocation, options: WatchOptions, queue: LineQueue, stop: StopSignal, started: Callable[[], object]
) -> None:
    """Returns when the leader is gone, or when there is none yet."""
    leader = LeaderConnection.open(_socket_path(location), options.allowed)
    if leader is not None:
        started()
        _follow(leader, queue, stop)
    elif not stop.received:
        select.select([stop], [], [], _RETRY_S)  # a leader is about to listen, or to end


def _follow(leader: LeaderConnection, queue: LineQueue, stop: StopSignal) -> None:
    """Prints the leader's events. Returns when the leader is gone, or ``stop`` is received."""
    try:
        while not stop.received:
            ready = _wait(leader, queue, stop)
            lines = leader.read_lines() if leader.fileno() in ready else []
            if lines is None:
                return
            _put(lines, queue)
            if not queue.serve(ready):
                stop.received = True
    finally:
        leader.close()
        queue.finish(FINISH_S if stop.received else 0)


def _wait(leader: LeaderConnection, queue: LineQueue, stop: StopSignal) -> dict[int, int]:
    """The descriptors that are ready. While lines are pending the leader is not read, so they gather in its queue."""
    poll = select.poll()
    poll.register(stop, select.POLLIN)
    queue.register(poll)
    if not queue.pending:
        poll.register(leader, select.POLLIN)
    return dict(poll.poll())


def _put(lines: list[bytes], queue: LineQueue) -> None:
    import json  # noqa: PLC0415 -- only followers read JSON

    for line in lines:
        values = json.loads(line)
        del values["schema"]  # the line of this process has its own
        if values["event"] == TOO_MANY:
            raise GuardError(
                f"following the imds-guard watch that reads the ring buffer: it has {MAX_FOLLOWERS} followers, which "
                "is the maximum; end one of them"
            )
        queue.put(values)


# --- leading --------------------------------------------------------------------------------------------------------


def _lead(
    location: PinLocation, options: WatchOptions, queue: LineQueue, stop: StopSignal, started: Callable[[], object]
) -> None:
    followers = Followers(_socket_path(location), as_json)
    leader = Leader(location, options, Output(queue, options.allowed, followers))
    try:
        leader.check_guard(time.monotonic())
        started()
        while not stop.received:
            if not leader.turn(stop):
                break
        leader.drain(time.monotonic())
    finally:
        leader.close()
        followers.close()


def _read_once(location: PinLocation, options: WatchOptions, queue: LineQueue) -> None:
    lock_fd = lockfile.attempt(_lock_name(location))
    if lock_fd is None:
        raise GuardError(
            "reading the ring buffer once: another imds-guard watch reads it; run imds-guard watch without --once to "
            "follow that one"
        )
    try:
        leader = Leader(location, options, Output(queue, options.allowed, None))
        try:
            leader.check_guard(time.monotonic())
            if leader.source is None:
                raise GuardError("nothing is locked, so there is nothing to watch: run imds-guard start first")
            while leader.drain(time.monotonic()):
                pass
        finally:
            leader.close()
    finally:
        _release(location, lock_fd)
