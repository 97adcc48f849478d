# SPDX-License-Identifier: Apache-2.0
"""Puts a policy in force: in a new guard, in one that is there, or in place of maps that another version made."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Callable, NamedTuple

from imds_guard.backends import Change
from imds_guard.backends.ebpf import abi, hooks, other_programs
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.features import Feature, defines_of, lacks, loaded_features, names_of, needed_features
from imds_guard.backends.ebpf.folder import Folder
from imds_guard.backends.ebpf.hooks import Hook
from imds_guard.backends.ebpf.pins import map_pin
from imds_guard.backends.ebpf.reader import MapReader
from imds_guard.backends.ebpf.state import policy_of, snapshot_in_force
from imds_guard.backends.ebpf.store import MapStore
from imds_guard.errors import GuardError, failure_text
from imds_guard.kernel import bpf, privileges
from imds_guard.kernel.cgroup import Cgroup
from imds_guard.policy.model import Policy

if TYPE_CHECKING:
    from imds_guard.backends.ebpf.program import Defines

_MEANING_SINCE: dict[Map, int] = {
    Map.COUNTERS: 3,
    Map.WATCH: 2,
    Map.MARKS: 2,
    Map.EARLIER: 3,
    Map.FILTER_MARKS: 3,
}
"""Maps that outlive a replacement of the others, and the ABI since which their records mean the same.

