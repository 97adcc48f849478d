# SPDX-License-Identifier: Apache-2.0
"""The namespaces of processes (namespaces(7)): those that the kernel began with, and every network namespace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from imds_guard.kernel import processes
from imds_guard.kernel.mounts import mounts

INITIAL_PID_NAMESPACE = 0xEFFFFFFC
INITIAL_USER_NAMESPACE = 0xEFFFFFFD
"""Inodes: PROC_PID_INIT_INO and PROC_USER_INIT_INO in include/linux/proc_ns.h."""


def namespace_inode(kind: str, pid: int | str = "self") -> int:
    """The inode of a namespace of a process; ``kind`` is ``pid``, ``user``, ``net`` and so on. Raises OSError."""
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


# --- network namespaces ---------------------------------------------------------------------------------------------


class Namespace(NamedTuple):
    """A network namespace, and a path that opens it."""

    inode: int
    path: str
    pid: int | None
    """A process that lives in it; None when it is only mounted somewhere (ip-netns(8))."""


OWN_PATH = "/proc/thread-self/ns/net"


def network_namespaces() -> tuple[list[Namespace], int]:
    """The calling thread's namespace, then all others of processes and of mounts; how many processes hid theirs.

    A namespace that only a descriptor or a socket keeps alive is not found.
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
    return list(found.values()), hidden


def _mounted() -> Iterator[Namespace]:
    """The root of such a mount is ``net:[4026532000]`` (namespaces(7))."""
    for mount in mounts("nsfs"):
        kind, _, number = mount.root.rstrip("]").partition(":[")
        if kind == "net":
            yield Namespace(int(number), mount.path, None)
