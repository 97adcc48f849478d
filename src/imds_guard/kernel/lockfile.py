# SPDX-License-Identifier: Apache-2.0
"""Lets one command run at a time: flock(2) on a file that only root can open."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from imds_guard.errors import GuardError, NotPermitted, system_text
from imds_guard.kernel import ownership

FOLDER = "/run/imds-guard"
WAIT_S = 30.0
_POLL_S = 0.05


@contextmanager
def exclusive(name: str, wait_s: float | None = None) -> Iterator[None]:
    """Holds the lock ``/run/imds-guard/NAME.lock``; the kernel releases it when the process dies.

    An unprivileged process can't open the file, so it can't hold the lock.
    """
    fd = _acquire(name, WAIT_S if wait_s is None else wait_s)
    _held.append(name)
    try:
        yield
    finally:
        _held.remove(name)
        os.close(fd)


_held: list[str] = []


def is_held() -> bool:
    """True while this process holds a lock: others wait, so it must not wait for somebody outside."""
    return bool(_held)


def attempt(name: str) -> int | None:
    """A file descriptor that holds ``/run/imds-guard/NAME.lock`` until closed, or None if another process does."""
    while True:
        fd = _open(name)
        if not _take(fd, name):
            os.close(fd)
            return None
        if _is_at(fd, _path(name)):
            return fd
        os.close(fd)


def opened(name: str) -> int:
    """A descriptor of ``/run/imds-guard/NAME.lock``, for locks of another kind. Raises GuardError."""
    return _open(name)


def forget(name: str) -> None:
    """Removes the lock file. Call it while the lock is held; a process that waits for the lock then makes a new file.

    Failure to remove it is ignored: a stale lock file is harmless.
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
        except BaseException:  # whatever it is: this process may go on, and would wait for itself
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, path: str) -> bool:
    """False when the file was removed while this process waited for the lock."""
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
        raise NotPermitted(f"opening {path}: {system_text(error)}; run this as root") from error
    except OSError as error:
        raise GuardError(f"opening {path}: {system_text(error)}; free space in {FOLDER}, or repair it") from error


def _make_folder() -> None:
    """Makes FOLDER, and gives it mode 0700 where it exists or the umask says otherwise. Raises OSError."""
    os.makedirs(FOLDER, mode=0o700, exist_ok=True)
    found = os.lstat(FOLDER)
    if not stat.S_ISDIR(found.st_mode) or not ownership.is_owned_by_root(found):
        raise OSError("it is not a directory that root owns")
    if stat.S_IMODE(found.st_mode) != 0o700:
        os.chmod(FOLDER, 0o700)


def _opened_file(path: str) -> int:
    """Opens a regular file of root and no link: other users could hold the lock on files of theirs. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not ownership.is_owned_by_root(found):
            raise OSError("it is not a regular file that root owns")
        os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _wait(fd: int, name: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not _take(fd, name):
        if time.monotonic() > deadline:
            raise GuardError(
                f"waiting for {FOLDER}/{name}.lock: another imds-guard has been running for {wait_s:.0f} s; "
                "nothing was changed, try again when it has ended"
            )
        time.sleep(_POLL_S)


def _take(fd: int, name: str) -> bool:
    """False when another process holds the lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return False
        raise GuardError(f"locking {FOLDER}/{name}.lock: {system_text(error)}; repair {FOLDER}") from error
    return True
