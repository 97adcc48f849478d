# SPDX-License-Identifier: Apache-2.0
"""Makes restricted places for the calling process and its children: namespaces, capabilities, seccomp filters."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

from imds_guard.kernel import bpf, syscalls
from imds_guard.kernel.mounts import mounts
from imds_guard.kernel.syscall_numbers import syscall_number
from imds_guard.kernel.syscalls import CLONE_NEWNS

_libc = ctypes.CDLL(None, use_errno=True)

# Sources: include/uapi/linux/mount.h, sched.h, prctl.h, seccomp.h, filter.h, capability.h
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
CLONE_NEWCGROUP = 0x02000000
_PR_SET_SECCOMP, _PR_CAPBSET_DROP = 22, 24
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW, _RET_ERRNO = 0x7FFF0000, 0x00050000
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_CAPABILITY_VERSION_3 = 0x20080522

CGROUPS = "/sys/fs/cgroup"


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


# --- mounts ---------------------------------------------------------------------------------------------------------


def _mount(source: str, target: str, kind: str = "", flags: int = 0) -> None:
    _check(_libc.mount(source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), None), target)


def own_mounts() -> None:
    """A mount namespace whose changes nobody else sees."""
    syscalls.unshare(CLONE_NEWNS)
    _mount("none", "/", flags=MS_REC | MS_PRIVATE)


def without_btf() -> None:
    """/sys/kernel/btf is empty."""
    own_mounts()
    _mount("none", "/sys/kernel/btf", "tmpfs")


def with_read_only_bpffs() -> None:
    """The machine's own bpffs is read-only."""
    own_mounts()
    _mount("none", "/sys/fs/bpf", flags=MS_REMOUNT | MS_BIND | MS_RDONLY)


def with_read_only_folder(folder: str) -> None:
    """``folder`` can be read alone, as where an image or a ConfigMap gives it."""
    own_mounts()
    _mount(folder, folder, flags=MS_BIND)
    _mount("none", folder, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)


def with_private_bpffs() -> None:
    """Another bpffs is at the usual path; it ends with the namespace."""
    own_mounts()
    _mount("bpf", "/sys/fs/bpf", "bpf")


def without_bpffs() -> None:
    """Something other than a bpffs is at the usual path."""
    own_mounts()
    _mount("none", "/sys/fs/bpf", "tmpfs")


def with_own_run_folder(flags: int = 0) -> None:
    """/run/imds-guard is a new, empty folder."""
    own_mounts()
    os.makedirs("/run/imds-guard", mode=0o700, exist_ok=True)
    _mount("none", "/run/imds-guard", "tmpfs", flags)


def with_read_only_run_folder() -> None:
    """No lock file can be made."""
    with_own_run_folder(MS_RDONLY)


def without_cgroup2() -> None:
    """No cgroup2 is mounted, as on a machine with cgroup v1 alone."""
    own_mounts()
    for mount in mounts("cgroup2"):
        _check(_libc.umount2(mount.path.encode(), MNT_DETACH), mount.path)


def in_cgroup_namespace() -> str:
    """The process sees only its own cgroup and those below it. Returns the path of the mount."""
    syscalls.unshare(CLONE_NEWCGROUP)
    without_cgroup2()
    _mount("none", CGROUPS, "cgroup2")
    return CGROUPS


def with_own_proc() -> None:
    """/proc shows the process IDs of this PID namespace."""
    own_mounts()
    _mount("proc", "/proc", "proc")


def in_user_namespace() -> None:
    """The process is root of a user namespace, with all capabilities in it and none outside."""
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


# --- capabilities ---------------------------------------------------------------------------------------------------


def without_capabilities(*dropped: int) -> None:
    """Drops capabilities of this process and of all programs that it executes."""
    for number in dropped:
        _check(_libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0), f"dropping capability {number}")
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data), "capget")
    words = list(struct.unpack("=6I", data.raw[:24]))  # effective, permitted, inheritable; the low halves first
    for number in dropped:
        for kind in range(3):
            words[number // 32 * 3 + kind] &= ~(1 << number % 32)
    _check(_libc.capset(header, ctypes.create_string_buffer(struct.pack("=6I", *words))), "capset")


# --- seccomp --------------------------------------------------------------------------------------------------------


def forbid_bpf(code: int, commands: Sequence[int] = ()) -> None:
    """Sets a seccomp filter that answers bpf(2), or only these commands, with an errno. It can't be removed.

    The number of the system call is at offset 0 of struct seccomp_data, the low half of its first argument at 16.
    """
    low_half = 16 if struct.pack("=H", 1) == struct.pack("<H", 1) else 20
    number = syscall_number("bpf")
    tests = [(_JUMP_IF_EQUAL, len(commands) - at, 0, command) for at, command in enumerate(commands)]
    body = [(_LOAD_WORD, 0, 0, low_half), *tests, (_RETURN, 0, 0, _RET_ALLOW)] if commands else []
    program = [
        (_LOAD_WORD, 0, 0, 0),
        (_JUMP_IF_EQUAL, 1, 0, number),
        (_RETURN, 0, 0, _RET_ALLOW),
        *body,
        (_RETURN, 0, 0, _RET_ERRNO | code),
    ]
    code_buffer = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    fprog = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program), ctypes.addressof(code_buffer)))
    _check(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), fprog, 0, 0), "seccomp")


def forbid_attaching() -> None:
    """Forbids to attach, pin or change anything by eBPF, in case that a command which should refuse does not."""
    command = bpf.Command
    links = (command.LINK_CREATE, command.LINK_UPDATE, command.LINK_DETACH, command.PROG_ATTACH, command.PROG_DETACH)
    maps = (command.MAP_UPDATE_ELEM, command.MAP_DELETE_ELEM, command.MAP_UPDATE_BATCH, command.MAP_DELETE_BATCH)
    forbid_bpf(errno.EPERM, (*links, command.OBJ_PIN, *maps))
