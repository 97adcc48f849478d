# SPDX-License-Identifier: Apache-2.0
"""The namespaces of processes (namespaces(7)): those that the kernel began with, and every network namespace."""

from __future__ import annotations

import fcntl
import os
import struct
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from imds_guard.kernel import processes
from imds_guard.kernel.mounts import mounts

INITIAL_PID_NAMESPACE = 0xEFFFFFFC
INITIAL_USER_NAMESPACE = 0xEFFFFFFD
"""Inodes: PROC_PID_INIT_INO and PROC_USER_INIT_INO in include/linux/proc_ns.h."""

# Source: include/uapi/linux/nsfs.h
_NS_GET_USERNS, _NS_GET_OWNER_UID = 0xB701, 0xB704


def namespace_inode(kind: str, pid: int | str = "self") -> int:
    """The inode of a namespace of a process; ``kind`` is ``pid``, ``user``, ``net`` and so on. Raises OSError."""
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


# --- network namespaces ---------------------------------------------------------------------------------------------

MAX_NAMESPACES = 1024
"""More are counted. An unprivileged user can make tens of thousands (max_net_namespaces in namespaces(7))."""


class Namespace(NamedTuple):
    """A network namespace, and a path that opens it."""

    inode: int
    path: str
    pid: int | None
    """A process that lives in it; None when it is only mounted somewhere (ip-netns(8))."""


class Namespaces(NamedTuple):
    """At most MAX_NAMESPACES network namespaces: the calling thread's first, then those that root made.

    The others follow in turns, one of each owner, so that nobody crowds out the namespaces of others.
    """

    found: list[Namespace]
    hidden: int
    """Processes that hid theirs."""
    more: int
    """Namespaces beyond MAX_NAMESPACES."""


OWN_PATH = "/proc/thread-self/ns/net"


def network_namespaces() -> Namespaces:
    """The namespaces of processes and of mounts.

    A namespace that only a descriptor, a socket or a single thread keeps alive is not found.
    """
    first = Namespace(os.stat(OWN_PATH).st_ino, OWN_PATH, os.getpid())
    found = {first.inode: first}
    hidden = 0
    for pid in processes.process_ids():
        try:
            inode = namespace_inode("net", pid)
        except PermissionError:
            hidden += processes.is_alive(pid)
            continue
        except OSError:
            continue  # it has ended
        found.setdefault(inode, Namespace(inode, f"/proc/{pid}/ns/net", pid))
    for mounted in _mounted():
        found.setdefault(mounted.inode, mounted)
    everyone = list(found.values())
    chosen = everyone if len(everyone) <= MAX_NAMESPACES else [first, *_in_turns(everyone[1:])][:MAX_NAMESPACES]
    return Namespaces(chosen, hidden, len(everyone) - len(chosen))


def _mounted() -> Iterator[Namespace]:
    """The root of such a mount is ``net:[4026532000]`` (namespaces(7))."""
    for mount in mounts("nsfs"):
        kind, _, number = mount.root.rstrip("]").partition(":[")
        if kind == "net":
            yield Namespace(int(number), mount.path, None)


def _in_turns(several: list[Namespace]) -> list[Namespace]:
    """Root's, then the first one of each other owner, the second one of each, and so on."""
    seen: Counter[int | None] = Counter()
    turns = []
    for one in several:
        owner = _owner(one)
        turns.append((0 if owner == 0 else 1 + seen[owner], one))
        seen[owner] += 1
    return [one for _, one in sorted(turns, key=lambda turn: turn[0])]


def _owner(one: Namespace) -> int | None:
    """The user who made the user namespace that the namespace belongs to; None where it is gone or we may not know.

    The initial user namespace is root's: only root makes network namespaces in it (ioctl_nsfs(2)).
    """
    try:
        fd = os.open(one.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            user_namespace = fcntl.ioctl(fd, _NS_GET_USERNS)
        finally:
            os.close(fd)
        try:
            return int(struct.unpack("=I", fcntl.ioctl(user_namespace, _NS_GET_OWNER_UID, bytes(4)))[0])
        finally:
            os.close(user_namespace)
    except OSError:
        return None
