# SPDX-License-Identifier: Apache-2.0
"""Which sockets a thread of some command is ending already, and may wait for as long as their holder likes.

Each such thread holds a lock on one byte of a file that only root can open: an open file description lock (fcntl(2)),
which conflicts with those of all other commands. The number of the byte stands for the socket. The thread has a
descriptor table of its own (CLONE_FILES in unshare(2)), so that the lock ends when the thread does, and not before,
whatever becomes of its process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from imds_guard.errors import GuardError
from imds_guard.kernel import children, lockfile, syscalls

_NAME = "ending"
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, process ID (0 for this kind)


@contextmanager
def claimed(key: bytes) -> Iterator[bool]:
    """False in the block where another thread has claimed ``key`` and has not left its block.

    Call it in a thread of its own. Where the file can't be used everything can be claimed.
    """
    children.require_detached()
    fd = _opened()
    if fd is None:
        yield True
        return
    try:
        yield _is_locked(fd, key)
    finally:
        os.close(fd)


def _opened() -> int | None:
    try:
        syscalls.unshare(syscalls.CLONE_FILES)
        return lockfile.opened(_NAME)
    except (OSError, GuardError):
        return None


def _is_locked(fd: int, key: bytes) -> bool:
    from hashlib import blake2s  # noqa: PLC0415 -- start-up time

    start = int.from_bytes(blake2s(key, digest_size=8).digest(), "big") >> 2
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0))
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True
