# SPDX-License-Identifier: Apache-2.0
"""The numbers of the system calls that are made by number, for each architecture.

Sources in Linux: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h (aarch64, riscv64),
arch/s390/kernel/syscalls/syscall.tbl, arch/powerpc/kernel/syscalls/syscall.tbl.
"""

from __future__ import annotations

import errno
import os
import struct

_NAMES = ("bpf", "membarrier", "setgroups", "setresuid", "setresgid", "setfsuid", "setfsgid")
_GENERIC = (280, 283, 159, 147, 149, 151, 152)
_BY_ARCHITECTURE = {
    "x86_64": (321, 324, 116, 117, 119, 122, 123),
    "aarch64": _GENERIC,
    "riscv64": _GENERIC,
    "s390x": (351, 356, 206, 208, 210, 215, 216),
    "ppc64le": (361, 365, 81, 164, 169, 138, 139),
}
_EVERYWHERE = {"fsopen": 430, "fsconfig": 431, "fsmount": 432}
"""Since v5.1 a new system call has the same number on every architecture."""

ARCHITECTURES = tuple(sorted(_BY_ARCHITECTURE))


def syscall_number(name: str) -> int:
    """The number of a system call on this machine, as a 64-bit process must give it.

    Raises OSError for a 32-bit Python, for which a 64-bit kernel has other numbers, and for an unknown architecture.
    The errno is ENOSYS, as for a system call that the kernel lacks, so that iptables takes over from eBPF there.
    """
    machine = os.uname().machine
    if struct.calcsize("P") != 8:
        raise OSError(
            errno.ENOSYS,
            f"this Python is a 32-bit program (on {machine}), and the number of {name}(2) is known for 64-bit programs "
            "only; run imds-guard with a 64-bit Python",
        )
    if machine not in _BY_ARCHITECTURE:
        raise OSError(
            errno.ENOSYS,
            f"the number of {name}(2) on {machine} is not known; imds-guard runs on {', '.join(ARCHITECTURES)}",
        )
    return {**_EVERYWHERE, **dict(zip(_NAMES, _BY_ARCHITECTURE[machine]))}[name]
