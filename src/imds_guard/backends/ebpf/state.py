# SPDX-License-Identifier: Apache-2.0
"""What the kernel holds and runs for a guard, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from imds_guard.backends.ebpf import abi, hooks, other_programs
from imds_guard.backends.ebpf.features import lacks, needed_features
from imds_guard.backends.ebpf.filter_records import parse_numbers
from imds_guard.backends.ebpf.hooks import Hook
from imds_guard.backends.ebpf.other_programs import OtherProgram
from imds_guard.backends.ebpf.parse import parse
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.reader import MapReader, Snapshot, all_pinned, of_abi_2
from imds_guard.backends.ebpf.render import render
from imds_guard.errors import GuardError
from imds_guard.kernel.cgroup import Cgroup
from imds_guard.policy.model import Policy

_PIN_MISSING = "the pin of a map is gone, so the policy can't be read: run imds-guard start"
_OTHER_VERSION = "the maps are of another version of imds-guard: run imds-guard start"


class State(NamedTuple):
    """What the kernel holds and runs. ``policy`` is None when nothing is locked or the maps can't be read.

    ``generation`` is 0 when nothing is locked. It is None when there are no maps, or none that can be read.
    """

    cgroup: str
    cgroup_is_root: bool
    pins: str | None
    generation: int | None
    policy: Policy | None
    hooks: tuple[Hook, ...]
    counters: tuple[tuple[int, int], ...]
    """(enforced, audited) by policy.Reason. Empty when there are no maps, or none that can be read."""
    faults: tuple[str, ...]
    lost_events: int = 0
    """Denials whose record did not fit into the ring buffer."""
    report_overflow: int = 0
    """Denials whose row did not fit into the report."""
    others: tuple[OtherProgram, ...] = ()
    """Programs of others that run for the same processes as ours."""
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


# --- reading ----------------------------------------------------------------------------------------------------------


def is_active(cgroup: Cgroup, location: PinLocation) -> bool:
    """State.active, without reading the policy. Raises FileNotFoundError when the guard was removed meanwhile."""
    pins = location.pins()
    if pins is not None and all_pinned(pins):
        with MapReader.open(pins) as maps:
            if maps.are_current():
                return maps.generation() != 0
    return _any_of_ours(hooks.inspect(cgroup, pins))


def read_state(cgroup: Cgroup, location: PinLocation) -> State | None:
    """None when the generation changed meanwhile. Raises FileNotFoundError when the guard was removed meanwhile."""
    pins = location.pins()
    found = tuple(hooks.inspect(cgroup, pins))
    if pins is None:
        return _without_maps(cgroup, None, found, *_unpinned(found))
    if not all_pinned(pins):
        return _without_maps(cgroup, pins, found, _OTHER_VERSION if of_abi_2(pins) else _PIN_MISSING)
    with MapReader.open(pins) as maps:
        if not maps.are_current():
            return _without_maps(cgroup, pins, found, _OTHER_VERSION)
        return _with_maps(cgroup, pins, found, maps)


def _without_maps(cgroup: Cgroup, pins: str | None, found: tuple[Hook, ...], *faults: str) -> State:
    return State(cgroup.path, cgroup.is_root, pins, None, None, found, (), faults)


def _with_maps(cgroup: Cgroup, pins: str, found: tuple[Hook, ...], maps: MapReader) -> State | None:
    generation = maps.generation()
    snapshot = maps.snapshot(generation) if generation else None
    if maps.generation() != generation:
        return None
    counters = maps.counters()
    policy, faults_of_maps = policy_of(snapshot)
    needed = abi.needed_hooks(policy)
    faults = (*_faults_of_hooks(found, maps, policy), *faults_of_maps) if generation else ()
    others = other_programs.find(cgroup, found) if generation else []
    return State(
        cgroup.path,
        cgroup.is_root,
        pins,
        generation,
        policy,
        hooks=tuple(hook for hook in found if hook.name in needed or hook.attached),
        counters=tuple(counters[: abi.REASONS]),
        faults=faults,
        lost_events=counters[abi.LOST_EVENTS][0],
        report_overflow=counters[abi.REPORT_OVERFLOW][0],
        others=tuple(others),
        altered=bool(faults_of_maps),
    )


def snapshot_in_force(maps: MapReader) -> Snapshot | None:
    """The records of the generation in force. None when nothing is locked."""
    generation = maps.generation()
    return maps.snapshot(generation) if generation else None


def policy_of(snapshot: Snapshot | None) -> tuple[Policy | None, list[str]]:
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
    """False for records that render() would not write, even when someone computed a matching digest for them."""
    numbers = parse_numbers(snapshot.image, policy.filters)
    return render(policy, snapshot.image.generation, numbers).digest() == snapshot.image.digest()


# --- faults -----------------------------------------------------------------------------------------------------------


def _faults_of_hooks(found: Sequence[Hook], maps: MapReader, policy: Policy | None) -> Iterator[str]:
    map_ids, needed, features = maps.ids(), abi.needed_hooks(policy), needed_features(policy)
    for hook in found:
        if hook.name not in needed:
            continue
        if hook.ours is None:
            yield f"the hook {hook.name} is not attached: what goes through it is not checked"
        elif not set(hook.ours.map_ids) <= set(map_ids):
            yield f"the hook {hook.name} uses other maps than the pinned ones: a change of policy does not reach it"
        else:
            for name in lacks(hook, features, maps.map_id):
                yield f"the program at the hook {hook.name} has no code for {name}: those they are for are denied"
    yield from _unpinned(found)


def _unpinned(found: Sequence[Hook]) -> Iterator[str]:
    for hook in found:
        for program in hook.unpinned:
            yield f"program {program.name} (id {program.id}) is attached at {hook.name} without a pin of ours"
