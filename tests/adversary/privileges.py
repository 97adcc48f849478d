# SPDX-License-Identifier: Apache-2.0
"""The privileges of the attacker: IDs, single capabilities, user namespaces. Also how a scene is prepared."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
from collections.abc import Iterable, Sequence
from typing import Callable, TypeVar

from imds_guard.errors import GuardError
from imds_guard.kernel import children, syscalls
from imds_guard.kernel.credentials import become

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)

# Source: include/uapi/linux/capability.h and prctl.h
CAP_SETUID, CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_PTRACE = 7, 12, 13, 19
_CAPABILITY_VERSION_3 = 0x20080522
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 4, 8

SPARE_ROUTE = ("10.66.66.0/24", "dev", "lo", "src", "10.66.0.1")
"""A route to addresses that are not assigned, for which the kernel answers no packet."""


def become_user(uid: int, gid: int, groups: Sequence[int] = (), capabilities: Iterable[int] = ()) -> None:
    """Gives the calling thread these IDs and only these capabilities.

    The process becomes dumpable and so owns its /proc files, as after the execve(2) that usually follows (proc(5)).
    """
    _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
    become(uids=(uid,) * 3, gids=(gid,) * 3, groups=groups)
    _hold_only(sum(1 << number for number in set(capabilities)))
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "PR_SET_DUMPABLE")


def _hold_only(mask: int) -> None:
    """Sets the permitted and effective capabilities. None is inheritable: an exec drops them (capabilities(7))."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = ctypes.create_string_buffer(struct.pack("=6I", low, low, 0, high, high, 0))
    _check(_libc.capset(header, data), "capset")


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def prepare_network() -> None:
    """Enables Fast Open without a cookie (ip-sysctl.rst), and adds a route to unassigned addresses."""
    with open("/proc/sys/net/ipv4/tcp_fastopen", "w", encoding="ascii") as switch:
        switch.write(str(0x1 | 0x2 | 0x4 | 0x200 | 0x400))
    command("ip", "route", "add", *SPARE_ROUTE)


def command(*argv: str) -> None:
    """Runs a program. Raises OSError with its output when it fails."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise OSError(0, f"{' '.join(argv)}: {done.stdout.strip()}")


# --- children -------------------------------------------------------------------------------------------------------


class Refused(GuardError):
    """The attack failed."""


def or_refused(fn: Callable[[], T]) -> T:
    """What ``fn`` returns. Raises Refused with the errno where it raised OSError."""
    try:
        return fn()
    except OSError as error:
        raise Refused(f"{errno.errorcode.get(error.errno or 0, type(error).__name__)} ({error})") from error


def in_child(fn: Callable[[], T]) -> T:
    """What ``fn`` returns in a forked child. Raises Refused where it raised OSError."""
    return children.run_in_child(lambda: or_refused(fn))


# --- user namespaces ------------------------------------------------------------------------------------------------


def enter_user_namespace(inner_uid: int, inner_gid: int) -> None:
    """Enters a user namespace as anybody can make it: it maps one user and one group, which are the caller's own."""
    uid, gid = os.geteuid(), os.getegid()
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inner_uid} {uid} 1"), ("gid_map", f"{inner_gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def in_mapped_user_namespace(maps: list[str], fn: Callable[[], T], group_maps: list[str] | None = None) -> T:
    """What ``fn`` returns in a child in a user namespace with these maps of IDs, which root writes.

    Groups have the same maps unless ``group_maps`` is given.

    newuidmap(1) can write such maps for a user to whom /etc/subuid assigns the IDs.
    """
    to_parent, to_child = os.pipe(), os.pipe()

    def inside() -> T:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        os.write(to_parent[1], b"%d" % os.getpid())
        os.read(to_child[0], 1)
        return fn()

    def write_maps() -> None:
        pid = int(os.read(to_parent[0], 32))
        for name, lines in (("uid_map", maps), ("gid_map", maps if group_maps is None else group_maps)):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write("\n".join(lines))
        os.write(to_child[1], b".")

    writer = children.fork(write_maps)
    try:
        return in_child(inside)
    finally:
        children.end(writer)
        for fd in (*to_parent, *to_child):
            os.close(fd)
