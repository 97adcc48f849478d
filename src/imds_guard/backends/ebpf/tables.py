# SPDX-License-Identifier: Apache-2.0
"""The maps beside the ring buffer that people are told from: names of locks, counters, and the report.

All of it is read from pinned maps, without a compiler and without a lock: the policy may change meanwhile.
"""

from __future__ import annotations

import ipaddress
import os
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.folder import Folder
from imds_guard.backends.ebpf.render import BYTE_ORDER, parse_settings, serial_of
from imds_guard.errors import GuardError, trying
from imds_guard.kernel import bpf, bpffs
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Address, Mode, Protocol, unmapped

PROTOCOLS = {abi.TCP: Protocol.TCP, abi.UDP: Protocol.UDP}
_ZERO = bytes(4)
_READ_AGAIN = 20


def address_of(octets: bytes) -> Address:
    """A mapped address as the IPv4 address that it means."""
    return unmapped(ipaddress.IPv6Address(octets))


class Place:
    """Where the pins of a guard are, or would be: for the whole machine, or for the cgroup whose path is given."""

    def __init__(self, cgroup: str | None) -> None:
        with open_cgroup(cgroup) as opened:
            self._id, self.is_root = opened.id, opened.is_root

    @property
    def name(self) -> str:
        """The name of the folder of pins, which is also that of lock files."""
        return Folder("", self._id, self.is_root).name

    def pins(self) -> str | None:
        """The folder of pins, or None when there is no guard."""
        path = bpffs.find_bpffs()
        folder = None if path is None else Folder(path, self._id, self.is_root)
        return folder.path if folder is not None and folder.exists() else None


class Lists(NamedTuple):
    """What one lock lets through beside users: for words about what would help."""

    allowed_groups: frozenset[int]
    default_allow: bool


class Tables:
    """The maps beside the ring buffer: which generation is in force, names of locks, counters and the report."""

    def __init__(self, pins: str) -> None:
        self._fds: dict[Map, int] = {}
        try:
            for number in (Map.CONFIG, Map.SETTINGS, Map.LISTS, Map.MEMBERS, Map.LOCKS, Map.COUNTERS, Map.REPORT):
                self._fds[number] = open_map(pins, number)
        except (GuardError, OSError):
            self.close()
            raise

    def close(self) -> None:
        """Closes the file descriptors."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def in_force(self) -> tuple[int, int]:
        """The generation in force and its serial number; (0, 0) when nothing is locked."""
        config = bpf.map_lookup(self._fds[Map.CONFIG], _ZERO, abi.CONFIG.size) or bytes(abi.CONFIG.size)
        (generation,) = abi.CONFIG.unpack(config)
        return (generation, serial_of(self._settings(generation))) if generation else (0, 0)

    def mode(self, generation: int) -> Mode:
        """Enforced or audited."""
        parsed = parse_settings(self._settings(generation))
        return Mode.ENFORCE if parsed is None else parsed[0].mode

    def _settings(self, generation: int) -> bytes:
        return bpf.map_lookup(self._fds[Map.SETTINGS], _key(generation), abi.SETTINGS.size) or bytes(abi.SETTINGS.size)

    def _items(self, number: Map, generation: int) -> list[tuple[bytes, bytes]]:
        items = bpf.map_items(self._fds[number], abi.SHAPES[number])
        return [item for item in items if item[0][0] == generation]

    def lock_names(self, generation: int) -> dict[int, str]:
        """Number of a lock -> its name."""
        return {
            abi.SMALL_KEY.unpack(key)[1]: abi.LOCK.unpack(value)[2].split(b"\0")[0].decode(errors="backslashreplace")
            for key, value in self._items(Map.LOCKS, generation)
        }

    def lists(self, generation: int) -> dict[int, Lists]:
        """Number of a lock -> what its list says beside users."""
        groups: dict[int, list[int]] = {}
        for key, value in self._items(Map.MEMBERS, generation):
            _, kind, number, identity = abi.MEMBER.unpack(key)
            if kind == abi.GROUP and abi.MEMBER_VALUE.unpack(value)[0] == abi.ALLOW:
                groups.setdefault(number, []).append(identity)
        return {
            abi.SMALL_KEY.unpack(key)[1]: self._lists_of(generation, abi.LOCK.unpack(value)[0], groups)
            for key, value in self._items(Map.LOCKS, generation)
        }

    def _lists_of(self, generation: int, number: int, groups: dict[int, list[int]]) -> Lists:
        key = _key((generation - 1) * abi.LISTS + number)
        record = bpf.map_lookup(self._fds[Map.LISTS], key, abi.LIST.size) or bytes(abi.LIST.size)
        flags = abi.LIST.unpack(record)[0]
        return Lists(frozenset(groups.get(number, ())), bool(flags & abi.LIST_DEFAULT_ALLOW))

    def lost(self) -> int:
        """Records that found no room in the ring buffer, since the guard's maps were made."""
        return self._counted(abi.LOST_EVENTS)

    def overflow(self) -> int:
        """Denials that found no room in the report, since the guard's maps were made."""
        return self._counted(abi.REPORT_OVERFLOW)

    def _counted(self, number: int) -> int:
        room = abi.COUNTER.size * bpf.possible_cpus()
        values = bpf.map_lookup(self._fds[Map.COUNTERS], _key(number), room) or b""
        return sum(enforced for enforced, _ in abi.COUNTER.iter_unpack(values))

    def rows(self, generation: int) -> list[tuple[bytes, bytes]]:
        """The report's records of a generation."""
        return self._items(Map.REPORT, generation)


