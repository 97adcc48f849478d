# SPDX-License-Identifier: Apache-2.0
"""Which processes hold a socket, and which network namespaces there are: both from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from imds_guard.kernel.mounts import mounts


def process_ids() -> list[int]:
    """Every process that /proc shows, in ascending order."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def process_name(pid: int) -> str:
    """What the process calls itself (proc_pid_comm(5)), as it is: unsafe to print. "" when it is gone."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def _lives(pid: int) -> bool:
    """False for one that has ended and that nobody has waited for (a zombie): it has no descriptor and no namespace.

    A process whose first thread has ended, and others not, is shown as a zombie too: it has more than one thread.
    """
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return False
    return fields["State"].split()[0] not in ("Z", "X") or int(fields["Threads"]) > 1


# --- who holds a socket ---------------------------------------------------------------------------------------------


class Holders(NamedTuple):
    """Of each socket's inode the processes with a descriptor of it; how many processes could not be looked into."""

    pids: dict[int, tuple[int, ...]]
    hidden: int


def holders_of(inodes: frozenset[int]) -> Holders:
    """Looks through the descriptors of every process; those of other users take CAP_SYS_PTRACE.

    A socket that is in flight (SCM_RIGHTS in unix(7)), registered with an io_uring, or open in a thread that shares no
    descriptors with its process has no holder here.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, set[int]] = {}
    hidden = 0
    for pid in process_ids() if wanted else ():
        try:
            for link in _descriptors(pid):
                if link in wanted:
                    found.setdefault(wanted[link], set()).add(pid)
        except PermissionError:
            hidden += _lives(pid)
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


# --- network namespaces ---------------------------------------------------------------------------------------------


class Namespace(NamedTuple):
    """A network namespace, and a path that opens it."""

    inode: int
    path: str
    pid: int | None
    """A process that lives in it; None for one that is only mounted somewhere (ip-netns(8))."""


OWN = "/proc/thread-self/ns/net"


def network_namespaces() -> tuple[list[Namespace], int]:
    """The calling thread's, then every other one that a process lives in or a mount keeps, and how many hid theirs.

    One that only a descriptor or a socket keeps alive is not found.
    """
    first = Namespace(os.stat(OWN).st_ino, OWN, os.getpid())
    found = {first.inode: first}
    hidden = 0
    for pid in process_ids():
        path = f"/proc/{pid}/ns/net"
        try:
            inode = os.stat(path).st_ino
        except PermissionError:
            hidden += _lives(pid)
            continue
        except OSError:
            continue  # it has ended
        found.setdefault(inode, Namespace(inode, path, pid))
    for mounted in _mounted():
        found.setdefault(mounted.inode, mounted)
    return list(found.values()), hidden


def _mounted() -> Iterator[Namespace]:
    """The root of such a mount reads ``net:[4026532000]`` (namespaces(7))."""
    for mount in mounts("nsfs"):
        kind, _, number = mount.root.rstrip("]").partition(":[")
        if kind == "net":
            yield Namespace(int(number), mount.path, None)
