# SPDX-License-Identifier: Apache-2.0
"""The numbers of the system calls that are made by number, for each binary interface. Tests take theirs from here, too.

Sources in Linux: arch/x86/entry/syscalls/syscall_64.tbl and syscall_32.tbl, arch/arm/tools/syscall.tbl,
arch/arm64/tools/syscall_64.tbl and scripts/syscall.tbl (aarch64, loongarch64, riscv64; up to v6.10
include/uapi/asm-generic/unistd.h), arch/s390/kernel/syscalls/syscall.tbl, arch/powerpc/kernel/syscalls/syscall.tbl.
"""

from __future__ import annotations

import errno
import os
import re
import struct

_NAMES = ("bpf", "membarrier", "setgroups", "setresuid", "setresgid", "setfsuid", "setfsgid", "exit")
_GENERIC = (280, 283, 159, 147, 149, 151, 152, 93)
_POWERPC = (361, 365, 81, 164, 169, 138, 139, 1)
# For i386 and arm these are setgroups32(2) and so on: the calls without the suffix take IDs of 16 bits.
_BY_INTERFACE = {
    "x86_64": (321, 324, 116, 117, 119, 122, 123, 60),
    "i386": (357, 375, 206, 208, 210, 215, 216, 1),
    "aarch64": _GENERIC,
    "arm": (386, 389, 206, 208, 210, 215, 216, 1),
    "loongarch64": _GENERIC,
    "riscv64": _GENERIC,
    "s390x": (351, 356, 206, 208, 210, 215, 216, 1),
    "ppc64": _POWERPC,
    "ppc64le": _POWERPC,
}
_EVERYWHERE = {
    **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"fsopen": 430, "fsconfig": 431, "fsmount": 432, "openat2": 437, "pidfd_getfd": 438},
}
"""Since v5.1 a new system call has the same number on every architecture but alpha."""

_OF_32_BITS = {r"x86_64|i[3-6]86": "i386", r"aarch64|arm.*": "arm"}
"""The kernel's name of the machine -> the interface of its 32-bit programs."""

INTERFACES = tuple(sorted(_BY_INTERFACE))


def is_64_bit() -> bool:
    """Whether this process is a 64-bit program. A 64-bit kernel has other numbers for 32-bit ones."""
    return struct.calcsize("P") == 8


def syscall_number(name: str) -> int:
    """The number of a system call on this machine, as this process must give it.

    Raises OSError where it is not known. The errno is ENOSYS, as for a system call that the kernel lacks, so that
    iptables takes over from eBPF there.
    """
    if name in _EVERYWHERE:
        return _EVERYWHERE[name]
    machine = os.uname().machine
    interface = machine if is_64_bit() else _interface_of_32_bits(machine)
    if interface not in _BY_INTERFACE:
        bits = 64 if is_64_bit() else 32
        raise OSError(
            errno.ENOSYS,
            f"the number of {name}(2) for a {bits}-bit program on {machine} is not known, but those for "
            f"{', '.join(INTERFACES)} are",
        )
    return dict(zip(_NAMES, _BY_INTERFACE[interface]))[name]


def _interface_of_32_bits(machine: str) -> str | None:
    return next((interface for names, interface in _OF_32_BITS.items() if re.fullmatch(names, machine)), None)
