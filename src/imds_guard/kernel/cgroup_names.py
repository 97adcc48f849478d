# SPDX-License-Identifier: Apache-2.0
"""The path of a cgroup whose ID is known: file handles of cgroup2 are made of the ID alone."""

from __future__ import annotations

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

_HANDLE = struct.Struct("=IiQ")  # struct file_handle (open_by_handle_at(2)) with the ID as its eight octets
_FILEID_KERNFS = 0xFE  # include/linux/exportfs.h


def path_of_cgroup(root_fd: int, identity: int) -> str | None:
    """The path below the directory ``root_fd`` of a cgroup2 mount; None when it is gone or can't be asked.

    It takes CAP_DAC_READ_SEARCH. Since Linux 33c5ac9175195 ("kernfs: implement custom exportfs ops and fid type") (in
    v5.5). IDs are not used twice.
    """
    handle = ctypes.create_string_buffer(_HANDLE.pack(8, _FILEID_KERNFS, identity), _HANDLE.size)
    fd = _libc.open_by_handle_at(root_fd, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if fd < 0:
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
