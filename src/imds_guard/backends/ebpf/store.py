# SPDX-License-Identifier: Apache-2.0
"""The pinned maps: made, opened, filled, flipped, emptied and read."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.render import BYTE_ORDER, Image, Settings, parse_settings, serial_of, settings_of
from imds_guard.backends.ebpf.render import render as render_image
from imds_guard.errors import GuardError, NotPermitted, system_text, trying
from imds_guard.kernel import bpf, grace, privileges
from imds_guard.policy.model import Policy

_ZERO = bytes(4)
_HASHES = (Map.ENDPOINTS, Map.MEMBERS, Map.GROUPS, Map.LOCKS)
"""Maps that hold a policy, and whose records carry their generation in the key."""
_GENERATION_AT = {Map.ENDPOINTS: 4, Map.MEMBERS: 0, Map.GROUPS: 0, Map.LOCKS: 0, Map.REPORT: 0}
"""Where in the key the generation is."""


_NEXT_CLEARS = "the new one is in force, and the next command clears the old one away"


def _key(number: int) -> bytes:
    return number.to_bytes(4, BYTE_ORDER)


def _create(shape: bpf.MapShape, name: str) -> int:
    try:
        return bpf.map_create(shape, name)
    except PermissionError as error:
        limit = privileges.memory_lock_limit()
        if limit is None:
            raise
        raise NotPermitted(
            f"making the eBPF map {name}: {system_text(error)}; before Linux 5.11 maps count against RLIMIT_MEMLOCK, "
            f"which is {limit} octets here and which this process may not raise: run ulimit -l unlimited first"
        ) from error


class Snapshot(NamedTuple):
    """What the maps hold of one generation; ``settings`` and ``digest`` are None when there is no valid record."""

    image: Image
    settings: Settings | None
    digest: bytes | None


class Maps:
    """Open file descriptors of all maps. Close it, or use it as a context manager."""

    def __init__(self, fds: dict[Map, int]) -> None:
        self._fds = fds

    @classmethod
    def create(cls, folder: str) -> Maps:
        """New maps at generation 0, pinned in a folder that is there."""
        maps = cls({})
        try:
            for number, shape in abi.SHAPES.items():
                with trying(f"making the eBPF map {number.pin_name}", "nothing was changed; free some memory"):
                    maps._fds[number] = _create(shape, f"ig_{number.pin_name}")
                    bpf.pin(maps._fds[number], os.path.join(folder, number.pin_name))
        except GuardError:
            maps.close()
            raise
        return maps

    @classmethod
    def open(cls, folder: str) -> Maps:
        """The maps that are pinned in a folder. Raises FileNotFoundError when one is missing."""
        maps = cls({})
        try:
            for number in Map:
                maps._fds[number] = bpf.pinned(os.path.join(folder, number.pin_name))
        except OSError:
            maps.close()
            raise
        return maps

    @staticmethod
    def are_pinned(folder: str) -> bool:
        """True when a folder is gone altogether, or has the pin of every map."""
        try:
            names = set(os.listdir(folder))
        except FileNotFoundError:
            return True
        return names >= {number.pin_name for number in Map}

    def close(self) -> None:
        """Closes the file descriptors; the pins stay."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Maps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fds(self) -> list[int]:
        """In the order of abi.Map."""
        return [self._fds[number] for number in Map]

    def ids(self) -> list[int]:
        """The kernel's IDs of the maps."""
        return [bpf.describe_map(fd)[0] for fd in self.fds()]

    def misfits(self) -> list[Map]:
        """Maps that are not of the type, sizes and flags that this version uses."""
        return [number for number, shape in abi.SHAPES.items() if bpf.describe_map(self._fds[number])[1] != shape]

    # --- generations ---

    def generation(self) -> int:
        """The generation in force; 0 when nothing is locked."""
        record = bpf.map_lookup(self._fds[Map.CONFIG], _ZERO, abi.CONFIG.size)
        return int(abi.CONFIG.unpack(record or bytes(abi.CONFIG.size))[0])

    def flip(self, generation: int) -> None:
        """Puts a generation in force, and returns when no hook uses the one before any more."""
        with trying("putting the new policy in force", "the old one stays"):
            bpf.map_update(self._fds[Map.CONFIG], _ZERO, abi.CONFIG.pack(generation))
        with trying("waiting until no hook uses the policy before any more", _NEXT_CLEARS):
            grace.wait_for_running_programs()

    def change(self, policy: Policy) -> None:
        """Puts ``policy`` in force in one flip. On any error the policy before stays, whole."""
        old = self.generation()
        new = 2 if old == 1 else 1
        # A command that was killed right after its flip did not wait: a hook may still read what lies there.
        with trying("waiting until no hook uses what the new policy will replace", "the policy before stays in force"):
            grace.wait_for_running_programs()
        try:
            self.empty(new)
            self.fill(policy, new, self.serial(old) + 1)
        except (OSError, GuardError) as error:
            with suppress(OSError):  # what is left there is not in force, and the next change empties it first
                self.empty(new)
            words = system_text(error) if isinstance(error, OSError) else str(error)
            raise GuardError(
                f"writing the policy to the eBPF maps: {words}; the policy before stays in force"
            ) from error
        self.flip(new)
        if old:
            with trying("clearing the policy before from the eBPF maps", _NEXT_CLEARS):
                self.empty(old)

    def serial(self, generation: int) -> int:
        """The number of the change that put a generation in force."""
        record = bpf.map_lookup(self._fds[Map.SETTINGS], _key(generation), abi.SETTINGS.size)
        return serial_of(record or bytes(abi.SETTINGS.size))

    def fill(self, policy: Policy, generation: int, serial: int) -> None:
        """Writes a generation; its settings last, since without them it denies."""
        image = render_image(policy, generation)
        for number, items in image.items.items():
            if items:
                bpf.map_update_all(self._fds[number], items)
        record = settings_of(policy).pack(image.digest(), serial)
        bpf.map_update(self._fds[Map.SETTINGS], _key(generation), record)

    def empty(self, generation: int) -> None:
        """Removes every record of a generation that is not in force; its settings first."""
        bpf.map_update(self._fds[Map.SETTINGS], _key(generation), bytes(abi.SETTINGS.size))
        bpf.map_update(self._fds[Map.ADDRESS_BITMAP], _key(generation), bytes(abi.ADDRESS_BITMAP_BYTES))
        self._empty_lists(generation)
        for number in _GENERATION_AT:
            keys = [key for key, _ in self._items(number, generation)]
            if keys:
                bpf.map_delete_all(self._fds[number], keys)

    def _empty_lists(self, generation: int) -> None:
        """An array's records can't be deleted. They are used from the first on and zeroed from the last one back,
        so that a kill at any point leaves no gap.
        """
        first = (generation - 1) * abi.LISTS
        used = first
        while used < first + abi.LISTS and any(bpf.map_lookup(self._fds[Map.LISTS], _key(used), abi.LIST.size) or b""):
            used += 1
        for number in range(used - 1, first - 1, -1):
            bpf.map_update(self._fds[Map.LISTS], _key(number), bytes(abi.LIST.size))

    # --- reading ---

    def _items(self, number: Map, generation: int) -> list[tuple[bytes, bytes]]:
        at = _GENERATION_AT[number]
        return [item for item in bpf.map_items(self._fds[number], abi.SHAPES[number]) if item[0][at] == generation]

    def snapshot(self, generation: int) -> Snapshot:
        """Every record of a generation."""
        items = {number: tuple(self._items(number, generation)) for number in _HASHES}
        lists = sorted({abi.LOCK.unpack(value)[0] for _, value in items[Map.LOCKS]})
        keys = [_key((generation - 1) * abi.LISTS + number) for number in lists]
        records = ((key, bpf.map_lookup(self._fds[Map.LISTS], key, abi.LIST.size)) for key in keys)
        items[Map.LISTS] = tuple((key, record) for key, record in records if record is not None)
        look = bpf.map_lookup(self._fds[Map.ADDRESS_BITMAP], _key(generation), abi.ADDRESS_BITMAP_BYTES)
        items[Map.ADDRESS_BITMAP] = ((_key(generation), look or b""),)
        record = bpf.map_lookup(self._fds[Map.SETTINGS], _key(generation), abi.SETTINGS.size)
        parsed = parse_settings(record) if record else None
        settings, digest = parsed if parsed else (None, None)
        return Snapshot(Image(generation, items), settings, digest)

    def counters(self) -> list[tuple[int, int]]:
        """(enforced, audited) by reason, then by enum ig_counted, summed over the CPUs."""
        cpus = bpf.possible_cpus()
        sums = []
        for reason in range(abi.COUNTERS):
            values = bpf.map_lookup(self._fds[Map.COUNTERS], _key(reason), abi.COUNTER.size * cpus) or b""
            pairs = list(abi.COUNTER.iter_unpack(values))
            sums.append((sum(p[0] for p in pairs), sum(p[1] for p in pairs)))
        return sums
