# SPDX-License-Identifier: Apache-2.0
"""Read-only view of a guard's maps. CAP_BPF is enough; no compiler and no lock is needed.

The policy may change while it is read: compare in_force() before and after.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.filter_records import FILTER_MAPS, parse_numbered
from imds_guard.backends.ebpf.image import Image, Items, Settings, Stamp, parse_settings, stamp_of
from imds_guard.backends.ebpf.pins import map_pin
from imds_guard.errors import GuardError
from imds_guard.kernel import bpf
from imds_guard.policy.decide import Reason
from imds_guard.policy.filter_numbers import Numbered
from imds_guard.policy.model import Address, Mode, Protocol, unmapped

PROTOCOLS = {abi.TCP: Protocol.TCP, abi.UDP: Protocol.UDP}

READ_BY_WATCH = (Map.CONFIG, Map.SETTINGS, Map.MEMBERS, Map.LOCKS, Map.COUNTERS, Map.REPORT)
"""The maps that watch, report and metrics read, the ring buffer aside."""

_POLICY_MAPS = (Map.ENDPOINTS, Map.MEMBERS, Map.GROUPS, Map.LOCKS, *FILTER_MAPS)
"""Hashes and tries that hold a policy. Their keys have the generation."""


class Snapshot(NamedTuple):
    """The records of one generation. ``settings`` and ``digest`` are None when there is no valid settings record."""

    image: Image
    settings: Settings | None
    digest: bytes | None


_Self = TypeVar("_Self", bound="MapReader")


class MapReader:
    """Open file descriptors of maps. Close it, or use it as a context manager."""

    def __init__(self) -> None:
        self._fds: dict[Map, int] = {}
        self._descriptions: dict[Map, tuple[int, bpf.MapShape]] = {}

    def _described(self, number: Map) -> tuple[int, bpf.MapShape]:
        """A map's ID and shape, read when they are first needed: to open the lock, stop needs neither."""
        if number not in self._descriptions:
            self._descriptions[number] = bpf.describe_map(self._fds[number])
        return self._descriptions[number]

    @classmethod
    def open(cls: type[_Self], pins: str, maps: Iterable[Map] = Map) -> _Self:
        """Maps of any layout: see are_current(). Raises FileNotFoundError when one is not pinned."""
        reader = cls()
        try:
            for number in maps:
                reader._fds[number] = bpf.pinned(map_pin(pins, number))
        except OSError:
            reader.close()
            raise
        return reader

    @classmethod
    def open_checked(cls: type[_Self], pins: str) -> _Self:
        """The maps of READ_BY_WATCH. Raises GuardError when one is missing or has another layout."""
        reader = cls()
        try:
            for number in READ_BY_WATCH:
                reader._fds[number] = open_map(pins, number)
        except (GuardError, OSError):
            reader.close()
            raise
        return reader

    def close(self) -> None:
        """Closes the file descriptors. The pins stay."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ids(self) -> list[int]:
        """The kernel's IDs of the maps."""
        return [self._described(number)[0] for number in self._fds]

    def map_id(self, number: Map) -> int:
        """The kernel's ID of one of them."""
        return self._described(number)[0]

    def misfits(self) -> list[Map]:
        """Maps whose type, sizes or flags are not those of this version."""
        return [number for number in self._fds if self._described(number)[1] != abi.SHAPES[number]]

    def are_current(self) -> bool:
        """False when another version made the maps, or wrote the policy in force in another ABI."""
        if self.misfits():
            return False
        generation = self.generation()
        return not generation or self.stamp(generation).abi in (0, abi.ABI)

    # --- which generation -------------------------------------------------------------------------------------------

    def generation(self) -> int:
        """The generation in force. 0 when nothing is locked."""
        record = self._lookup(Map.CONFIG, abi.ARRAY_KEY.pack(0))
        return int(abi.CONFIG.unpack_from(record)[0])

    def in_force(self) -> tuple[int, int]:
        """The generation in force and the serial number of its change. (0, 0) when nothing is locked."""
        generation = self.generation()
        return (generation, self.stamp(generation).serial) if generation else (0, 0)

    def stamp(self, generation: int) -> Stamp:
        """Which version wrote a generation, and with which change. Also of settings of another layout."""
        return stamp_of(self._settings(generation))

    def mode(self, generation: int) -> Mode:
        """Whether a generation enforces or audits."""
        parsed = parse_settings(self._settings(generation))
        return Mode.ENFORCE if parsed is None else parsed[0].mode

    def _settings(self, generation: int) -> bytes:
        return self._lookup(Map.SETTINGS, abi.ARRAY_KEY.pack(generation))

    # --- records ----------------------------------------------------------------------------------------------------

    def _lookup(self, number: Map, key: bytes, copies: int = 1) -> bytes:
        """The value of a key, or zeros when there is none. A per-CPU map has a copy for each possible CPU."""
        size = self._described(number)[1].value_size * copies
        return bpf.map_lookup(self._fds[number], key, size) or bytes(size)

    def _items(self, number: Map, generation: int) -> Items:
        at = abi.GENERATION_AT[number]
        items = bpf.map_items(self._fds[number], abi.SHAPES[number])
        return tuple(item for item in items if item[0][at] == generation)

    def snapshot(self, generation: int) -> Snapshot:
        """Every record of a generation."""
        items: dict[Map, Items] = {number: self._items(number, generation) for number in _POLICY_MAPS}
        numbers = sorted({abi.LOCK.unpack(value)[0] for _, value in items[Map.LOCKS]})
        keys = [abi.list_key(generation, number) for number in numbers]
        records = ((key, bpf.map_lookup(self._fds[Map.LISTS], key, abi.LIST.size)) for key in keys)
        items[Map.LISTS] = tuple((key, record) for key, record in records if record is not None)
        key = abi.ARRAY_KEY.pack(generation)
        items[Map.ADDRESS_BITMAP] = ((key, self._lookup(Map.ADDRESS_BITMAP, key)),)
        settings, digest = parse_settings(self._settings(generation)) or (None, None)
        return Snapshot(Image(generation, items), settings, digest)

    def numbered(self, generation: int) -> Numbered:
        """The filters of a generation with their numbers; none where their records can't be read."""
        image = Image(generation, {number: self._items(number, generation) for number in FILTER_MAPS})
        try:
            return parse_numbered(image)
        except GuardError:
            return Numbered()

    def lock_names(self, generation: int) -> dict[int, str]:
        """Number of a lock -> its name."""
        return {
            abi.SMALL_KEY.unpack(key)[1]: abi.LOCK.unpack(value)[2].split(b"\0")[0].decode(errors="backslashreplace")
            for key, value in self._items(Map.LOCKS, generation)
        }

    def allowed_groups(self, generation: int) -> dict[int, frozenset[int]]:
        """Number of a lock -> the groups on its allow list that are not also on its deny list."""
        groups: dict[int, set[int]] = {}
        for key, value in self._items(Map.MEMBERS, generation):
            _, kind, number, identity = abi.MEMBER.unpack(key)
            if kind == abi.GROUP and abi.MEMBER_VALUE.unpack(value)[0] == abi.ALLOW:
                groups.setdefault(number, set()).add(identity)
        return {
            abi.SMALL_KEY.unpack(key)[1]: frozenset(groups.get(abi.LOCK.unpack(value)[0], ()))
            for key, value in self._items(Map.LOCKS, generation)
        }

    def lists_are_alike(self, generation: int) -> bool:
        """True where all locks allow the same users and groups, user 0 left aside: the WireServer's always has it."""
        allowed: dict[int, set[tuple[int, int]]] = {
            abi.LOCK.unpack(value)[0]: set() for _, value in self._items(Map.LOCKS, generation)
        }
        for key, value in self._items(Map.MEMBERS, generation):
            _, kind, number, identity = abi.MEMBER.unpack(key)
            if abi.MEMBER_VALUE.unpack(value)[0] == abi.ALLOW and (kind == abi.GROUP or identity):
                allowed.setdefault(number, set()).add((kind, identity))
        return len({frozenset(members) for members in allowed.values()}) <= 1

    def report_records(self, generation: int) -> Items:
        """The report's records of a generation."""
        return self._items(Map.REPORT, generation)

    # --- counters ---------------------------------------------------------------------------------------------------

    def counters(self) -> list[tuple[int, int]]:
        """(enforced, audited) by reason, then by enum ig_counted, summed over the CPUs."""
        cpus = bpf.possible_cpus()
        return [self._counted(number, cpus) for number in range(abi.COUNTERS)]

    def _counted(self, number: int, cpus: int) -> tuple[int, int]:
        values = self._lookup(Map.COUNTERS, abi.ARRAY_KEY.pack(number), cpus)
        pairs = list(abi.COUNTER.iter_unpack(values))
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)

    def lost(self) -> int:
        """Records that did not fit into the ring buffer, since the guard was started."""
        return self._counted(abi.LOST_EVENTS, bpf.possible_cpus())[0]

    def overflow(self) -> int:
        """Denials that did not fit into the report, since the guard was started."""
        return self._counted(abi.REPORT_OVERFLOW, bpf.possible_cpus())[0]


