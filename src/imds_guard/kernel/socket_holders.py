# SPDX-License-Identifier: Apache-2.0
"""Which processes hold a socket, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from imds_guard.kernel import processes


class Holders(NamedTuple):
    """For the inode of each socket the processes with a descriptor of it; how many processes could not be read."""

    pids: dict[int, tuple[int, ...]]
    hidden: int


def holders_of(inodes: frozenset[int]) -> Holders:
    """Reads the descriptors of every process; those of other users' processes need CAP_SYS_PTRACE.

    No holder is found for a socket that is in flight (SCM_RIGHTS in unix(7)), that is registered with an io_uring, or
    that is open in a thread which does not share the descriptors of its process.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, set[int]] = {}
    hidden = 0
    for pid in processes.process_ids() if wanted else ():
        try:
            for link in _descriptors(pid):
                if link in wanted:
                    found.setdefault(wanted[link], set()).add(pid)
        except PermissionError:
            hidden += processes.is_alive(pid)
        except OSError:
            continue  # it has ended
    return Holders({inode: tuple(sorted(pids)) for inode, pids in found.items()}, hidden)


def _descriptors(pid: int) -> Iterator[str]:
    folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(folder):
            try:
                yield os.readlink(name, dir_fd=folder)
            except FileNotFoundError:
                continue  # closed meanwhile
    finally:
        os.close(folder)
