# SPDX-License-Identifier: Apache-2.0
"""Finds the path of a cgroup by its ID: a file handle of cgroup2 is made of the ID alone."""

from __future__ import annotations

import errno
import os
import struct

from imds_guard.kernel import syscalls

_HANDLE = struct.Struct("=IiQ")  # struct file_handle (open_by_handle_at(2)), whose eight bytes are the ID
_FILEID_KERNFS = 0xFE  # include/linux/exportfs.h


def path_of_cgroup(root_fd: int, identity: int) -> str | None:
    """The path of cgroup ``identity`` below ``root_fd``, a directory of cgroup2; None when it is gone or can't be read.

    Needs CAP_DAC_READ_SEARCH. Since Linux 33c5ac9175195 ("kernfs: implement custom exportfs ops and fid type") (in
    v5.5). The kernel uses no ID twice.
    """
    try:
        fd = _opened(root_fd, identity)
    except OSError:
        return None
    try:
        root, path = (os.readlink(f"/proc/self/fd/{number}").rstrip("/") for number in (root_fd, fd))
    except OSError:
        return None
    finally:
        os.close(fd)
    if path == root:
        return "/"
    return path[len(root) :] if path.startswith(root + "/") else None


def is_gone(root_fd: int, identity: int) -> bool:
    """True when the kernel says that no cgroup has this ID. False also where it can't be asked."""
    try:
        os.close(_opened(root_fd, identity))
    except OSError as error:
        return error.errno == errno.ESTALE
    return False


def _opened(root_fd: int, identity: int) -> int:
    handle = _HANDLE.pack(8, _FILEID_KERNFS, identity)
    return syscalls.open_by_handle_at(root_fd, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
