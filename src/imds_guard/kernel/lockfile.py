# SPDX-License-Identifier: Apache-2.0
"""One command at a time: flock(2) on a file that only root can open."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from imds_guard.errors import GuardError, NotPermitted, system_words

FOLDER = "/run/imds-guard"
WAIT_S = 30.0
_POLL_S = 0.05


@contextmanager
def exclusive(name: str, wait_s: float | None = None) -> Iterator[None]:
    """Holds ``/run/imds-guard/NAME.lock``; the kernel lets go of it when the process dies.

    An unprivileged process can't open the file, so it can't hold the lock against us.
    """
    fd = _acquire(name, WAIT_S if wait_s is None else wait_s)
    try:
        yield
    finally:
        os.close(fd)


def attempt(name: str) -> int | None:
    """A file descriptor that holds ``/run/imds-guard/NAME.lock`` until it is closed; None when another process does."""
    while True:
        fd = _open(name)
        if not _take(fd, name):
            os.close(fd)
            return None
        if _is_at(fd, _path(name)):
            return fd
        os.close(fd)


def forget(name: str) -> None:
    """Removes the lock file; only while it is held. Who waits for it makes another one.

    One that can't be removed is as good as before: what the command was for does not fail with it.
    """
    with suppress(OSError):
        os.unlink(_path(name))


def _path(name: str) -> str:
    return os.path.join(FOLDER, f"{name}.lock")


def _acquire(name: str, wait_s: float) -> int:
    while True:
        fd = _open(name)
        try:
            _wait(fd, name, wait_s)
            if _is_at(fd, _path(name)):
                return fd
        except GuardError:
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, path: str) -> bool:
    """False when the file was removed while we waited for it."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _open(name: str) -> int:
    path = _path(name)
    try:
        _make_folder()
        return _opened_file(path)
    except PermissionError as error:
        raise NotPermitted(f"opening {path}: {system_words(error)}; run this as root") from error
    except OSError as error:
        raise GuardError(f"opening {path}: {system_words(error)}; make room in, or repair, {FOLDER}") from error


def _make_folder() -> None:
    """Root's own, whoever made it and with whatever umask. Raises OSError."""
    os.makedirs(FOLDER, mode=0o700, exist_ok=True)
    found = os.lstat(FOLDER)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0:
        raise OSError(errno.ENOTDIR, "it is no folder of root's")
    if stat.S_IMODE(found.st_mode) != 0o700:
        os.chmod(FOLDER, 0o700)


def _opened_file(path: str) -> int:
    """Root's own, and no link: what somebody else has put there could be held against us. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != 0:
            raise OSError(errno.EEXIST, "it is no file of root's")
        os.fchmod(fd, 0o600)
    except OSError:
        os.close(fd)
        raise
    return fd


def _wait(fd: int, name: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not _take(fd, name):
        if time.monotonic() > deadline:
            raise GuardError(
                f"waiting for {FOLDER}/{name}.lock: another imds-guard has been at work for {wait_s:.0f} s; "
                "nothing was changed, try again when it is done"
            )
        time.sleep(_POLL_S)


def _take(fd: int, name: str) -> bool:
    """False when another process holds the lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return False
        raise GuardError(f"locking {FOLDER}/{name}.lock: {system_words(error)}; repair {FOLDER}") from error
    return True
