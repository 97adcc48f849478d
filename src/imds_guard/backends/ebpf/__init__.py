# SPDX-License-Identifier: Apache-2.0
"""The eBPF backend: programs at the cgroup hooks, links and maps, all pinned; no process of ours stays."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import (
    TYPE_CHECKING,
    Callable,
    NamedTuple,
    TypeVar,
)

from imds_guard.backends import Change, Description
from imds_guard.backends.ebpf import abi, hooks, probe
from imds_guard.backends.ebpf.folder import Folder
from imds_guard.backends.ebpf.hooks import Hook
from imds_guard.backends.ebpf.render import parse, render
from imds_guard.backends.ebpf.store import Maps, Snapshot
from imds_guard.errors import GuardError, NotPermitted, failure_text, trying
from imds_guard.kernel import bpffs, lockfile, privileges
from imds_guard.kernel.cgroup import Cgroup, open_cgroup
from imds_guard.policy.model import Policy

# The programs are imported where they are needed, for the sake of the start-up time: to look at a guard takes none.
if TYPE_CHECKING:
    from imds_guard.backends.ebpf.program import Defines

_T = TypeVar("_T")


class State(NamedTuple):
    """What the kernel holds and runs. ``policy`` is None when nothing is locked or the maps can't be read.

    ``generation`` is 0 when nothing is locked, and None when there are no maps, or none that can be read.
    """

    cgroup: str
    cgroup_is_root: bool
    pins: str | None
    generation: int | None
    policy: Policy | None
    hooks: tuple[Hook, ...]
    counters: tuple[tuple[int, int], ...]
    """(enforced, audited) by policy.Reason; empty when there are no maps, or none that can be read."""
    faults: tuple[str, ...]
    lost_events: int = 0
    """Denials whose record found no room in the ring buffer."""
    report_overflow: int = 0
    """Denials whose row found no room in the report."""
    altered: bool = False
    """True when the maps are not as they were written, so that ``policy`` is not what somebody asked for."""

    @property
    def active(self) -> bool:
        """True when a policy is in force, or some program of ours is attached and its policy can't be read."""
        if self.generation is not None:
            return self.generation != 0
        return _any_of_ours(self.hooks)

    @property
    def versions(self) -> list[str]:
        """The versions of our programs that are attached."""
        return sorted({p.version for hook in self.hooks for p in hook.attached if p.version is not None})


def _any_of_ours(found: Iterable[Hook]) -> bool:
    """True when a program of ours is attached to one of the hooks."""
    return any(program.version is not None for hook in found for program in hook.attached)


class EbpfBackend:
    """Enforces at the root of the cgroup2 hierarchy, or in the subtree that ``cgroup`` is the path of.

    ``defines`` are for tests: IG_TEST_DELAY.
    """

    name = "ebpf"

    def __init__(self, cgroup: str | None = None, defines: Defines = ()) -> None:
        self._cgroup_path = cgroup
        self._defines = defines

    # --- Backend ---

    def check(self, policy: Policy | None) -> None:
        """Backend.check(); compiles nothing, attaches nothing."""
        with self._cgroup() as cgroup, trying("asking what eBPF can do here", "nothing was changed, run it again"):
            self._check_running_or_compilable(cgroup, policy)
        if policy is not None:
            render(policy, 1)

    def apply(self, policy: Policy) -> Change:
        """Backend.apply()."""
        render(policy, 1)  # what does not fit is refused before anything is touched
        with self._cgroup() as cgroup, _whole_or_not("putting the policy in force"), self._exclusive(cgroup) as folder:
            done = ["cleaned up after a command that was killed"] if folder.recover() else []
            if folder.exists():
                return Change((*done, *self._change_running(cgroup, folder, policy)))
            return Change((*done, *self._install(cgroup, folder, policy)))

    def change(self, policy: Policy) -> Change:
        """Backend.change(): hooks that are whole stay, whatever their version. Raises GuardError without a guard."""
        render(policy, 1)
        with self._cgroup() as cgroup, _whole_or_not("changing the policy"), self._exclusive(cgroup) as folder:
            folder.recover()
            if not folder.exists():
                raise GuardError("changing the policy in force: none is; run imds-guard start first")
            return Change(tuple(self._change_running(cgroup, folder, policy, keep_version=True)))

    def read(self) -> Policy | None:
        """Backend.read()."""
        return self.state().policy

    def unaltered(self) -> Policy | None:
        """Backend.unaltered()."""
        state = self.state()
        return None if state.altered else state.policy

    def remove(self) -> Change:
        """Backend.remove()."""
        with self._cgroup() as cgroup, _whole_or_not("opening the lock"), self._exclusive(cgroup) as folder:
            found = folder.recover()
            if folder.exists():
                self._open_the_lock(folder)
                folder.remove()
                found = True
            found = bool(hooks.detach_strays(cgroup, None)) or found
            if not cgroup.is_root:
                lockfile.forget(folder.name)
        return Change((f"removed every hook, link and map from {cgroup.path}",) if found else ())

    def in_force(self) -> bool:
        """Backend.in_force()."""
        return self._looked(self._is_active)

    def faults(self) -> list[str]:
        """Backend.faults()."""
        return list(self.state().faults)

    def notes(self, _policy: Policy) -> list[str]:
        """Backend.notes(): there are none, eBPF enforces what the policy says."""
        return []

    def describe(self) -> Description:
        """Backend.describe()."""
        state = self.state()
        return Description(state.policy, state.faults, state)

    # --- the state ---

    def state(self) -> State:
        """Read from the kernel without a lock; read again when a change came in between."""
        return self._looked(self._state)

    def _looked(self, look: Callable[[Cgroup, Folder | None], _T | None]) -> _T:
        """What ``look`` sees; it is None when something changed meanwhile."""
        with self._cgroup() as cgroup, trying("reading the state of the guard", "run the command again"):
            path = bpffs.find_bpffs()
            folder = Folder(path, cgroup.id, cgroup.is_root) if path else None
            for _ in range(20):
                try:
                    seen = look(cgroup, folder)
                except FileNotFoundError:
                    seen = None  # removed since we looked
                if seen is not None:
                    return seen
                time.sleep(0.01)
        raise GuardError("reading the state of the guard: it kept changing; try again")

    def _is_active(self, cgroup: Cgroup, folder: Folder | None) -> bool:
        """State.active, without reading the policy."""
        pins = folder.path if folder is not None and folder.exists() else None
        if pins is not None and Maps.are_pinned(pins):
            with Maps.open(pins) as maps:
                if not maps.misfits():
                    return maps.generation() != 0
        return _any_of_ours(hooks.inspect(cgroup, pins))

    def _state(self, cgroup: Cgroup, folder: Folder | None) -> State | None:
        """None when the generation changed while it was read."""
        pins = folder.path if folder is not None and folder.exists() else None
        found = tuple(hooks.inspect(cgroup, pins))
        if pins is None:
            faults = tuple(_strays(found))
            return State(cgroup.path, cgroup.is_root, None, None, None, found, (), faults)
        if not Maps.are_pinned(pins):
            faults = ("the pin of a map is gone, its policy can't be read: run imds-guard start",)
            return State(cgroup.path, cgroup.is_root, pins, None, None, found, (), faults)
        with Maps.open(pins) as maps:
            if maps.misfits():
                faults = ("the maps are of another version of imds-guard: run imds-guard start",)
                return State(cgroup.path, cgroup.is_root, pins, None, None, found, (), faults)
            generation = maps.generation()
            snapshot = maps.snapshot(generation) if generation else None
            if maps.generation() != generation:
                return None
            counters, ids = maps.counters(), maps.ids()
        policy, faults_of_maps = _policy_of(snapshot)
        needed = abi.needed_hooks(policy is not None and policy.strict)
        faults = tuple(_faults_of_hooks(found, ids, needed)) + tuple(faults_of_maps) if generation else ()
        lost, overflow = counters[abi.LOST_EVENTS][0], counters[abi.REPORT_OVERFLOW][0]
        by_reason = tuple(counters[: abi.REASONS])
        place = (cgroup.path, cgroup.is_root, pins)
        shown = tuple(hook for hook in found if hook.name in needed or hook.attached)
        return State(*place, generation, policy, shown, by_reason, faults, lost, overflow, bool(faults_of_maps))

    # --- steps ---

    @contextmanager
    def _cgroup(self) -> Iterator[Cgroup]:
        if os.geteuid() != 0 and privileges.missing_capabilities([privileges.CAP_NET_ADMIN, privileges.CAP_BPF]):
            raise NotPermitted("working with eBPF: only root may; run this with sudo")
        with open_cgroup(self._cgroup_path) as cgroup:
            yield cgroup

    @contextmanager
    def _exclusive(self, cgroup: Cgroup) -> Iterator[Folder]:
        probe.require_place()
        folder = Folder(bpffs.require_bpffs(), cgroup.id, cgroup.is_root)
        with lockfile.exclusive(folder.name):
            yield folder

    def _check_running_or_compilable(self, cgroup: Cgroup, policy: Policy | None) -> None:
        """A guard that runs this version needs no compiler."""
        from imds_guard.backends.ebpf import program  # noqa: PLC0415
        from imds_guard.kernel import compiler  # noqa: PLC0415

        probe.require_place()
        probe.require_bpf()
        path = bpffs.find_bpffs()
        if path is not None and os.statvfs(path).f_flag & os.ST_RDONLY:
            bpffs.require_bpffs()
        folder = Folder(path, cgroup.id, cgroup.is_root) if path else None
        found = hooks.inspect(cgroup, folder.path if folder is not None and folder.exists() else None)
        needed = abi.needed_hooks(policy is not None and policy.strict)
        current = [h.name for h in found if h.ours and h.ours.version == self._version()]
        if not set(needed) <= set(current):
            compiler.require_bcc()
            program.kernel_offsets()

    def _install(self, cgroup: Cgroup, folder: Folder, policy: Policy) -> list[str]:
        """Maps at generation 0, then all hooks, then the policy: until the flip nothing is locked."""
        privileges.lift_memory_lock_limit()
        needed = abi.needed_hooks(policy.strict)
        try:
            place = folder.begin()
            with Maps.create(place) as maps:
                hooks.put_in_place(cgroup, place, maps.fds(), _inspect(cgroup, None, needed), self._defines)
                hooks.verify(cgroup, place, maps.ids(), needed)
                folder.commit()
                maps.change(policy)
        except (GuardError, OSError) as error:
            _undo(error, folder.abandon, folder.remove_if_there)
            raise
        # Only now: programs of a guard whose pins are out of reach may be all that held until here.
        lines = _detach_strays(cgroup, folder)
        return [*lines, f"attached {len(needed)} hooks to {cgroup.path}, version {self._version()}"]

    def _change_running(self, cgroup: Cgroup, folder: Folder, policy: Policy, keep_version: bool = False) -> list[str]:
        try:
            maps = Maps.open(folder.path)
        except FileNotFoundError:
            maps = None
        if maps is None:
            return self._replace_maps(cgroup, folder, policy)
        with maps:
            if maps.misfits():
                return self._replace_maps(cgroup, folder, policy)
            needed = abi.needed_hooks(policy.strict)
            lines = self._renew_hooks(cgroup, folder, maps, needed, keep_version)
            snapshot = _in_force(maps)
            if snapshot is not None and _policy_of(snapshot) == (policy, []):
                lines.append("the policy was in force already")
            else:
                maps.change(policy)
        hooks.detach_unneeded(folder.path, needed)  # only now: the policy before may have needed them
        return lines

    def _renew_hooks(
        self, cgroup: Cgroup, folder: Folder, maps: Maps, needed: tuple[str, ...], keep_version: bool
    ) -> list[str]:
        """Loads the programs anew, on the same maps and with the policy unchanged, unless they are as they should."""
        ids = set(maps.ids())
        found = _inspect(cgroup, folder.path, needed)
        missing = {hook.name for hook in found if hook.ours is None or not set(hook.ours.map_ids) <= ids}
        if not missing and (keep_version or _are_of(found, self._version())):
            return _detach_strays(cgroup, folder)
        privileges.lift_memory_lock_limit()
        hooks.put_in_place(cgroup, folder.path, maps.fds(), found, self._defines)
        hooks.verify(cgroup, folder.path, maps.ids(), needed)
        lines = _detach_strays(cgroup, folder)
        if not missing:
            return [*lines, f"put version {self._version()} of the programs in place"]
        if missing.isdisjoint(abi.needed_hooks(_holds_packets(maps))):
            return [*lines, f"attached {', '.join(sorted(missing))}, too"]
        return [*lines, "repaired the hooks"]

    def _replace_maps(self, cgroup: Cgroup, folder: Folder, policy: Policy) -> list[str]:
        """Maps of another layout: new ones are filled before any hook uses them, then hook by hook moves over."""
        privileges.lift_memory_lock_limit()
        needed = abi.needed_hooks(policy.strict)
        found = _inspect(cgroup, folder.path, needed)
        try:
            place = folder.begin()
            with Maps.create(place) as maps, hooks.put_back_on_failure(folder.path, found):
                maps.change(policy)
                hooks.put_in_place(cgroup, folder.path, maps.fds(), found, self._defines, place)
                hooks.verify(cgroup, place, maps.ids(), needed)
                folder.swap()
        except (GuardError, OSError) as error:
            _undo(error, folder.abandon)
            raise
        folder.recover()
        return [f"replaced maps of another version; the programs are version {self._version()} now"]

    def _open_the_lock(self, folder: Folder) -> None:
        """Generation 0 first, so that all hooks let everyone through at the same moment."""
        try:
            with Maps.open(folder.path) as maps, trying("opening the lock", "run imds-guard stop again"):
                maps.flip(0)
        except FileNotFoundError:
            return  # a map's pin is gone: detaching the hooks will do

    def _version(self) -> str:
        from imds_guard.backends.ebpf import program  # noqa: PLC0415

        return program.source_version(self._defines)


def _whole_or_not(what: str) -> AbstractContextManager[None]:
    """For what no step has words of its own for."""
    return trying(what, "either the policy before or the new one is in force, whole: imds-guard status tells which")


def _undo(first: Exception, *steps: Callable[[], None]) -> None:
    """Runs the steps after ``first``; raises GuardError that tells of both when one of them fails, too."""
    for step in steps:
        try:
            step()
        except (GuardError, OSError) as second:
            said, also = (
                failure_text("putting the policy in force", error) if isinstance(error, OSError) else str(error)
                for error in (first, second)
            )
            raise GuardError(
                f"{said}; what was begun could not be undone ({also}), the next start or stop will"
            ) from first


def _in_force(maps: Maps) -> Snapshot | None:
    return maps.snapshot(maps.generation()) if maps.generation() else None


def _are_of(found: Iterable[Hook], version: str) -> bool:
    """True when every hook runs programs of ours, of that version."""
    return all(hook.ours is not None and hook.ours.version == version for hook in found)


def _holds_packets(maps: Maps) -> bool:
    """True when the policy in force is strict, or can't be read: then nothing tells that its hooks were others."""
    policy, _ = _policy_of(_in_force(maps))
    return policy is None or policy.strict


def _policy_of(snapshot: Snapshot | None) -> tuple[Policy | None, list[str]]:
    """The policy that the maps hold, and what is wrong with them."""
    if snapshot is None:
        return None, []
    if snapshot.settings is None:
        return None, ["the settings of the generation in force are gone: every locked endpoint is denied to everyone"]
    try:
        policy = parse(snapshot.image, snapshot.settings)
    except (GuardError, ValueError) as error:
        return None, [f"the maps contradict themselves ({error}): someone else wrote to them"]
    if snapshot.digest != snapshot.image.digest() or not _renders_to(policy, snapshot):
        return policy, ["the maps are not as imds-guard wrote them: someone else changed them"]
    return policy, []


