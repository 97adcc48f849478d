# SPDX-License-Identifier: Apache-2.0
"""Links to cgroups, which programs run there, and pins."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from imds_guard.kernel.bpf.attr import (
    F_AFTER,
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

_MAX_PROGRAMS = 1024
"""Capacity for the IDs of a hook's programs. The maximum is BPF_CGROUP_MAX_PROGS (64), kernel/bpf/cgroup.c."""


class LinkDescription(NamedTuple):
    """A link. ``cgroup_id`` and ``attach_type`` are zero unless ``type`` is LinkType.CGROUP."""

    id: int
    type: int
    prog_id: int
    cgroup_id: int
    attach_type: int


def link_create(prog_fd: int, cgroup_fd: int, attach_type: int) -> int:
    """A link's fd: the program is attached beside all others ("multi"), in the last place.

    BPF_F_AFTER asks for the last place. A kernel that does not know this flag for cgroups answers EINVAL; it always
    attaches in the last place.
    """
    attr = LinkCreate(prog_fd=prog_fd, target_fd=cgroup_fd, attach_type=attach_type, flags=F_AFTER)
    fd = call(Command.LINK_CREATE, attr, expected=(errno.EINVAL,))
    if fd >= 0:
        return fd
    attr.flags = 0
    return call(Command.LINK_CREATE, attr)


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
    for identity in _link_ids():
        fd = call(Command.LINK_GET_FD_BY_ID, GetId(id=identity), expected=(errno.ENOENT,))
        if fd < 0:  # the link has gone meanwhile
            continue
        link = describe_link(fd)
        if link.type == LinkType.CGROUP and link.cgroup_id == cgroup_id:
            found.append((fd, link))
        else:
            os.close(fd)
    return found


def _link_ids() -> Iterator[int]:
    attr = GetId()
    while call(Command.LINK_GET_NEXT_ID, attr, expected=(errno.ENOENT,)) == 0:
        yield attr.next_id
        attr = GetId(id=attr.next_id)


def attached_programs(cgroup_fd: int, attach_type: int) -> list[int]:
    """IDs of the programs that are attached to this very cgroup at a hook, in the order they run (BPF_PROG_QUERY)."""
    ids = (ctypes.c_uint32 * _MAX_PROGRAMS)()
    attr = Query(target_fd=cgroup_fd, attach_type=attach_type, prog_ids=address(ids), prog_cnt=_MAX_PROGRAMS)
    call(Command.PROG_QUERY, attr)
    return list(ids[: attr.prog_cnt])


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
