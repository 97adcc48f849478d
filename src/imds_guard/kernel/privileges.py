# SPDX-License-Identifier: Apache-2.0
"""The capabilities and the memory lock limit of this process."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable

from imds_guard.errors import NotPermitted
from imds_guard.kernel import syscalls

# Source: include/uapi/linux/capability.h
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_NET_BIND_SERVICE = 1, 2, 5, 6, 7, 10
CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 12, 13, 19, 21, 38, 39
_NAMES = {
    CAP_DAC_OVERRIDE: "CAP_DAC_OVERRIDE",
    CAP_DAC_READ_SEARCH: "CAP_DAC_READ_SEARCH",
    CAP_KILL: "CAP_KILL",
    CAP_SETGID: "CAP_SETGID",
    CAP_SETUID: "CAP_SETUID",
    CAP_NET_BIND_SERVICE: "CAP_NET_BIND_SERVICE",
    CAP_NET_ADMIN: "CAP_NET_ADMIN",
    CAP_NET_RAW: "CAP_NET_RAW",
    CAP_SYS_PTRACE: "CAP_SYS_PTRACE",
    CAP_SYS_ADMIN: "CAP_SYS_ADMIN",
    CAP_PERFMON: "CAP_PERFMON",
    CAP_BPF: "CAP_BPF",
}


def effective_capabilities() -> int:
    """CapEff of this process, one bit for each capability (capabilities(7))."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def capability_name(capability: int) -> str:
    """``CAP_SYS_ADMIN``."""
    return _NAMES[capability]


def missing_capabilities(wanted: Iterable[int]) -> list[str]:
    """The names of those that this process lacks. CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON (capabilities(7))."""
    held = effective_capabilities()
    if held >> CAP_SYS_ADMIN & 1:
        held |= 1 << CAP_BPF | 1 << CAP_PERFMON
    return [capability_name(capability) for capability in wanted if not held >> capability & 1]


def drop_to(uid: int, gid: int) -> None:
    """Gives up root for good: this process becomes a user without capabilities. Raises NotPermitted, OSError."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)  # clears the permitted and effective capabilities (capabilities(7))
    syscalls.no_new_privileges()
    if uid == 0 or effective_capabilities():
        raise NotPermitted(f"becoming user {uid}: the process would keep capabilities")


def lift_open_files_limit() -> int:
    """Raises RLIMIT_NOFILE as far as this process may without a capability, and returns it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def lift_memory_lock_limit() -> None:
    """Raises RLIMIT_MEMLOCK as far as this process may. Before v5.11 maps count against it; the default is 64 KiB."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    except (ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def memory_lock_limit() -> int | None:
    """RLIMIT_MEMLOCK in bytes, or None for unlimited."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft
