# SPDX-License-Identifier: Apache-2.0
"""Programs for the hooks of cgroups: load, describe, count their runs."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from imds_guard.errors import system_text
from imds_guard.kernel import btf_encode
from imds_guard.kernel.bpf.attr import (
    AttachType,
    Command,
    EnableStats,
    FuncInfo,
    GetId,
    Info,
    ProgInfo,
    ProgLoad,
    ProgType,
    object_name,
)
from imds_guard.kernel.bpf.syscall import address, call, load_btf

_LOG_STATS = 4
"""A log without the instructions on each path (BPF_LOG_STATS in Linux include/linux/bpf_verifier.h). The reason of a
refusal is in it all the same: verbose() in kernel/bpf/verifier.c writes at each level. With every path the log of a
large program takes 100 MiB and more, and the machine may have 512."""
_LOG_BYTES = 1 << 20

_MAX_MAPS = 64
"""Capacity for the IDs of a program's maps."""


def prog_load(
    instructions: bytes,
    name: str,
    attach_type: int,
    log: ctypes.Array[ctypes.c_char] | None = None,
    functions: Sequence[tuple[str, int]] = (),
) -> int:
    """The fd of a verified program for a cgroup's hook. The verifier writes to ``log``.

    ``functions``: the name and the first instruction of each, when there are several. A function that the kernel is to
    call back must have a type (check_ld_imm() in kernel/bpf/verifier.c).
    """
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Dual BSD/GPL")
    attr = ProgLoad(insns=address(code), insn_cnt=len(instructions) // 8, license=address(licence))
    attr.prog_name, attr.expected_attach_type = object_name(name), attach_type
    is_egress = attach_type == AttachType.CGROUP_INET_EGRESS
    attr.prog_type = ProgType.CGROUP_SKB if is_egress else ProgType.CGROUP_SOCK_ADDR
    if log is not None:
        attr.log_level, attr.log_size, attr.log_buf = _LOG_STATS, len(log), address(log)
    return call(Command.PROG_LOAD, attr) if len(functions) < 2 else _load_with_types(attr, functions)


def _load_with_types(attr: ProgLoad, functions: Sequence[tuple[str, int]]) -> int:
    starts = (FuncInfo * len(functions))()
    for number, (_, at) in enumerate(functions):
        starts[number].insn_off, starts[number].type_id = at, btf_encode.FIRST_FUNCTION + number
    attr.func_info, attr.func_info_cnt = address(starts), len(functions)
    attr.func_info_rec_size = ctypes.sizeof(FuncInfo)
    attr.prog_btf_fd = btf_fd = load_btf(btf_encode.functions([name for name, _ in functions]))
    try:
        return call(Command.PROG_LOAD, attr)
    finally:
        os.close(btf_fd)


def prog_load_explained(
    instructions: bytes, name: str, attach_type: int, functions: Sequence[tuple[str, int]] = ()
) -> tuple[int, str]:
    """A program's fd and "", or -1 and the last lines of the verifier's log.

    The log is asked for only after a failure. Otherwise a log that does not fit would be ENOSPC for a good program.
    """
    try:
        return prog_load(instructions, name, attach_type, None, functions), ""
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.E2BIG, errno.EFAULT):
            raise
        refusal = error
    log = ctypes.create_string_buffer(_LOG_BYTES)
    try:
        return prog_load(instructions, name, attach_type, log, functions), ""
    except OSError:  # the same once more: the log has the reason
        pass
    last_lines = log.value.decode(errors="replace").strip().splitlines()[-4:]
    return -1, "; ".join([system_text(refusal), *last_lines])


class ProgramDescription(NamedTuple):
    """What runs, and on which maps. Times and counts are zero unless enable_run_statistics() is on."""

    id: int
    name: str
    map_ids: tuple[int, ...]
    run_time_ns: int
    run_count: int
    type: int
    uid: int
    """The user who loaded it."""


def describe_program(fd: int) -> ProgramDescription:
    """BPF_OBJ_GET_INFO_BY_FD of a program."""
    map_ids = (ctypes.c_uint32 * _MAX_MAPS)()
    info = ProgInfo(nr_map_ids=_MAX_MAPS, map_ids=address(map_ids))
    call(Command.OBJ_GET_INFO_BY_FD, Info(bpf_fd=fd, info_len=ctypes.sizeof(info), info=address(info)))
    ids = tuple(map_ids[: min(info.nr_map_ids, _MAX_MAPS)])
    name = info.name.decode(errors="replace")
    return ProgramDescription(info.id, name, ids, info.run_time_ns, info.run_cnt, info.type, info.created_by_uid)


def program_by_id(identity: int) -> int | None:
    """A program's fd, or None when it no longer exists."""
    fd = call(Command.PROG_GET_FD_BY_ID, GetId(id=identity), expected=(errno.ENOENT,))
    return fd if fd >= 0 else None


def programs_of_type(wanted: ProgType) -> Iterator[ProgramDescription]:
    """Every program of a type that is loaded, attached or not."""
    attr = GetId()
    while call(Command.PROG_GET_NEXT_ID, attr, expected=(errno.ENOENT,)) == 0:
        fd = program_by_id(attr.next_id)
        if fd is not None:
            try:
                found = describe_program(fd)
            finally:
                os.close(fd)
            if found.type == wanted:
                yield found
        attr = GetId(id=attr.next_id)


def enable_run_statistics() -> int:
    """An fd. While it is open the kernel counts each program's runs and their time (BPF_ENABLE_STATS, v5.8)."""
    return call(Command.ENABLE_STATS, EnableStats())
