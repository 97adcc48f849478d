# SPDX-License-Identifier: Apache-2.0
"""Whether this kernel and this process can do what the backend needs. Each probe does the smallest real thing."""

from __future__ import annotations

import errno
import os
import struct

from imds_guard.backends.ebpf import abi
from imds_guard.errors import NotPermitted, Unsupported, system_text
from imds_guard.kernel import bpf, namespaces, privileges, syscall_numbers

_ELSEWHERE = "the iptables backend can serve instead"


def require_host() -> None:
    """Raises unless this process has the capabilities and is in the host's user and PID namespaces."""
    missing = privileges.missing_capabilities([privileges.CAP_BPF, privileges.CAP_PERFMON, privileges.CAP_NET_ADMIN])
    if missing:
        raise NotPermitted(
            f"working with eBPF: this process lacks {', '.join(missing)}; run it as root, or give it the capabilities"
        )
    if namespaces.namespace_inode("user") != namespaces.INITIAL_USER_NAMESPACE:
        raise NotPermitted(
            "working with eBPF: this process is root of a user namespace alone, which may attach nothing; run it as "
            "root of the host"
        )
    if namespaces.namespace_inode("pid") != namespaces.INITIAL_PID_NAMESPACE:
        raise Unsupported(
            "looking at the PID namespace: this process is in a container, where every process of the host would count "
            "as one in a container; run it on the host, or in the host's PID namespace"
        )


def require_64_bit() -> None:
    """Raises unless this Python is a 64-bit program: our programs read the memory of 64-bit kernels.

    A guard that is in force can be read, changed and removed by a 32-bit Python, too.
    """
    if not syscall_numbers.is_64_bit():
        machine = os.uname().machine
        raise Unsupported(
            f"looking whether eBPF programs can be compiled: this Python is a 32-bit program (on {machine}), "
            f"and imds-guard compiles them in a 64-bit one only; run it with a 64-bit Python; {_ELSEWHERE}"
        )


def require_bpf() -> None:
    """Raises unless bpf(2) makes maps and loads programs that read credentials."""
    privileges.lift_memory_lock_limit()
    _require_maps()
    _require_reading_programs()


def _require_maps() -> None:
    try:
        os.close(bpf.map_create(bpf.MapShape(bpf.MapType.LPM_TRIE, 8, 4, 1, bpf.F_NO_PREALLOC), "ig_probe"))
    except OSError as error:
        why = {
            errno.ENOSYS: "the kernel was built without it, or a seccomp filter forbids it",
            errno.EPERM: "a seccomp filter, a security module or RLIMIT_MEMLOCK forbids it",
        }.get(error.errno or 0, "the kernel lacks something that it needs")
        raise Unsupported(f"making an eBPF map: {system_text(error)}; {why}; {_ELSEWHERE}") from error


def _require_reading_programs() -> None:
    attach_type, prefix, *_ = abi.HOOKS["connect4"]
    try:
        fd, refusal = bpf.prog_load_explained(_READS_KERNEL_MEMORY, f"{prefix}_probe", attach_type)
    except OSError as error:
        raise Unsupported(f"loading an eBPF program: {system_text(error)}; {_ELSEWHERE}") from error
    if fd < 0:
        raise Unsupported(
            f"loading an eBPF program that reads the caller's credentials: the kernel refused it ({refusal}); it is "
            f"likely booted with lockdown=confidentiality, or has no CONFIG_CGROUP_BPF; {_ELSEWHERE}"
        )
    os.close(fd)


def knows_current_task() -> bool:
    """True when programs here may use bpf_get_current_task_btf(). The verifier knows the type of its result."""
    attach_type, prefix, *_ = abi.HOOKS["connect4"]
    code = _instruction(0x85, 0, 0, 158) + _instruction(0xB7, 0, 0, 1) + _instruction(0x95, 0, 0, 0)
    try:
        os.close(bpf.prog_load(code, f"{prefix}_probe", attach_type))
    except OSError:
        return False
    return True


def knows_loops() -> bool:
    """True when programs here may use bpf_loop(). It came with v5.17 and needs the JIT."""
    attach_type, prefix, *_ = abi.HOOKS["connect4"]
    try:
        os.close(bpf.prog_load(_LOOPS, f"{prefix}_probe", attach_type, None, (("ig_probe", 0), ("ig_step", 8))))
    except OSError:
        return False
    return True


def _instruction(opcode: int, registers: int, offset: int, immediate: int) -> bytes:
    return struct.pack("=BBhi", opcode, registers, offset, immediate)


_READS_KERNEL_MEMORY = b"".join(
    (
        _instruction(0x85, 0, 0, 35),  # r0 = bpf_get_current_task()
        _instruction(0xBF, 0x03, 0, 0),  # r3 = r0
        _instruction(0xBF, 0xA1, 0, 0),  # r1 = r10
        _instruction(0x07, 0x01, 0, -8),  # r1 += -8
        _instruction(0xB7, 0x02, 0, 8),  # r2 = 8
        _instruction(0x85, 0, 0, 113),  # bpf_probe_read_kernel(r1, r2, r3)
        _instruction(0xB7, 0x00, 0, 1),  # r0 = 1
        _instruction(0x95, 0, 0, 0),  # exit
    )
)
_LOOPS = b"".join(
    (
        _instruction(0xB7, 0x01, 0, 1),  # r1 = 1
        _instruction(0x18, 0x42, 0, 6),  # r2 = the function that begins six instructions later
        _instruction(0x00, 0x00, 0, 0),
        _instruction(0xB7, 0x03, 0, 0),  # r3 = 0
        _instruction(0xB7, 0x04, 0, 0),  # r4 = 0
        _instruction(0x85, 0, 0, 181),  # bpf_loop(r1, r2, r3, r4)
        _instruction(0xB7, 0x00, 0, 1),  # r0 = 1
        _instruction(0x95, 0, 0, 0),  # exit
        _instruction(0xB7, 0x00, 0, 0),  # r0 = 0
        _instruction(0x95, 0, 0, 0),  # exit
    )
)
