# SPDX-License-Identifier: Apache-2.0
"""The cgroup2 directory that programs are attached to."""

from __future__ import annotations

import os
from typing import NamedTuple

from imds_guard.errors import GuardError, NotPermitted, Unsupported, system_words
from imds_guard.kernel import syscalls
from imds_guard.kernel.mounts import mounts

ROOT_INODE = 1
"""The root of every cgroup2 hierarchy, and of no cgroup namespace: kernfs numbers from 1, kernfs_create_root()."""


class Cgroup(NamedTuple):
    """An open cgroup2 directory. ``id`` is what bpf_get_current_cgroup_id() and link descriptions call it."""

    fd: int
    id: int
    path: str

    @property
    def is_root(self) -> bool:
        """True for the root of the hierarchy: every process of the machine is in it or below."""
        return self.id == ROOT_INODE

    def close(self) -> None:
        """Closes the directory."""
        os.close(self.fd)

    def __enter__(self) -> Cgroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_cgroup(path: str | None = None) -> Cgroup:
    """The given cgroup2 directory, or the root of the hierarchy wherever it is mounted, or mounted for the purpose."""
    if path is not None:
        return _open_given(path)
    root = _open_mounted_root() or _open_mount_of_our_own()
    if not root.is_root:
        inode = root.id
        root.close()
        raise Unsupported(
            f"looking for the root of the cgroup2 hierarchy: the topmost directory to be seen from here has inode "
            f"{inode}, so this is a cgroup namespace and processes outside it would not be covered; run this on the "
            "host, or name a subtree with --cgroup PATH"
        )
    return root


def _open_given(path: str) -> Cgroup:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise GuardError(
            f"opening the cgroup {path}: {system_words(error)}; name a directory of a cgroup2 mount"
        ) from error
    if not _is_cgroup2(fd):
        os.close(fd)
        raise GuardError(f"opening the cgroup {path}: it is not in a cgroup2 filesystem; name a directory that is")
    return Cgroup(fd, os.fstat(fd).st_ino, path)


def _is_cgroup2(fd: int) -> bool:
    """cgroup.procs is in every directory of v1, too; cgroup.max.depth only in those of cgroup2."""
    device = os.fstat(fd).st_dev
    if any(mount.device == device for mount in mounts("cgroup2")):
        return True
    try:
        os.close(os.open("cgroup.max.depth", os.O_RDONLY | os.O_CLOEXEC, dir_fd=fd))
    except OSError:
        return False
    return True


def _open_mounted_root() -> Cgroup | None:
    for mount in mounts("cgroup2"):
        try:
            fd = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # hidden under another mount
        found = os.fstat(fd)
        if found.st_dev == mount.device and found.st_ino == ROOT_INODE:
            return Cgroup(fd, found.st_ino, mount.path)
        os.close(fd)
    return None


def _open_mount_of_our_own() -> Cgroup:
    """A host with cgroup v1 alone has the hierarchy all the same: a mount without a path shows it."""
    try:
        fd = syscalls.mounted_nowhere("cgroup2")
    except PermissionError as error:
        raise NotPermitted(
            f"mounting cgroup2 to find its root: {system_words(error)}; run this as root (CAP_SYS_ADMIN)"
        ) from error
    except OSError as error:
        raise Unsupported(
            f"mounting cgroup2 to find its root: {system_words(error)}; this kernel has no cgroup2 (CONFIG_CGROUPS), "
            "the iptables backend can serve instead"
        ) from error
    return Cgroup(fd, os.fstat(fd).st_ino, "/")