def _renders_to(policy: Policy, snapshot: Snapshot) -> bool:
    """A record that a digest was made up for, too, does not pass for one of ours."""
    return render(policy, snapshot.image.generation).digest() == snapshot.image.digest()


def _detach_strays(cgroup: Cgroup, folder: Folder) -> list[str]:
    return [f"detached {name}, which nothing pinned" for name in hooks.detach_strays(cgroup, folder.path)]


def _inspect(cgroup: Cgroup, folder: str | None, needed: tuple[str, ...]) -> list[Hook]:
    return [hook for hook in hooks.inspect(cgroup, folder) if hook.name in needed]


def _faults_of_hooks(found: tuple[Hook, ...], map_ids: list[int], needed: tuple[str, ...]) -> Iterator[str]:
    for hook in found:
        if hook.name not in needed:
            continue
        if hook.ours is None:
            yield f"the hook {hook.name} is not attached: what goes through it is not checked"
        elif not set(hook.ours.map_ids) <= set(map_ids):
            yield f"the hook {hook.name} uses other maps than the pinned ones: a change of policy does not reach it"
        for other in hook.behind:
            what = f"program {other.name or '(unnamed)'} (id {other.id})"
            yield f"{what} runs behind ours at {hook.name} and may rewrite addresses"
    yield from _strays(found)


def _strays(found: tuple[Hook, ...]) -> Iterator[str]:
    for hook in found:
        for stray in hook.strays:
            yield f"program {stray.name} (id {stray.id}) is attached at {hook.name} without a pin of ours"
