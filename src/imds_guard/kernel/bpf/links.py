# SPDX-License-Identifier: Apache-2.0
"""Links to cgroups, which programs run there, and pins."""

from __future__ import annotations

import ctypes
import enum
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from imds_guard.kernel.bpf.attr import (
    F_ALLOW_MULTI,
    F_ALLOW_OVERRIDE,
    F_BEFORE,
    F_QUERY_EFFECTIVE,
    Command,
    GetId,
    Info,
    LinkCreate,
    LinkDetach,
    LinkInfo,
    LinkType,
    LinkUpdate,
    Pin,
    Query,
)
from imds_guard.kernel.bpf.syscall import address, call

MAX_PROGRAMS = 64
"""The maximum of programs of a cgroup at a hook: BPF_CGROUP_MAX_PROGS in kernel/bpf/cgroup.c."""

_MAX_IDS = 1024
"""Capacity for the IDs of a hook's programs, those of cgroups above included."""


class LinkDescription(NamedTuple):
    """A link. ``cgroup_id`` and ``attach_type`` are zero unless ``type`` is LinkType.CGROUP."""

    id: int
    type: int
    prog_id: int
    cgroup_id: int
    attach_type: int


def link_create(prog_fd: int, cgroup_fd: int, attach_type: int) -> int:
    """A link's fd: the program is attached beside all others ("multi"), in the last place."""
    return call(Command.LINK_CREATE, LinkCreate(prog_fd=prog_fd, target_fd=cgroup_fd, attach_type=attach_type))


def link_create_first(prog_fd: int, cgroup_fd: int, attach_type: int) -> int | None:
    """As link_create(), but in the first place; None when this kernel can't order the programs of a cgroup.

    BPF_F_BEFORE: since Linux 1209339844601 ("bpf: Implement mprog API on top of existing cgroup progs") (in v6.17), and
    in later updates of older series. Any other kernel answers EINVAL. BPF_F_PREORDER would run before the programs of
    cgroups below, too. It is not used: with such a program, BPF_LINK_UPDATE of any link replaced another program than
    the link's, until "bpf: Fix effective prog array index with BPF_F_PREORDER" (CVE-2026-72427).
    """
    attr = LinkCreate(prog_fd=prog_fd, target_fd=cgroup_fd, attach_type=attach_type, flags=F_BEFORE)
    fd = call(Command.LINK_CREATE, attr, expected=(errno.EINVAL,))
    return fd if fd >= 0 else None


def link_update(link_fd: int, prog_fd: int) -> None:
    """Replaces a link's program, with no moment without one."""
    call(Command.LINK_UPDATE, LinkUpdate(link_fd=link_fd, new_prog_fd=prog_fd))


def link_detach(link_fd: int) -> None:
    """Detaches a link at once. After an unpin alone the kernel does so some time later."""
    call(Command.LINK_DETACH, LinkDetach(link_fd=link_fd))


def describe_link(fd: int) -> LinkDescription:
    """BPF_OBJ_GET_INFO_BY_FD of a link."""
    info = LinkInfo()
    call(Command.OBJ_GET_INFO_BY_FD, Info(bpf_fd=fd, info_len=ctypes.sizeof(info), info=address(info)))
    cgroup_id, attach_type = (info.cgroup_id, info.attach_type) if info.type == LinkType.CGROUP else (0, 0)
    return LinkDescription(info.id, info.type, info.prog_id, cgroup_id, attach_type)


def links_of_cgroup(cgroup_id: int) -> list[tuple[int, LinkDescription]]:
    """(fd, description) of every link to a cgroup. The caller closes the fds."""
    found: list[tuple[int, LinkDescription]] = []
    for fd, link in _cgroup_links():
        if link.cgroup_id == cgroup_id:
            found.append((fd, link))
        else:
            os.close(fd)
    return found


def cgroup_links() -> list[LinkDescription]:
    """Every link to a cgroup."""
    found = []
    for fd, link in _cgroup_links():
        os.close(fd)
        found.append(link)
    return found


def _cgroup_links() -> Iterator[tuple[int, LinkDescription]]:
    for identity in _link_ids():
        # ENOENT: the link has gone meanwhile. EAGAIN: it is being made (bpf_link_by_id() in kernel/bpf/syscall.c).
        fd = call(Command.LINK_GET_FD_BY_ID, GetId(id=identity), expected=(errno.ENOENT, errno.EAGAIN))
        if fd < 0:
            continue
        try:
            link = describe_link(fd)
        except BaseException:
            os.close(fd)
            raise
        if link.type == LinkType.CGROUP:
            yield fd, link
        else:
            os.close(fd)


def _link_ids() -> Iterator[int]:
    attr = GetId()
    while call(Command.LINK_GET_NEXT_ID, attr, expected=(errno.ENOENT,)) == 0:
        yield attr.next_id
        attr = GetId(id=attr.next_id)


class Sharing(enum.Enum):
    """Whether programs of others can be attached beside those of a cgroup, and to cgroups below it."""

    MULTI = F_ALLOW_MULTI
    """Both: all run."""
    OVERRIDE = F_ALLOW_OVERRIDE
    """Below it only, where they run instead."""
    EXCLUSIVE = 0
    """Neither."""


class AttachedPrograms(NamedTuple):
    """The programs of a cgroup at a hook. ``sharing`` means nothing without programs."""

    ids: tuple[int, ...]
    sharing: Sharing


def programs_of_cgroup(cgroup_fd: int, attach_type: int) -> AttachedPrograms:
    """The programs that are attached to this very cgroup at a hook, in the order of its list (BPF_PROG_QUERY)."""
    ids, flags = _query(cgroup_fd, attach_type, 0)
    return AttachedPrograms(ids, Sharing(flags & (F_ALLOW_MULTI | F_ALLOW_OVERRIDE)))


def attached_programs(cgroup_fd: int, attach_type: int) -> list[int]:
    """IDs of the programs that are attached to this very cgroup at a hook, in the order of its list."""
    return list(programs_of_cgroup(cgroup_fd, attach_type).ids)


def running_programs(cgroup_fd: int, attach_type: int) -> list[int]:
    """IDs of the programs that run for the processes of a cgroup, in this order: its own, and those of cgroups above.

    compute_effective_progs() in kernel/bpf/cgroup.c: first those with BPF_F_PREORDER, beginning with the topmost
    cgroup; then all others, beginning with this cgroup.
    """
    return list(_query(cgroup_fd, attach_type, F_QUERY_EFFECTIVE)[0])


def _query(cgroup_fd: int, attach_type: int, flags: int) -> tuple[tuple[int, ...], int]:
    ids = (ctypes.c_uint32 * _MAX_IDS)()
    attr = Query(target_fd=cgroup_fd, attach_type=attach_type, query_flags=flags)
    attr.prog_ids, attr.prog_cnt = address(ids), _MAX_IDS
    call(Command.PROG_QUERY, attr)
    return tuple(ids[: attr.prog_cnt]), attr.attach_flags


# --- pins -----------------------------------------------------------------------------------------------------------


def pin(fd: int, path: str) -> None:
    """Pins a map, program or link at a path in a bpffs."""
    _pin_call(Command.OBJ_PIN, path, fd)


def pinned(path: str) -> int:
    """The fd of the map, program or link that is pinned at a path."""
    return _pin_call(Command.OBJ_GET, path, 0)


def _pin_call(command: Command, path: str, fd: int) -> int:
    name = ctypes.create_string_buffer(os.fsencode(path))
    return call(command, Pin(pathname=address(name), bpf_fd=fd))
