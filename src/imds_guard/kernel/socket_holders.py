# SPDX-License-Identifier: Apache-2.0
"""Which processes hold a socket, from /proc."""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.kernel import processes, untrusted
from imds_guard.kernel.abandonable import Limits, Unanswered, Worker
from imds_guard.kernel.processes import Process

LIMITS = Limits(total_s=5.0)
"""2,600 processes take 0.35 s."""


class Holders(NamedTuple):
    """For the inode of each socket the processes with a descriptor of it."""

    pids: dict[int, tuple[int, ...]]
    hidden: int
    """How many processes this one may not inspect."""
    not_read: int
    """How many processes were not read, or not all of their descriptors: they have too many, or time was over."""


class _Read(NamedTuple):
    inodes: frozenset[int] = frozenset()
    hidden: bool = False
    all_read: bool = True


def holders_of(inodes: frozenset[int], limits: Limits = LIMITS) -> Holders:
    """Reads the descriptors of every process; those of other users' processes need CAP_SYS_PTRACE.

    No holder is found for a socket that is in flight (SCM_RIGHTS in unix(7)), that is registered with an io_uring, or
    that is open in a thread which does not share the descriptors of its process.
    """
    found: dict[int, set[int]] = {}
    hidden = not_read = 0
    everyone = processes.by_user() if inodes else []

    def work(one: Process) -> _Read:
        return _read(one, inodes)

    with Worker(work) as worker:
        for process, read in worker.ask_each(everyone, limits, lambda one: one.uid):
            if isinstance(read, Unanswered):
                not_read += 1
                continue
            hidden += read.hidden
            not_read += not read.all_read
            for inode in read.inodes:
                found.setdefault(inode, set()).add(process.pid)
    return Holders({inode: tuple(sorted(pids)) for inode, pids in found.items()}, hidden, not_read)


def _read(process: Process, wanted: frozenset[int]) -> _Read:
    try:
        sockets = untrusted.sockets_of(process.pid, wanted)
    except PermissionError:
        return _Read(hidden=processes.is_alive(process.pid))
    except OSError:
        return _Read()  # it has ended
    return _Read(sockets.inodes, all_read=sockets.all_read)
