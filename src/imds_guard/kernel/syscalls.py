# SPDX-License-Identifier: Apache-2.0
"""System calls that Python's os module lacks, a short wrapper for each. Every failure is an OSError.

No other module loads the C library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Sequence

from imds_guard.kernel.syscall_numbers import syscall_number

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long  # setfsuid(2) returns an ID, which may have its 32nd bit set

MEMBARRIER_GLOBAL = 1
MEMBARRIER_GLOBAL_EXPEDITED = 2

# Source: include/uapi/linux/sched.h
CLONE_FILES = 0x00000400
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_FSCONFIG_CMD_CREATE = 6
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RESOLVE_IN_ROOT = 0x10
"""Source: include/uapi/linux/openat2.h."""
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


def _checked(result: int, what: str) -> int:
    """``result``, unless it is negative: then an OSError that names ``what`` where others name a file."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


def _by_number(name: str, *arguments: int | bytes | None) -> int:
    """syscall(2). Integers are passed as C longs, for which Python has no default."""
    as_c = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = int(_libc.syscall(ctypes.c_long(syscall_number(name)), *as_c))
    shown = ", ".join("..." if isinstance(one, bytes) else str(one) for one in arguments)
    return _checked(result, f"{name}({shown})")


# --- bpf(2) and memory barriers -------------------------------------------------------------------------------------


def bpf(command: int, attr: ctypes.Array[ctypes.c_char], size: int) -> tuple[int, int]:
    """bpf(2): the result, and the errno (0 on success). ``size``: how many bytes of ``attr`` the kernel may read."""
    result = int(_libc.syscall(ctypes.c_long(syscall_number("bpf")), ctypes.c_int(command), attr, ctypes.c_uint(size)))
    return result, 0 if result >= 0 else ctypes.get_errno()


def membarrier(command: int) -> None:
    """membarrier(2). MEMBARRIER_GLOBAL waits for an RCU grace period; EINVAL on a kernel with nohz_full CPUs."""
    _by_number("membarrier", command, 0, 0)


# --- files and mounts -----------------------------------------------------------------------------------------------


def mount(source: str, target: str, kind: str, options: str = "") -> None:
    """mount(2) without flags. ``options`` are those of the filesystem."""
    _checked(_libc.mount(source.encode(), os.fsencode(target), kind.encode(), 0, options.encode() or None), target)


def detached_mount(kind: str) -> int:
    """The fd of the root directory of a new mount that is at no path (fsmount(2)); the mount ends when it is closed."""
    context = _by_number("fsopen", kind.encode(), 0)
    try:
        _by_number("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        tree = _by_number("fsmount", context, 0, 0)
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
    finally:
        os.close(tree)


def exchange(one: str, other: str) -> None:
    """Swaps two paths in one step (renameat2(2) with RENAME_EXCHANGE)."""
    paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    _checked(_libc.renameat2(*paths, ctypes.c_uint(_RENAME_EXCHANGE)), one)


def open_in_root(root: int, path: str, flags: int) -> int:
    """The fd of a path that is looked up as if the directory ``root`` were / (openat2(2) with RESOLVE_IN_ROOT)."""
    how = struct.pack("=QQQ", flags, 0, _RESOLVE_IN_ROOT)
    return _by_number("openat2", root, os.fsencode(path), how, len(how))


def open_by_handle_at(mount_fd: int, handle: bytes, flags: int) -> int:
    """The fd of the file that a struct file_handle names in the filesystem of ``mount_fd`` (open_by_handle_at(2))."""
    return _checked(_libc.open_by_handle_at(mount_fd, handle, flags), "open_by_handle_at")


# --- namespaces and processes ---------------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    """Gives the calling thread new namespaces (CLONE_NEW*) or descriptors (CLONE_FILES) of its own (unshare(2))."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kind: int) -> None:
    """Moves the calling thread into the namespace of ``fd``, of the kind CLONE_NEW* (setns(2))."""
    _checked(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def pidfd_getfd(process: int, descriptor: int) -> int:
    """A copy of another process's descriptor (pidfd_getfd(2)). ``process`` is of pidfd_open(2)."""
    return _by_number("pidfd_getfd", process, descriptor, 0)


def getsockopt(fd: int, level: int, option: int) -> None:
    """getsockopt(2) for the time that it takes: Python's own keeps all threads waiting for a socket that is locked."""
    value, size = ctypes.create_string_buffer(4), ctypes.c_uint(4)
    _checked(_libc.getsockopt(fd, level, option, value, ctypes.byref(size)), "getsockopt")


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends, unless it changes its IDs (PR_SET_PDEATHSIG in prctl(2))."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "prctl")


def no_new_privileges() -> None:
    """From now on no program gives this process more rights than it has (PR_SET_NO_NEW_PRIVS in prctl(2))."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "prctl")


# --- credentials of the calling thread alone ------------------------------------------------------------------------
# The C library's wrappers change every thread of the process (nptl(7)); these change one.


def setgroups(gids: Sequence[int]) -> None:
    """setgroups(2)."""
    _by_number("setgroups", len(gids), struct.pack(f"={len(gids)}I", *gids))


def setresuid(real: int, effective: int, saved: int) -> None:
    """setresuid(2)."""
    _by_number("setresuid", real, effective, saved)


def setresgid(real: int, effective: int, saved: int) -> None:
    """setresgid(2)."""
    _by_number("setresgid", real, effective, saved)


def setfsuid(uid: int) -> int:
    """setfsuid(2): the ID before the call. It never reports a failure; -1 changes nothing."""
    return _by_number("setfsuid", uid)


def setfsgid(gid: int) -> int:
    """setfsgid(2): the ID before the call. It never reports a failure; -1 changes nothing."""
    return _by_number("setfsgid", gid)
