# SPDX-License-Identifier: Apache-2.0
"""The hooks of a cgroup: which programs are attached, and how ours are attached, updated and detached by links."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.pins import link_pin
from imds_guard.errors import GuardError, Unsupported, system_text, trying
from imds_guard.kernel import bpf
from imds_guard.kernel.cgroup import Cgroup

if TYPE_CHECKING:
    from imds_guard.backends.ebpf.program import Defines


class Attached(NamedTuple):
    """A program at a hook. ``version`` is None for somebody else's program."""

    id: int
    name: str
    version: str | None
    map_ids: tuple[int, ...] = ()
    run_count: int = 0
    run_time_ns: int = 0


class Hook(NamedTuple):
    """One hook in the kernel: every program attached to this cgroup there, and the one that our link holds."""

    name: str
    attached: tuple[Attached, ...]
    """In the order of the cgroup's list."""
    linked: int | None = None
    """The ID of the program that our pinned link holds; None when there is no link, or it is no longer attached."""
    running: tuple[Attached, ...] = ()
    """What runs for the processes of this cgroup, in this order: also programs of cgroups above."""

    @property
    def order(self) -> tuple[Attached, ...]:
        """``running``; the list of this cgroup where only that is known."""
        return self.running or self.attached

    @property
    def ours(self) -> Attached | None:
        """Our program, when the pinned link holds it and the kernel runs it here."""
        return next((p for p in self.order if p.id == self.linked and p in self.attached and p.version), None)

    @property
    def is_first(self) -> bool:
        """True when our program is the first of the cgroup's list. BPF_F_PREORDER can still put others in front."""
        return self.ours is not None and self.attached[0] == self.ours

    @property
    def is_reordered(self) -> bool:
        """True when programs run in another order than that of the list, which BPF_F_PREORDER does.

        Then BPF_LINK_UPDATE can't be used: see bpf.link_create_first().
        """
        return self.order[: len(self.attached)] != self.attached

    @property
    def unpinned(self) -> list[Attached]:
        """Programs of ours that no pinned link holds."""
        return [p for p in self.attached if p.version is not None and p.id != self.linked]


_NO_CGROUP_PROGRAMS = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP)
"""Errors of a kernel without programs on cgroups. Any other error may be temporary, like a lack of memory."""


def inspect(cgroup: Cgroup, folder: str | None) -> list[Hook]:
    """Every hook: the attached programs by BPF_PROG_QUERY, and the program of our pinned link."""
    return [_inspect(name, shape.attach_type, cgroup, folder) for name, shape in abi.HOOKS.items()]


def _inspect(hook: str, attach_type: int, cgroup: Cgroup, folder: str | None) -> Hook:
    with asking(f"what is attached to {cgroup.path} at {hook}"):
        listed = bpf.attached_programs(cgroup.fd, attach_type)
        running = bpf.running_programs(cgroup.fd, attach_type) if listed else []
    found = {identity: _describe(hook, identity) for identity in dict.fromkeys([*listed, *running])}
    attached, runs = (tuple(p for p in map(found.get, ids) if p is not None) for ids in (listed, running))
    return Hook(hook, attached, _linked(hook, cgroup, folder) if folder else None, runs)


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Explains errors of BPF_PROG_QUERY."""
    try:
        yield
    except OSError as error:
        said = f"asking {what}: {system_text(error)}"
        if error.errno not in _NO_CGROUP_PROGRAMS:
            raise GuardError(f"{said}; nothing was changed, run the command again") from error
        raise Unsupported(
            f"{said}; the kernel has no programs on cgroups (CONFIG_CGROUP_BPF), or something forbids bpf(2) to this "
            "process"
        ) from error


def _describe(hook: str, identity: int) -> Attached | None:
    with trying(f"asking about eBPF program {identity}", "the state is not known"):
        fd = bpf.program_by_id(identity)
        if fd is None:
            return None
        try:
            found = bpf.describe_program(fd)
        finally:
            os.close(fd)
    version = abi.version_in_name(hook, found.name)
    return Attached(identity, found.name, version, found.map_ids, found.run_count, found.run_time_ns)


def _linked(hook: str, cgroup: Cgroup, folder: str) -> int | None:
    """The ID of the program of our pinned link. None without a link, and for a link to another or a removed cgroup."""
    fd = open_link(hook, folder)
    if fd is None:
        return None
    try:
        link = bpf.describe_link(fd)
    finally:
        os.close(fd)
    return link.prog_id if link.cgroup_id == cgroup.id else None


def open_link(hook: str, folder: str) -> int | None:
    """The fd of a hook's link that is pinned in a folder, or None."""
    try:
        return bpf.pinned(link_pin(folder, hook))
    except FileNotFoundError:
        return None


def pinned_links(folder: str) -> list[bpf.LinkDescription]:
    """The links that are pinned in a folder."""
    found = []
    for hook in abi.HOOKS:
        fd = open_link(hook, folder)
        if fd is not None:
            try:
                found.append(bpf.describe_link(fd))
            finally:
                os.close(fd)
    return found


