# SPDX-License-Identifier: Apache-2.0
"""The ring buffer of a guard, opened for its one reader, and the maps that explain its records."""

from __future__ import annotations

import os

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.pins import PinLocation, map_pin
from imds_guard.backends.ebpf.reader import MapReader, open_map
from imds_guard.backends.ebpf.record import Record
from imds_guard.errors import GuardError, trying
from imds_guard.kernel import bpf
from imds_guard.kernel.ringbuf import RingBuffer

_ZERO = bytes(4)


class RecordSource:
    """Reads the records of one guard. Close it."""

    def __init__(self, pins: str) -> None:
        self._pin = map_pin(pins, Map.EVENTS)
        self._inode = os.stat(self._pin).st_ino if os.path.exists(self._pin) else 0
        self._names: dict[int, dict[int, str]] = {}
        self._serials: dict[int, int] = {}
        self._groups: tuple[int, dict[int, frozenset[int]]] = (0, {})
        self._alike: tuple[int, bool] = (0, True)
        self._maps = MapReader.open_checked(pins)
        try:
            self._watch_fd = open_map(pins, Map.WATCH)
        except (GuardError, OSError):
            self._maps.close()
            raise
        try:
            self._ring = RingBuffer(open_map(pins, Map.EVENTS))
        except (GuardError, OSError):
            self._maps.close()
            os.close(self._watch_fd)
            raise
        try:
            self.refresh()
        except OSError:
            self.close()
            raise

    @classmethod
    def open(cls, location: PinLocation) -> RecordSource | None:
        """Opens the maps of a guard; None when there is no guard, or it is being removed."""
        with trying("opening the guard's ring buffer", "run imds-guard status"):
            pins = location.pins()
            if pins is None:
                return None
            try:
                return cls(pins)
            except FileNotFoundError:
                return None

    def close(self) -> None:
        """Closes the maps. Unread records stay for the next reader."""
        self._ring.close()
        self._maps.close()
        os.close(self._watch_fd)

    def fileno(self) -> int:
        """For poll(2): readable while there are unread records."""
        return self._ring.fileno()

    def read(self) -> list[bytes]:
        """The unread records, undecoded, each of the size of struct ig_event."""
        records = self._ring.read()
        if any(len(record) != abi.EVENT.size for record in records):
            raise GuardError(
                "reading the ring buffer: its records are from another version of imds-guard; run imds-guard start, "
                "which loads the programs of this version"
            )
        return records

    def lost(self) -> int:
        """The number of records that found the ring buffer full, since the guard was started."""
        return self._maps.lost()

    def is_current(self) -> bool:
        """False when the guard was removed, or its maps were replaced by others."""
        try:
            return os.stat(self._pin).st_ino == self._inode
        except FileNotFoundError:
            return False

    def log_allowed(self, wanted: bool) -> None:
        """Sets whether the hooks also write records of allowed connects. The setting outlives this process."""
        with trying("telling the hooks which connects to report", "run imds-guard status"):
            bpf.map_update(self._watch_fd, _ZERO, abi.WATCH.pack(int(wanted)))

    def refresh(self) -> None:
        """Reads the names of the locks again if the policy has changed; those of the policy before are kept."""
        generation, serial = self._maps.in_force()
        if generation and self._serials.get(generation) != serial:
            self._names[generation] = self._maps.lock_names(generation)
            self._serials[generation] = serial

    def lock_name(self, record: Record) -> str | None:
        """The name of a record's lock; None when it has none, or its policy is gone and its names were not read."""
        if record.lock is None:
            return None
        if record.lock not in self._names.get(record.generation, {}):
            self.refresh()
        return self._names.get(record.generation, {}).get(record.lock)

    def allowed_groups(self, record: Record) -> frozenset[int]:
        """The groups that the record's lock allows; empty when the policy that judged it is no longer in force."""
        generation, serial = self._maps.in_force()
        if record.lock is None or record.generation != generation:
            return frozenset()
        if self._groups[0] != serial:
            self._groups = (serial, self._maps.allowed_groups(generation))
        return self._groups[1].get(record.lock, frozenset())

    def needs_endpoint(self, record: Record) -> bool:
        """True where ``allow`` needs --ip, since the locks of the policy that judged the record have other lists."""
        generation, serial = self._maps.in_force()
        if record.lock is None or record.generation != generation:
            return False
        if self._alike[0] != serial:
            self._alike = (serial, self._maps.lists_are_alike(generation))
        return not self._alike[1]
