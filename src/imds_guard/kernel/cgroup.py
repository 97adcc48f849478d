# SPDX-License-Identifier: Apache-2.0
"""Opens the cgroup2 directory that programs are attached to."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from imds_guard.errors import GuardError, NotPermitted, Unsupported, system_text
from imds_guard.kernel import syscalls
from imds_guard.kernel.mounts import Mount, mounts, window_to_pid1

ROOT_INODE = 1
"""The root of a cgroup2 hierarchy has this inode, the root of a cgroup namespace has not (kernfs_create_root())."""


class Cgroup(NamedTuple):
    """An open cgroup2 directory. ``id`` is the cgroup ID of bpf_get_current_cgroup_id() and of struct bpf_link_info."""

    fd: int
    id: int
    path: str

    @property
    def is_root(self) -> bool:
        """True for the root of the hierarchy: every process of the machine is in it or below it."""
        return self.id == ROOT_INODE

    def close(self) -> None:
        """Closes the directory."""
        os.close(self.fd)

    def __enter__(self) -> Cgroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_cgroup(path: str | None = None) -> Cgroup:
    """The cgroup2 directory at ``path``; without a path the root of the hierarchy, which is mounted if need be."""
    if path is not None:
        return _open_given(path)
    root = _open_mounted_root() or _open_root_of_pid1() or _open_new_mount()
    if not root.is_root:
        inode = root.id
        root.close()
        raise Unsupported(
            f"looking for the root of the cgroup2 hierarchy: the topmost directory that this process sees has inode "
            f"{inode}, so this is a cgroup namespace, and processes outside it would stay unlocked; run this on the "
            "host, or give a directory below it with --cgroup PATH"
        )
    return root


def is_root(path: str) -> bool:
    """True when ``path`` is the root of the cgroup2 hierarchy. False also where it can't be opened."""
    try:
        with _open_given(path) as opened:
            return opened.is_root
    except GuardError:
        return False


def ancestors(cgroup: Cgroup) -> Iterator[tuple[str, int]]:
    """(path, fd) of each cgroup above, the nearest first, as far as the mount goes. The fds are closed."""
    fd, path = os.dup(cgroup.fd), cgroup.path
    try:
        while os.fstat(fd).st_ino != ROOT_INODE:
            above = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            # Another file system: fd is the root of a cgroup namespace. Itself: it is the root of all files.
            if os.fstat(above).st_dev != os.fstat(fd).st_dev or os.path.samestat(os.fstat(above), os.fstat(fd)):
                os.close(above)
                return
            os.close(fd)
            fd, path = above, os.path.dirname(path.rstrip("/")) or "/"
            yield path, fd
    finally:
        os.close(fd)


def descendants(cgroup: Cgroup, maximum: int) -> Iterator[tuple[str, int]]:
    """(path, fd) of the cgroups below, each level before the next, at most ``maximum``. The fds are closed.

    Cgroups that are removed meanwhile are left out, and those whose path is too long for the kernel.
    """
    waiting = deque([""])
    seen = 0
    while waiting and seen <= maximum:
        below = waiting.popleft()
        try:
            fd = os.open(below or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=cgroup.fd)
        except OSError:
            continue
        try:
            if below:
                yield os.path.join(cgroup.path, below), fd
            seen += 1
            with suppress(OSError), os.scandir(fd) as entries:
                waiting.extend(
                    os.path.join(below, entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)
                )
        finally:
            os.close(fd)


def _open_given(path: str) -> Cgroup:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise GuardError(
            f"opening the cgroup {path}: {system_text(error)}; name a directory of a cgroup2 mount"
        ) from error
    if not _is_cgroup2(fd):
        os.close(fd)
        raise GuardError(f"opening the cgroup {path}: it is not in a cgroup2 filesystem; name a directory that is")
    return Cgroup(fd, os.fstat(fd).st_ino, path)


def _is_cgroup2(fd: int) -> bool:
    """cgroup.max.depth is in directories of cgroup2 alone; cgroup.procs is in those of v1, too."""
    device = os.fstat(fd).st_dev
    if any(mount.device == device for mount in mounts("cgroup2")):
        return True
    try:
        os.close(os.open("cgroup.max.depth", os.O_RDONLY | os.O_CLOEXEC, dir_fd=fd))
    except OSError:
        return False
    return True


def _open_mounted_root() -> Cgroup | None:
    return _first_root(mounts("cgroup2"), "")


def _open_root_of_pid1() -> Cgroup | None:
    """In a cgroup namespace of its own a process sees no root at its own mounts. PID 1 is in the first namespace."""
    found = mounts("cgroup2", "1")
    window = window_to_pid1() if found else None
    return None if window is None else _first_root(found, f"/proc/{window}/root")


def _first_root(found: list[Mount], prefix: str) -> Cgroup | None:
    """The root of the hierarchy at one of these mounts, if there is one. ``prefix`` stands before their paths."""
    for mount in found:
        try:
            fd = os.open(prefix + mount.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # hidden under another mount
        status = os.fstat(fd)
        if status.st_dev == mount.device and status.st_ino == ROOT_INODE:
            return Cgroup(fd, status.st_ino, prefix + mount.path)
        os.close(fd)
    return None


def _open_new_mount() -> Cgroup:
    """Where only cgroup v1 is mounted the cgroup2 hierarchy exists, too: a mount without a path gives access to it."""
    try:
        fd = syscalls.detached_mount("cgroup2")
    except PermissionError as error:
        raise NotPermitted(
            f"mounting cgroup2 to find its root: {system_text(error)}; run this as root (CAP_SYS_ADMIN)"
        ) from error
    except OSError as error:
        raise Unsupported(
            f"mounting cgroup2 to find its root: {system_text(error)}; this kernel has no cgroup2 (CONFIG_CGROUPS), "
            "the iptables backend can serve instead"
        ) from error
    return Cgroup(fd, os.fstat(fd).st_ino, "/")
