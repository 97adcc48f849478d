# SPDX-License-Identifier: Apache-2.0
"""Writes the guard's maps: makes them, and puts a policy in force by a change of generation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.image import settings_of
from imds_guard.backends.ebpf.pins import map_pin
from imds_guard.backends.ebpf.reader import MapReader
from imds_guard.backends.ebpf.render import render
from imds_guard.errors import GuardError, NotPermitted, system_text, trying
from imds_guard.kernel import bpf, grace, privileges
from imds_guard.policy.filter_numbers import Numbers, assigned
from imds_guard.policy.model import Policy

_NEXT_CLEARS = "the new one is in force, and the next command clears the old one away"

_RESERVED = 0
"""The settings record that holds the last reserved serial number: no hook reads the one of generation 0."""


class MapStore(MapReader):
    """All maps of one guard, to be changed. Close it, or use it as a context manager."""

    @classmethod
    def create(cls, folder: str, kept: Mapping[Map, str] | None = None) -> MapStore:
        """Maps at generation 0, pinned in a folder that is there: new ones, and those of ``kept`` from their pins."""
        store = cls()
        kept = kept or {}
        try:
            for number, shape in abi.SHAPES.items():
                with trying(f"making the eBPF map {number.pin_name}", "nothing was changed; free some memory"):
                    old = kept.get(number)
                    store._fds[number] = _create(shape, f"ig_{number.pin_name}") if old is None else bpf.pinned(old)
                    bpf.pin(store._fds[number], map_pin(folder, number))
        except GuardError:
            store.close()
            raise
        return store

    def fds(self) -> list[int]:
        """In the order of abi.Map."""
        return [self._fds[number] for number in Map]

    # --- a change of generation -------------------------------------------------------------------------------------

    def change(self, policy: Policy, serial: int = 0) -> None:
        """Puts ``policy`` in force in one flip. On any error the policy before stays, whole.

        ``serial`` is the number of the change. Without one it is the next of these maps.
        """
        old = self.generation()
        new = self._free_generation(old)
        # A command that was killed right after its flip did not wait. A hook may still read the generation before.
        with trying("waiting until no hook uses what the new policy will replace", "the policy before stays in force"):
            grace.wait_for_running_programs()
        try:
            serial = serial or self._last_serial() + 1
            self.empty(new)
            self.fill(policy, new, serial, assigned(policy, self.numbered(old)) if policy.filters else None)
        except (OSError, GuardError) as error:
            with suppress(OSError):  # what is left there is not in force, and the next change empties it first
                self.empty(new)
            reason = system_text(error) if isinstance(error, OSError) else str(error)
            raise GuardError(
                f"writing the policy to the eBPF maps: {reason}; the policy before stays in force"
            ) from error
        self.flip(new)
        if old:
            with suppress(OSError, GuardError):  # the policy is in force: without this the report begins anew
                self._carry_report(old, new, policy)
            with trying("clearing the policy before from the eBPF maps", _NEXT_CLEARS):
                self.empty(old)

    def _carry_report(self, old: int, new: int, policy: Policy) -> None:
        """Moves the rows of the report whose caller the new policy denies, too. No hook uses ``old`` any more."""
        from imds_guard.backends.ebpf.carry import Carrier, merged, shares_of  # noqa: PLC0415 -- start-up time

        items = self._items(Map.REPORT, old)
        if not items:
            return
        numbers = {name: number for number, name in self.lock_names(new).items()}
        rows = Carrier(policy, numbers, new).carried(items)
        bpf.map_delete_all(self._fds[Map.REPORT], [key for key, _ in items])  # so that there is room for the others
        for key, record in self._items(Map.REPORT, new):  # hooks have written them since the flip
            if key in rows:
                rows[key] = merged(rows[key], record)
        bpf.map_update_all(self._fds[Map.REPORT], list(rows.items()))
        shares = shares_of([key for key, _ in self._items(Map.REPORT, new)], new)
        bpf.map_update_all(self._fds[Map.SHARES], [(key, abi.SHARE.pack(rows)) for key, rows in shares.items()])

    def _free_generation(self, in_force: int) -> int:
        """The generation for the next policy. When none is in force: not the one that has the last serial number.

        A command that is killed after it has emptied that one would lose the number. Then the next policy would get a
        number that was in force before, and marks from then would pass for its own.
        """
        if in_force:
            return 3 - in_force
        return min(abi.GENERATIONS, key=lambda generation: self.stamp(generation).serial)

    def _last_serial(self) -> int:
        """The highest serial number that was given to a change or reserved."""
        return max(self.stamp(generation).serial for generation in (_RESERVED, *abi.GENERATIONS))

    def reserve_serial(self) -> int:
        """A serial number that no change of these maps had, and none will get."""
        serial = self._last_serial() + 1
        size = self._described(Map.SETTINGS)[1].value_size
        record = abi.SETTINGS.pack(0, 0, 0, 0, b"", 0, serial)
        bpf.map_update(self._fds[Map.SETTINGS], abi.ARRAY_KEY.pack(_RESERVED), record[:size].ljust(size, b"\0"))
        return serial

    def fill(self, policy: Policy, generation: int, serial: int, numbers: Numbers | None = None) -> None:
        """Writes a generation. Its settings are written last: without them the generation denies."""
        image = render(policy, generation, numbers)
        for number, items in image.items.items():
            if items:
                bpf.map_update_all(self._fds[number], items)
        record = settings_of(policy).pack(image.digest(), serial)
        bpf.map_update(self._fds[Map.SETTINGS], abi.ARRAY_KEY.pack(generation), record)

    def flip(self, generation: int) -> None:
        """Puts a generation in force, and returns when no hook uses the one before any more."""
        with trying("putting the new policy in force", "the old one stays"):
            bpf.map_update(self._fds[Map.CONFIG], abi.ARRAY_KEY.pack(0), abi.CONFIG.pack(generation))
        with trying("waiting until no hook uses the policy before any more", _NEXT_CLEARS):
            grace.wait_for_running_programs()

    def empty(self, generation: int) -> None:
        """Removes every record of a generation that is not in force. Its settings are removed first."""
        key = abi.ARRAY_KEY.pack(generation)
        bpf.map_update(self._fds[Map.SETTINGS], key, bytes(abi.SETTINGS.size))
        bpf.map_update(self._fds[Map.ADDRESS_BITMAP], key, bytes(abi.ADDRESS_BITMAP_BYTES))
        self._empty_lists(generation)
        for number in abi.GENERATION_AT:
            keys = [key for key, _ in self._items(number, generation)]
            if keys:
                bpf.map_delete_all(self._fds[number], keys)

    def _empty_lists(self, generation: int) -> None:
        """Sets the lists of a generation to zero: the records of an array can't be deleted.

        Lists are used from the first record on. They are emptied from the last one back, so that a kill at any point
        leaves no gap.
        """
        used = 0
        while used < abi.LISTS and any(self._lookup(Map.LISTS, abi.list_key(generation, used))):
            used += 1
        for number in range(used - 1, -1, -1):
            bpf.map_update(self._fds[Map.LISTS], abi.list_key(generation, number), bytes(abi.LIST.size))


def _create(shape: bpf.MapShape, name: str) -> int:
    try:
        return bpf.map_create(shape, name)
    except PermissionError as error:
        limit = privileges.memory_lock_limit()
        if limit is None:
            raise
        raise NotPermitted(
            f"making the eBPF map {name}: {system_text(error)}; before Linux 5.11 maps count against RLIMIT_MEMLOCK, "
            f"which is {limit} bytes here and which this process may not raise: run ulimit -l unlimited first"
        ) from error