The other maps hold a policy, or records that name a generation of one. Without the marks, --strict would drop every
connection that it has approved. Without those of listeners, filters would be closed until they are started again.
"""

_MARKS_LOST = (
    "connections that were approved before are dropped: their marks are missing, or of another version of imds-guard"
)


class Target(NamedTuple):
    """Where a change is made, and with which programs."""

    cgroup: Cgroup
    folder: Folder
    defines: Defines

    def with_features(self, features: Collection[Feature]) -> Target:
        """With the programs that have these features."""
        return self._replace(defines=self.defines + defines_of(features))

    @property
    def version(self) -> str:
        """The version of the programs that would be loaded."""
        from imds_guard.backends.ebpf import program  # noqa: PLC0415 -- start-up time: to read a guard takes none

        return program.source_version(self.defines)


def install(target: Target, policy: Policy) -> Change:
    """Makes a guard: maps at generation 0, then all hooks, then the policy. Nothing is locked until the flip."""
    target = target.with_features(needed_features(policy))
    cgroup, folder, _ = target
    privileges.lift_memory_lock_limit()
    needed = abi.needed_hooks(policy)
    try:
        pins = folder.begin()
        with MapStore.create(pins) as maps:
            _attach(target, maps, _inspect(cgroup, None, needed), pins)
            hooks.verify(cgroup, pins, maps.ids(), needed)
            folder.commit()
            maps.change(policy)
    except (GuardError, OSError) as error:
        _undo(error, folder.abandon, folder.remove_if_there)
        raise
    # Only now: until here, programs of a guard whose pins are out of reach may be all that enforced.
    done = _detach_unpinned(cgroup, folder)
    done.append(f"attached {len(needed)} hooks to {cgroup.path}, version {target.version}")
    return Change(tuple(done), tuple(other_programs.displaced(cgroup, needed)))


def change_running(target: Target, policy: Policy, *, keep_version: bool) -> Change:
    """Puts ``policy`` in force in a guard that is there. Maps and hooks that are not whole are replaced.

    With ``keep_version`` whole hooks stay, whatever their version and place.
    """
    try:
        maps = MapStore.open(target.folder.path)
    except FileNotFoundError:
        return _replace_maps(target, policy)
    with maps:
        if not maps.are_current():
            return _replace_maps(target, policy)
        needed = abi.needed_hooks(policy)
        done = _renew_hooks(target, maps, policy, keep_version)
        snapshot = snapshot_in_force(maps)
        if snapshot is not None and policy_of(snapshot) == (policy, []):
            done.append("the policy was in force already")
        else:
            maps.change(policy)
        if not keep_version:
            done += _drop_features(target, maps, policy)
    hooks.detach_unneeded(target.folder.path, needed)  # only now: the policy before may have needed them
    return Change(tuple(done)).then(Change() if keep_version else _put_first(target))


def _renew_hooks(target: Target, maps: MapStore, policy: Policy, keep_version: bool) -> list[str]:
    """Loads the programs again, on the same maps and with the policy unchanged, unless they are as they should be.

    They keep the features that they have, because the policy in force may need them.
    """
    cgroup, folder, _ = target
    ids, needed, features = set(maps.ids()), abi.needed_hooks(policy), needed_features(policy)
    found = _inspect(cgroup, folder.path, needed)
    target = target.with_features(features | loaded_features(found, maps.map_id))
    missing = {hook.name for hook in found if hook.ours is None or not set(hook.ours.map_ids) <= ids}
    lacking = sorted({name for hook in found for name in lacks(hook, features, maps.map_id)})
    if not missing and not lacking and (keep_version or _are_of(found, target.version)):
        return _detach_unpinned(cgroup, folder)
    privileges.lift_memory_lock_limit()
    _attach(target, maps, found, folder.path)
    hooks.verify(cgroup, folder.path, maps.ids(), needed)
    done = _detach_unpinned(cgroup, folder)
    needed_before = _needed_before(maps)
    if missing & set(needed_before):
        return [*done, "repaired the hooks"]
    if lacking:
        done.append(f"put programs with {', '.join(lacking)} in place")
    if missing:
        return [*done, f"attached {', '.join(sorted(missing))}, too"]
    return done if lacking else [*done, f"put version {target.version} of the programs in place"]


def _drop_features(target: Target, maps: MapStore, policy: Policy) -> list[str]:
    """After the change: programs without what the policy in force does not need."""
    found = _inspect(target.cgroup, target.folder.path, abi.needed_hooks(policy))
    features = needed_features(policy)
    extra = loaded_features(found, maps.map_id) - features
    if not extra:
        return []
    try:
        _attach(target.with_features(features), maps, found, target.folder.path)
    except (GuardError, OSError) as error:  # the policy is in force, and each of the programs serves it
        return [f"left programs with {names_of(extra)} in place: {error}"]
    return [f"put programs without {names_of(extra)} in place"]


# --- maps of another version ------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """What new maps take over: the pins of the maps that are kept, and the serial number of the change."""

    pins: dict[Map, str]
    serial: int


def _replace_maps(target: Target, policy: Policy) -> Change:
    """New maps are filled before any hook uses them. Then hook after hook moves over to them."""
    target = target.with_features(needed_features(policy))
    cgroup, folder, _ = target
    privileges.lift_memory_lock_limit()
    needed = abi.needed_hooks(policy)
    found = _inspect(cgroup, folder.path, needed)
    try:
        kept = _keep(folder.path)
        pins = folder.begin()
        with MapStore.create(pins, kept.pins) as maps, _programs_restored_on_failure(folder.path, found):
            maps.change(policy, kept.serial)
            _attach(target, maps, found, pins)
            hooks.verify(cgroup, pins, maps.ids(), needed)
            with hooks.detached_afterwards(folder.path, [hook.name for hook in found if hook.is_reordered]):
                folder.swap()
    except (GuardError, OSError) as error:
        _undo(error, folder.abandon)
        raise
    folder.recover()
    done = f"replaced maps of another version; the programs are version {target.version} now"
    lost = policy.strict and Map.MARKS not in kept.pins
    return Change((done,), (_MARKS_LOST,) if lost else ()).then(_put_first(target))


@contextmanager
def _programs_restored_on_failure(folder: str, found: Sequence[Hook]) -> Iterator[None]:
    """When the block fails, each link that is pinned in ``folder`` gets back the program that it had.

    Not when another folder is at that path by then: the block had done its work before it was interrupted.
    """
    before: dict[str, int] = {}
    inode = os.stat(folder).st_ino
    try:
        for hook in found:
            if hook.linked is None or hook.is_reordered:  # then attach() makes a new link beside the old one
                continue
            fd = bpf.program_by_id(hook.linked)
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
            link_fd = hooks.open_link(hook, folder)
            if link_fd is not None:
                try:
                    bpf.link_update(link_fd, program_fd)
                finally:
                    os.close(link_fd)


def _keep(pins: str) -> _Kept:
    """The maps to keep, and a serial number that no change of the old maps had, or gets if the replacement fails.

    A mark has the serial number of the policy that approved its socket. It must not pass for a mark of another policy.
    """
    pinned = [number for number in (Map.CONFIG, Map.SETTINGS, *_MEANING_SINCE) if _is_pinned(pins, number)]
    if Map.CONFIG not in pinned or Map.SETTINGS not in pinned:
        return _Kept({}, 1)
    with MapStore.open(pins, pinned) as maps:
        unchanged = _unchanged(maps, pinned)
        return _Kept({number: map_pin(pins, number) for number in unchanged}, maps.reserve_serial())


def _unchanged(maps: MapReader, pinned: Iterable[Map]) -> list[Map]:
    """The maps whose layout and meaning are those of this version."""
    written_by = maps.stamp(maps.generation()).abi
    other_layout = maps.misfits()
    return [
        number
        for number, since in _MEANING_SINCE.items()
        if number in pinned and number not in other_layout and since <= written_by <= abi.ABI
    ]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _is_pinned(pins: str, number: Map) -> bool:
    return os.path.lexists(map_pin(pins, number))


def _undo(first: Exception, *steps: Callable[[], None]) -> None:
    """Runs the steps after ``first``. Raises GuardError with the texts of both when a step fails, too."""
    for step in steps:
        try:
            step()
        except (GuardError, OSError) as second:
            texts = [
                failure_text("putting the policy in force", error) if isinstance(error, OSError) else str(error)
                for error in (first, second)
            ]
            raise GuardError(
                f"{texts[0]}; what was begun could not be undone ({texts[1]}), the next start or stop will undo it"
            ) from first


def _are_of(found: Iterable[Hook], version: str) -> bool:
    """True when every hook runs programs of ours, of that version."""
    return all(hook.ours is not None and hook.ours.version == version for hook in found)


def _attach(target: Target, maps: MapStore, found: Sequence[Hook], pins: str) -> None:
    """hooks.attach(), with a reason where another program keeps ours out. The kernel says EPERM alone."""
    other_programs.require_place(target.cgroup, [hook.name for hook in found if hook.ours is None])
    hooks.attach(target.cgroup, target.folder.path, maps.fds(), found, target.defines, pins)


def _put_first(target: Target) -> Change:
    return other_programs.put_first(target.cgroup, target.folder.path)


def _needed_before(maps: MapReader) -> tuple[str, ...]:
    """The hooks that the policy in force needs. All when it can't be read."""
    policy, _ = policy_of(snapshot_in_force(maps))
    return tuple(abi.HOOKS) if policy is None else abi.needed_hooks(policy)


def _detach_unpinned(cgroup: Cgroup, folder: Folder) -> list[str]:
    return [f"detached {name}, which nothing pinned" for name in hooks.detach_unpinned(cgroup, folder.path)]


def _inspect(cgroup: Cgroup, folder: str | None, needed: tuple[str, ...]) -> list[Hook]:
    return [hook for hook in hooks.inspect(cgroup, folder) if hook.name in needed]