def open_map(pins: str, number: Map) -> int:
    """The fd of a pinned map. Raises FileNotFoundError when the guard is gone.

    Raises GuardError for a map that is missing or has another layout.
    """
    path = map_pin(pins, number)
    try:
        fd = bpf.pinned(path)
    except FileNotFoundError:
        if os.path.isdir(pins) and not os.path.exists(path):
            raise _other_version() from None
        raise
    try:
        if bpf.describe_map(fd)[1] != abi.SHAPES[number]:
            raise _other_version()
    except (GuardError, OSError):
        os.close(fd)
        raise
    return fd


def _other_version() -> GuardError:
    return GuardError(
        "reading the guard's maps: they are of another version of imds-guard, or one is missing; run imds-guard start, "
        "which puts this version in place"
    )


def all_pinned(pins: str) -> bool:
    """True when a folder has the pin of every map, and when the folder is gone altogether."""
    try:
        names = set(os.listdir(pins))
    except FileNotFoundError:
        return True
    return names >= {number.pin_name for number in Map}


_SINCE_ABI_3 = (Map.SHARES, Map.EARLIER, Map.FILTERS, Map.TARGETS, Map.FILTER_TEXTS, Map.FILTER_MARKS)


def of_abi_2(pins: str) -> bool:
    """True when a folder has every pin but those of the maps that ABI 3 brought: a guard of 0.1.0."""
    names = set(os.listdir(pins))
    later = {number.pin_name for number in _SINCE_ABI_3}
    return not names & later and names >= {number.pin_name for number in Map} - later


# --- fields of records ------------------------------------------------------------------------------------------------


def address_of(packed: bytes) -> Address:
    """The address in 16 bytes. An IPv4-mapped address becomes an IPv4 address."""
    return unmapped(ipaddress.IPv6Address(packed))


def reason_of(number: int) -> Reason:
    """Raises GuardError for a number that this version does not know: another version, or someone else, wrote it."""
    try:
        return Reason(number)
    except ValueError as error:
        raise GuardError(
            f"reading a record of a denial: this version of imds-guard knows no reason {number}; "
            "run imds-guard start, which puts its own programs in place"
        ) from error
