# SPDX-License-Identifier: Apache-2.0
"""Which processes hold a socket, from /proc."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from imds_guard.kernel import processes, untrusted
from imds_guard.kernel.abandonable import Limits, Unanswered, Worker
from imds_guard.kernel.processes import Process

LIMITS = Limits(share_s=2.0, total_s=10.0)
"""2,600 processes take 0.35 s."""
MAX_HOLDERS = 16
"""Of one socket and one user. A thousand forks may hold a thousand sockets."""
MAX_ALL_HOLDERS = 100_000
"""Of all sockets."""


class Holders(NamedTuple):
    """Who holds each socket."""

    pids: dict[int, tuple[int, ...]]
    """For the inode of each socket the processes with a descriptor of it, at most MAX_HOLDERS of each user."""
    hidden: int
    """How many processes this one may not inspect."""
    not_read: int
    """How many processes were not read, or not all of their descriptors: there are too many, or time was over."""


class _Read(NamedTuple):
    inodes: frozenset[int] = frozenset()
    hidden: bool = False
    all_read: bool = True


def holders_of(inodes: frozenset[int], limits: Limits = LIMITS) -> Holders:
    """Reads the descriptors of every process; those of other users' processes need CAP_SYS_PTRACE.

    No holder is found for a socket that is in flight (SCM_RIGHTS in unix(7)), that is registered with an io_uring, or
    that is open in a thread which does not share the descriptors of its process.
    """
    found: dict[int, list[int]] = {}
    held: Counter[tuple[int, int]] = Counter()
    hidden = not_read = known = 0
    everyone = processes.by_user() if inodes else []

    def work(one: Process) -> _Read:
        return _read(one, inodes)

    with Worker(work) as worker:
        for process, read in worker.ask_each(everyone, limits, lambda one: one.uid):
            if isinstance(read, Unanswered):
                not_read += 1
                continue
            hidden += read.hidden
            full = known >= MAX_ALL_HOLDERS
            not_read += not read.all_read or (full and bool(read.inodes))
            for inode in () if full else read.inodes:
                if held[inode, process.uid] < MAX_HOLDERS:
                    held[inode, process.uid] += 1
                    known += 1
                    found.setdefault(inode, []).append(process.pid)
    return Holders({inode: tuple(sorted(pids)) for inode, pids in found.items()}, hidden, not_read)


def _read(process: Process, wanted: frozenset[int]) -> _Read:
    try:
        sockets = untrusted.sockets_of(process.pid, wanted)
    except PermissionError:
        return _Read(hidden=processes.is_alive(process.pid))
    except OSError:
        return _Read()  # it has ended
    return _Read(frozenset(sockets.descriptors), all_read=sockets.all_read)
