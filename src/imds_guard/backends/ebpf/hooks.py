# SPDX-License-Identifier: Apache-2.0
"""The hooks of a cgroup: which programs are attached, and how ours are attached, updated and detached by links."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    """In the order in which they run."""
    linked: int | None = None
    """The ID of the program that our pinned link holds; None when there is no link, or it is no longer attached."""

    @property
    def ours(self) -> Attached | None:
        """Our program, when the pinned link holds it and the kernel runs it here."""
        return next((p for p in self.attached if p.id == self.linked and p.version is not None), None)

    @property
    def unpinned(self) -> list[Attached]:
        """Programs of ours that no pinned link holds."""
        return [p for p in self.attached if p.version is not None and p.id != self.linked]

    @property
    def behind(self) -> list[Attached]:
        """Other people's programs that run after ours."""
        if self.ours is None or self.name == abi.EGRESS:  # at egress no program can change a packet's address
            return []
        return [p for p in self.attached[self.attached.index(self.ours) + 1 :] if p.version is None]


_NO_CGROUP_PROGRAMS = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP)
"""Errors of a kernel without programs on cgroups. Any other error may be temporary, like a lack of memory."""


def inspect(cgroup: Cgroup, folder: str | None) -> list[Hook]:
    """Every hook: the attached programs by BPF_PROG_QUERY, and the program of our pinned link."""
    return [
        Hook(name, tuple(_attached(name, cgroup, shape.attach_type)), _linked(name, cgroup, folder) if folder else None)
        for name, shape in abi.HOOKS.items()
    ]


def _attached(hook: str, cgroup: Cgroup, attach_type: int) -> list[Attached]:
    try:
        identities = bpf.attached_programs(cgroup.fd, attach_type)
    except OSError as error:
        what = f"asking what is attached to {cgroup.path} at {hook}"
        if error.errno not in _NO_CGROUP_PROGRAMS:
            raise GuardError(f"{what}: {system_text(error)}; nothing was changed, run the command again") from error
        raise Unsupported(
            f"{what}: {system_text(error)}; the kernel has no programs on cgroups (CONFIG_CGROUP_BPF), or something "
            "forbids bpf(2) to this process"
        ) from error
    return [found for found in (_describe(hook, identity) for identity in identities) if found is not None]


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
    fd = _open_link(hook, folder)
    if fd is None:
        return None
    try:
        link = bpf.describe_link(fd)
    finally:
        os.close(fd)
    return link.prog_id if link.cgroup_id == cgroup.id else None


def _open_link(hook: str, folder: str) -> int | None:
    try:
        return bpf.pinned(link_pin(folder, hook))
    except FileNotFoundError:
        return None


def pinned_links(folder: str) -> list[bpf.LinkDescription]:
    """The links that are pinned in a folder."""
    found = []
    for hook in abi.HOOKS:
        fd = _open_link(hook, folder)
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


@contextmanager
def programs_restored_on_failure(folder: str, found: Sequence[Hook]) -> Iterator[None]:
    """When the block fails, each link that is pinned in ``folder`` gets back the program that it had.

    Not when another folder is at that path by then: the block had done its work before it was interrupted.
    """
    before: dict[str, int] = {}
    inode = os.stat(folder).st_ino
    try:
        for hook in found:
            fd = bpf.program_by_id(hook.linked) if hook.linked is not None else None
            if fd is not None:
                before[hook.name] = fd
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if os.stat(folder).st_ino == inode:
                    _restore(folder, before)
            raise
    finally:
        for fd in before.values():
            os.close(fd)


def _restore(folder: str, programs: Mapping[str, int]) -> None:
    """Errors are ignored: they would hide the first one."""
    for hook, program_fd in programs.items():
        with suppress(OSError):
            link_fd = _open_link(hook, folder)
            if link_fd is not None:
                try:
                    bpf.link_update(link_fd, program_fd)
                finally:
                    os.close(link_fd)


def _attach(hook: Hook, program_fd: int, cgroup: Cgroup, folder: str, pins: str) -> None:
    what = f"attaching the eBPF program for {hook.name} to {cgroup.path}"
    with trying(what, "what was in force before stays in force"):
        link_fd = _open_link(hook.name, folder) if hook.linked is not None else None
        made = link_fd is None
        if link_fd is None:
            link_fd = bpf.link_create(program_fd, cgroup.fd, abi.HOOKS[hook.name].attach_type)
        try:
            if not made:
                bpf.link_update(link_fd, program_fd)
            _pin(link_fd, link_pin(pins, hook.name))
        finally:
            os.close(link_fd)


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
            fd = _open_link(name, folder)
            if fd is not None:
                _detach(fd)


def detach_unneeded(folder: str, needed: Collection[str]) -> None:
    """Detaches and unpins the links of hooks that the policy in force does not need."""
    for hook in abi.HOOKS:
        fd = _open_link(hook, folder) if hook not in needed else None
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