def reason_of(number: int) -> Reason:
    """Raises GuardError for a number that only another version's programs, or somebody else, can have written."""
    try:
        return Reason(number)
    except ValueError as error:
        raise GuardError(
            f"reading a record of a denial: {number} is no reason that this version of imds-guard knows; "
            "run imds-guard start, which puts its own programs in place"
        ) from error


def _key(number: int) -> bytes:
    return number.to_bytes(4, BYTE_ORDER)


def open_map(pins: str, number: Map) -> int:
    """The fd of a pinned map. Raises FileNotFoundError, and GuardError for a map of another version's shape."""
    path = os.path.join(pins, number.pin_name)
    try:
        fd = bpf.pinned(path)
    except FileNotFoundError:
        if os.path.isdir(pins) and not os.path.exists(path):
            raise _other_version() from None
        raise
    if bpf.describe_map(fd)[1] != abi.SHAPES[number]:
        os.close(fd)
        raise _other_version()
    return fd


def _other_version() -> GuardError:
    return GuardError(
        "reading what the guard tells: its maps are of another version of imds-guard, or one is gone; run imds-guard "
        "start, which puts this version in place"
    )


# --- the report -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Denials of one user at one lock for one reason; address, port and ``comm`` are those of the first."""

    lock: str | None
    reason: Reason
    fsuid: int
    count: int  # type: ignore[assignment]  # a tuple has a method of that name
    first_ns: int
    """CLOCK_BOOTTIME, as is ``last_ns``."""
    last_ns: int
    address: Address
    port: int
    protocol: Protocol | None
    comm: bytes


class Report(NamedTuple):
    """Who was denied, or would have been in audit mode, since the policy in force came into force."""

    generation: int
    serial: int
    mode: Mode
    rows: tuple[Row, ...]
    overflow: int
    """Denials without a row, for want of room, since the guard's maps were made."""


def read_report(place: Place) -> Report | None:
    """The report of the policy in force; None when nothing is locked. Read again when the policy changes meanwhile."""
    with trying("reading the report", "run imds-guard status"):
        for _ in range(_READ_AGAIN):
            pins = place.pins()
            if pins is None:
                return None
            try:
                with Tables(pins) as tables:
                    before = tables.in_force()
                    if before == (0, 0):
                        return None
                    report = _report(tables, *before)
                    if tables.in_force() == before:
                        return report
            except FileNotFoundError:
                continue
    raise GuardError("reading the report: the policy kept changing; try again")


def _report(tables: Tables, generation: int, serial: int) -> Report:
    names = tables.lock_names(generation)
    rows = [_row(key, value, names) for key, value in tables.rows(generation)]
    rows.sort(key=lambda row: (-row.count, row.lock or "", row.fsuid, row.reason))
    return Report(generation, serial, tables.mode(generation), tuple(rows), tables.overflow())


def _row(key: bytes, value: bytes, names: dict[int, str]) -> Row:
    _, reason, lock, fsuid = abi.REPORT_KEY.unpack(key)
    count, first_ns, last_ns, address, port, protocol, comm = abi.REPORT.unpack(value)
    return Row(
        names.get(lock),
        reason_of(reason),
        fsuid,
        count,
        first_ns,
        last_ns,
        address_of(address),
        port,
        PROTOCOLS.get(protocol),
        comm.split(b"\0")[0],
    )
