# SPDX-License-Identifier: Apache-2.0
"""Changes the credentials of the calling thread alone, by raw system calls (credentials(7)).

The C library's wrappers change every thread of the process (nptl(7)), the system calls only the calling one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long  # setfsuid(2) returns an ID, which may have its 32nd bit set

# Sources: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h in Linux.
_X86_64 = {"setgroups": 116, "setresuid": 117, "setresgid": 119, "setfsuid": 122, "setfsgid": 123}
_GENERIC = {"setgroups": 159, "setresuid": 147, "setresgid": 149, "setfsuid": 151, "setfsgid": 152}
_NUMBERS: dict[str, dict[str, int]] = {"x86_64": _X86_64, "aarch64": _GENERIC, "riscv64": _GENERIC}

Triple = tuple[int, int, int]
"""Real, effective and saved ID."""


def become(
    uids: Triple | None = None,
    gids: Triple | None = None,
    groups: Iterable[int] | None = None,
    fsuid: int | None = None,
    fsgid: int | None = None,
) -> None:
    """The calling thread has these IDs afterwards; what is None stays, but an effective ID carries its fs ID along.

    Groups come first and user IDs last, while the privilege for it is still there: without it ``fsuid`` must be one
    of ``uids`` (setfsuid(2)). Raises OSError.
    """
    if groups is not None:
        _set_groups(tuple(groups))
    if gids is not None:
        _call("setresgid", *gids)
    if fsgid is not None:
        _set_filesystem_id("setfsgid", fsgid)
    if uids is not None:
        _call("setresuid", *uids)
    if fsuid is not None:
        _set_filesystem_id("setfsuid", fsuid)


def _call(name: str, *arguments: int) -> int:
    machine = os.uname().machine
    if machine not in _NUMBERS:
        raise OSError(f"the system call number of {name} on {machine} is not known here")
    words = [ctypes.c_long(argument) for argument in arguments]
    result = int(_libc.syscall(ctypes.c_long(_NUMBERS[machine][name]), *words))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")
    return result


def _set_groups(groups: tuple[int, ...]) -> None:
    array = (ctypes.c_uint32 * max(len(groups), 1))(*groups)
    _call("setgroups", len(groups), ctypes.addressof(array))


def _set_filesystem_id(name: str, wanted: int) -> None:
    """setfsuid(2) never fails: it returns the ID before the call, so a second call tells whether it was taken."""
    _call(name, wanted)
    if _call(name, -1) != wanted:
        raise PermissionError(f"{name}({wanted}) was not taken")
