# SPDX-License-Identifier: Apache-2.0
"""System calls that Python's os module lacks, a short wrapper each. Failures are OSErrors."""

from __future__ import annotations

import ctypes
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)

_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "s390x": 356, "ppc64le": 365}
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on every architecture since v5.2

MEMBARRIER_GLOBAL = 1
MEMBARRIER_GLOBAL_EXPEDITED = 2
_FSCONFIG_CMD_CREATE = 6
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
CLONE_NEWNS = 0x00020000


def _checked(result: int, what: str = "") -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what or None)
    return result


def membarrier(command: int) -> None:
    """membarrier(2); MEMBARRIER_CMD_GLOBAL waits for an RCU grace period: EINVAL on a kernel with nohz_full CPUs."""
    number = _MEMBARRIER.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of membarrier(2) on {os.uname().machine} is not known")
    _checked(_libc.syscall(number, command, 0, 0))


def mount(source: str, target: str, kind: str, options: str = "") -> None:
    """mount(2) without flags; ``options`` are the filesystem's own."""
    _checked(_libc.mount(source.encode(), os.fsencode(target), kind.encode(), 0, options.encode() or None), target)


def mounted_nowhere(kind: str) -> int:
    """An fd of the root directory of a new mount of a filesystem that no path leads to; gone when the fd is closed."""
    context = _checked(_libc.syscall(_FSOPEN, kind.encode(), 0))
    try:
        _checked(_libc.syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0))
        tree = _checked(_libc.syscall(_FSMOUNT, context, 0, 0))
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
    finally:
        os.close(tree)


def enter_mount_namespace(fd: int) -> None:
    """setns(2) of this process into a mount namespace; it must have one thread alone."""
    _checked(_libc.setns(fd, CLONE_NEWNS))


def exchange(one: str, other: str) -> None:
    """Swaps two paths in one step (renameat2 with RENAME_EXCHANGE)."""
    _checked(
        _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)),
        one,
    )
