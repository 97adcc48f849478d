# SPDX-License-Identifier: Apache-2.0
"""bpf(2) for programs and links as well: whole commands run, and what they do to the hooks is recorded, too.

Nobody verifies a program here. It stands for the machine whose maps its instructions name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Callable

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.kernel.bpf.attr import (
    Command,
    GetId,
    Info,
    LinkCreate,
    LinkDetach,
    LinkInfo,
    LinkType,
    LinkUpdate,
    ProgInfo,
    ProgLoad,
    Query,
)
from tests.vm.machine import Machine
from tests.vm.map_calls import MapCalls, MapObject, Operation, Steps, error, read

_HOOK_OF = {int(shape.attach_type): hook for hook, shape in abi.HOOKS.items()}


def _files(folder: str) -> Iterator[tuple[str, str]]:
    return ((at, name) for at, _, names in os.walk(folder) for name in names)


@dataclass(frozen=True)
class HookChange:
    """A hook runs on the maps of this machine from now on; with None it is detached."""

    hooks: dict[str, Machine | None]
    hook: str
    machine: Machine | None

    def apply(self) -> None:
        """Does it again."""
        self.hooks[self.hook] = self.machine


@dataclass
class ProgramObject:
    """A program and its maps. A probe has none."""

    identity: int
    name: bytes
    maps: tuple[MapObject, ...]

    @property
    def machine(self) -> Machine:
        """The machine whose policy it reads."""
        (found,) = (one.machine for one in self.maps if one.number is Map.CONFIG)
        return found


@dataclass
class LinkObject:
    """A link to a cgroup. ``cgroup`` is 0 when it was detached."""

    identity: int
    program: ProgramObject
    cgroup: int
    hook: str


class Killed(BaseException):
    """The process is no more: every further system call raises it, too."""


class CommandCalls(MapCalls):
    """The system calls of one machine with one guarded cgroup."""

    def __init__(self, machine: Machine, cgroup: int, bpffs: str) -> None:
        super().__init__(machine)
        self._bpffs = bpffs
        self.hooks: dict[str, Machine | None] = dict.fromkeys(abi.HOOKS)
        """On which machine's maps each hook runs."""
        self.links: list[LinkObject] = []
        self.kill_after: int | None = None
        """After how many operations the process of a command is killed; with ``kill_after_flip``: after a flip."""
        self.kill_after_flip = False
        self._cgroup = cgroup
        self._programs: dict[int, ProgramObject] = {}
        self._commands.update(
            {
                Command.PROG_LOAD: (ProgLoad, self._load),
                Command.PROG_QUERY: (Query, self._query),
                Command.PROG_GET_FD_BY_ID: (GetId, self._program_by_id),
                Command.LINK_CREATE: (LinkCreate, self._link),
                Command.LINK_UPDATE: (LinkUpdate, self._update_link),
                Command.LINK_DETACH: (LinkDetach, self._detach),
                Command.LINK_GET_NEXT_ID: (GetId, self._next_link),
                Command.LINK_GET_FD_BY_ID: (GetId, self._link_by_id),
                Command.OBJ_GET_INFO_BY_FD: (Info, self._info),
            }
        )

    def record(self, change: Callable[[], object]) -> Steps:
        """MapCalls.record(). At the end, links that nothing pins are detached: nothing else holds them."""

        def whole() -> None:
            with suppress(Killed):
                change()
            self.kill_after = None
            pinned = [self._pinned.get(os.stat(os.path.join(at, name)).st_ino) for at, name in _files(self._bpffs)]
            for link in self.links:
                if link.cgroup and not any(one is link for one in pinned):
                    link.cgroup = 0
                    self._changed(link)

        return super().record(whole)

    def _membarrier(self, command: int) -> None:
        self._live()
        super()._membarrier(command)

    def _bpf(self, command: int, buffer: ctypes.Array[ctypes.c_char], size: int) -> tuple[int, int]:
        self._live()
        return super()._bpf(command, buffer, size)

    def _live(self) -> None:
        done = self._operations
        if self.kill_after_flip:
            flips = [at for at, one in enumerate(done) if isinstance(one, Operation) and one.number is Map.CONFIG]
            done = done[flips[0] + 1 :] if flips else []
        if self.kill_after is not None and len(done) >= self.kill_after and self._operations:
            raise Killed

    def _load(self, attr: ProgLoad) -> int:
        code = read(attr.insns, 8 * attr.insn_cnt)
        fds = [
            immediate
            for opcode, registers, _, immediate in struct.iter_unpack("=BBhi", code)
            if opcode == 0x18 and registers >> 4 == 1  # BPF_LD | BPF_DW | BPF_IMM, BPF_PSEUDO_MAP_FD
        ]
        maps = {self._objects[fd].identity: self._objects[fd] for fd in fds}
        made = ProgramObject(next(self._identities), attr.prog_name, tuple(maps.values()))
        self._programs[made.identity] = made
        return self._fd(made)

    def _query(self, attr: Query) -> int:
        found = [
            link.program.identity for link in self.links if link.cgroup and link.hook == _HOOK_OF[attr.attach_type]
        ]
        ctypes.memmove(attr.prog_ids, struct.pack(f"={len(found)}I", *found), 4 * len(found))
        attr.prog_cnt = len(found)
        return 0

    def _program_by_id(self, attr: GetId) -> int:
        if attr.id not in self._programs:
            raise error(errno.ENOENT)
        return self._fd(self._programs[attr.id])

    # --- links --------------------------------------------------------------------------------------------------------

    def _link(self, attr: LinkCreate) -> int:
        if attr.flags:
            raise error(errno.EINVAL)  # a kernel that does not know BPF_F_AFTER
        made = LinkObject(next(self._identities), self._objects[attr.prog_fd], self._cgroup, _HOOK_OF[attr.attach_type])
        self.links.append(made)
        self._changed(made)
        return self._fd(made)

    def _update_link(self, attr: LinkUpdate) -> int:
        link: LinkObject = self._objects[attr.link_fd]
        link.program = self._objects[attr.new_prog_fd]
        self._changed(link)
        return 0

    def _detach(self, attr: LinkDetach) -> int:
        link: LinkObject = self._objects[attr.link_fd]
        link.cgroup = 0
        self._changed(link)
        return 0

    def _changed(self, link: LinkObject) -> None:
        change = HookChange(self.hooks, link.hook, link.program.machine if link.cgroup else None)
        change.apply()
        self._operations.append(change)

    def _next_link(self, attr: GetId) -> int:
        following = [link.identity for link in self.links if link.identity > attr.id]
        if not following:
            raise error(errno.ENOENT)
        attr.next_id = min(following)
        return 0

    def _link_by_id(self, attr: GetId) -> int:
        return self._fd(next(link for link in self.links if link.identity == attr.id))

    # --- descriptions -------------------------------------------------------------------------------------------------

    def _info(self, attr: Info) -> int:
        of: Any = self._objects[attr.bpf_fd]
        if isinstance(of, MapObject):
            return self._describe(attr)
        if isinstance(of, LinkObject):
            attach_type = int(abi.HOOKS[of.hook].attach_type)
            described: ctypes.Structure = LinkInfo(
                LinkType.CGROUP, of.identity, of.program.identity, 0, of.cgroup, attach_type
            )
        else:
            described = ProgInfo.from_buffer_copy(read(attr.info, ctypes.sizeof(ProgInfo)))
            identities = [one.identity for one in of.maps]
            ctypes.memmove(described.map_ids, struct.pack(f"={len(identities)}I", *identities), 4 * len(identities))
            described.id, described.name, described.nr_map_ids = of.identity, of.name, len(identities)
        ctypes.memmove(attr.info, bytes(described), ctypes.sizeof(described))
        return 0

    # --- for tests ----------------------------------------------------------------------------------------------------

    def object_of(self, hook: str, number: Map) -> MapObject:
        """The map that the program of a hook uses."""
        (link,) = (one for one in self.links if one.hook == hook and one.cgroup)
        (found,) = (one for one in link.program.maps if one.number is number)
        return found

    def shrink(self, number: Map) -> None:
        """A map in use is smaller than this version makes it, as an earlier version may have made it."""
        of = self.object_of("connect4", number)
        of.shape = of.shape._replace(max_entries=of.shape.max_entries // 2)