def attach(
    cgroup: Cgroup, folder: str, map_fds: Sequence[int], found: Sequence[Hook], defines: Defines, pins: str = ""
) -> None:
    """Compiles the programs and attaches one to each hook: by LINK_UPDATE of the link in ``folder``, or by a new link.

    All are loaded before the first is attached. The links are pinned in ``pins``, by default in ``folder``.
    """
    from imds_guard.backends.ebpf import program  # noqa: PLC0415 -- start-up time: few commands load programs

    loaded = program.load_hooks([hook.name for hook in found], map_fds, defines)
    try:
        for hook in found:
            _attach(hook, loaded[hook.name], cgroup, folder, pins or folder)
    finally:
        for fd in loaded.values():
            os.close(fd)


def _attach(hook: Hook, program_fd: int, cgroup: Cgroup, folder: str, pins: str) -> None:
    """LINK_UPDATE leaves no moment without a program. Where it can't be used, both programs run for a moment."""
    what = f"attaching the eBPF program for {hook.name} to {cgroup.path}"
    with trying(what, "what was in force before stays in force"):
        if hook.ours is None or hook.is_reordered:
            attach_anew(hook.name, program_fd, cgroup, pins)
            return
        link_fd = bpf.pinned(link_pin(folder, hook.name))
        try:
            bpf.link_update(link_fd, program_fd)
            _pin(link_fd, link_pin(pins, hook.name))
        finally:
            os.close(link_fd)


def attach_anew(hook: str, program_fd: int, cgroup: Cgroup, pins: str, *, only_first: bool = False) -> bool:
    """By a new link, in the first place where the kernel can order programs. A link that is pinned there ends.

    With ``only_first`` nothing is done where the kernel can't, and False returned.
    """
    attach_type = abi.HOOKS[hook].attach_type
    link_fd = bpf.link_create_first(program_fd, cgroup.fd, attach_type)
    if link_fd is None:
        if only_first:
            return False
        link_fd = bpf.link_create(program_fd, cgroup.fd, attach_type)
    before = None
    try:
        before = open_link(hook, pins)
        _pin(link_fd, link_pin(pins, hook))
        if before is not None:
            bpf.link_detach(before)
    finally:
        for fd in (link_fd, before):
            if fd is not None:
                os.close(fd)
    return True


def _pin(link_fd: int, path: str) -> None:
    """Pins under another name and renames. At a path that has a pin (of a link that lost its cgroup) a pin fails."""
    temporary = path + "~"
    _unlink(temporary)
    bpf.pin(link_fd, temporary)
    os.rename(temporary, path)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def verify(cgroup: Cgroup, folder: str, map_ids: Sequence[int], needed: Collection[str]) -> None:
    """Raises GuardError unless each needed hook runs our program on these maps."""
    for hook in inspect(cgroup, folder):
        if hook.name not in needed:
            continue
        if hook.ours is None or not set(hook.ours.map_ids) <= set(map_ids):
            raise GuardError(
                f"checking the hook {hook.name} of {cgroup.path}: the kernel does not run the program that was just "
                "attached; run imds-guard check, and see what else manages programs there (bpftool cgroup show)"
            )


def detach_all(folder: str) -> None:
    """Detaches every link that is pinned in a folder, at once."""
    for hook in abi.HOOKS:
        for name in (hook, hook + "~"):  # the second when a command ended between the two steps of _pin()
            fd = open_link(name, folder)
            if fd is not None:
                _detach(fd)


@contextmanager
def detached_afterwards(folder: str, names: Collection[str]) -> Iterator[None]:
    """Detaches these links that are pinned in ``folder``, when the block has put others in their place."""
    links = [fd for fd in (open_link(name, folder) for name in names) if fd is not None]
    try:
        yield
        for fd in links:
            bpf.link_detach(fd)
    finally:
        for fd in links:
            os.close(fd)


def detach_unneeded(folder: str, needed: Collection[str]) -> None:
    """Detaches and unpins the links of hooks that the policy in force does not need."""
    for hook in abi.HOOKS:
        fd = open_link(hook, folder) if hook not in needed else None
        if fd is not None:
            _detach(fd)
            _unlink(link_pin(folder, hook))


def detach_unpinned(cgroup: Cgroup, folder: str | None) -> list[str]:
    """Detaches programs of ours that no pinned link holds: left by a bpffs that is gone. Returns their names."""
    unpinned = {p.id: p.name for hook in inspect(cgroup, folder) for p in hook.unpinned}
    if not unpinned:
        return []
    # Asked after the links were read: without the folder every program of ours would count as unpinned.
    if folder is not None and not os.path.isdir(folder):
        raise GuardError(
            f"looking for the pins in {folder}: they are out of reach; mount the BPF filesystem there again"
        )
    with trying("looking for links that nothing pins", "they can be seen with bpftool link"):
        for fd, link in bpf.links_of_cgroup(cgroup.id):
            if link.prog_id in unpinned:
                _detach(fd)
            else:
                os.close(fd)
    return sorted(unpinned.values())


def _detach(fd: int) -> None:
    try:
        with trying("detaching a hook", "run imds-guard stop again"):
            bpf.link_detach(fd)
    finally:
        os.close(fd)
