# SPDX-License-Identifier: Apache-2.0
"""What the hooks tell people: the records of the ring buffer, the rows of the report, and how much was lost.

All of it is read from pinned maps, without a compiler and without a lock: the policy may change meanwhile.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import Dict, FrozenSet, List, Optional, Tuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.folder import Folder
from imds_guard.backends.ebpf.render import BYTE_ORDER, parse_settings, serial_of
from imds_guard.errors import GuardError, trying
from imds_guard.kernel import bpf, bpffs
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.ringbuf import RingBuffer
from imds_guard.policy import Address, Mode, Protocol, Reason, unmapped

_ZERO = bytes(4)
_HOOKS = {
    abi.HOOK_CONNECT4: "connect4",
    abi.HOOK_CONNECT6: "connect6",
    abi.HOOK_SENDMSG4: "sendmsg4",
    abi.HOOK_SENDMSG6: "sendmsg6",
    abi.HOOK_EGRESS: "egress",
}
_VERDICTS = {abi.VERDICT_DENIED: "denied", abi.VERDICT_AUDITED: "audited", abi.VERDICT_ALLOWED: "allowed"}
_PROTOCOLS = {abi.TCP: Protocol.TCP, abi.UDP: Protocol.UDP}
_AT_VERDICT = 83
_READ_AGAIN = 20


# --- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """struct ig_event. ``lock`` is a number of ``generation``; ``comm`` is what the caller calls itself.

    Of a packet (hook ``egress``) the kernel knows no process: ``pid``, ``tgid`` and ``cgroup_id`` are 0.
    """

    time_ns: int
    """CLOCK_BOOTTIME."""
    cgroup_id: int
    netns_cookie: int
    pid: int
    """The thread."""
    tgid: int
    fsuid: int
    fsgid: int
    groups: int
    """How many supplementary ones."""
    address: Address
    port: int
    protocol: Optional[Protocol]
    lock: Optional[int]
    generation: int
    comm: bytes
    hook: str
    reason: Reason
    verdict: str
    """``denied``, ``audited`` (audit mode let it through) or ``allowed``."""


def decode(raw: bytes) -> Record:
    """The record in 88 octets of the ring buffer."""
    time_ns, cgroup_id, netns, pid, tgid, fsuid, fsgid, groups, port, lock, *rest = abi.EVENT.unpack(raw)
    address, comm, generation, hook, reason, verdict, protocol = rest
    return Record(
        time_ns,
        cgroup_id,
        netns,
        pid,
        tgid,
        fsuid,
        fsgid,
        groups,
        _address(address),
        port,
        _PROTOCOLS.get(protocol),
        None if lock == abi.NO_LOCK else lock,
        generation,
        comm.split(b"\0")[0],
        _HOOKS.get(hook, str(hook)),
        Reason(reason),
        _VERDICTS.get(verdict, str(verdict)),
    )


def same_caller(raw: bytes) -> bytes:
    """Equal for records that differ in time, process and thread alone; a slice or two, since floods pass through it."""
    return raw[8:24] + raw[32:40] + raw[44:]


def process_of(raw: bytes) -> bytes:
    """The octets of the thread group's ID."""
    return raw[28:32]


def is_allowed(raw: bytes) -> bool:
    """True for a record of a connect that the policy lets through."""
    return raw[_AT_VERDICT] == abi.VERDICT_ALLOWED


def _address(octets: bytes) -> Address:
    return unmapped(ipaddress.IPv6Address(octets))


# --- the guard's maps -----------------------------------------------------------------------------------------------


class Place:
    """Where the pins of a guard are, or would be: for the whole machine, or for the cgroup whose path is given."""

    def __init__(self, cgroup: Optional[str]) -> None:
        with open_cgroup(cgroup) as opened:
            self._id, self.is_root = opened.id, opened.is_root

    @property
    def name(self) -> str:
        """The name of the folder of pins, which is also that of lock files."""
        return Folder("", self._id, self.is_root).name

    def pins(self) -> Optional[str]:
        """The folder of pins, or None when there is no guard."""
        path = bpffs.find_bpffs()
        folder = None if path is None else Folder(path, self._id, self.is_root)
        return folder.path if folder is not None and folder.exists() else None


@dataclass(frozen=True)
class Lists:
    """What one lock lets through beside users: for words about what would help."""

    allowed_groups: FrozenSet[int]
    default_allow: bool


class Tables:
    """The maps beside the ring buffer: which generation is in force, names of locks, counters and the report."""

    def __init__(self, pins: str) -> None:
        self._fds: Dict[Map, int] = {}
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

    def in_force(self) -> Tuple[int, int]:
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

    def _items(self, number: Map, generation: int) -> List[Tuple[bytes, bytes]]:
        items = bpf.map_items(self._fds[number], abi.SHAPES[number])
        return [item for item in items if item[0][0] == generation]

    def lock_names(self, generation: int) -> Dict[int, str]:
        """Number of a lock -> its name."""
        return {
            abi.SMALL_KEY.unpack(key)[1]: abi.LOCK.unpack(value)[2].split(b"\0")[0].decode(errors="backslashreplace")
            for key, value in self._items(Map.LOCKS, generation)
        }

    def lists(self, generation: int) -> Dict[int, Lists]:
        """Number of a lock -> what its list says beside users."""
        groups: Dict[int, List[int]] = {}
        for key, value in self._items(Map.MEMBERS, generation):
            _, kind, number, identity = abi.MEMBER.unpack(key)
            if kind == abi.GROUP and abi.MEMBER_VALUE.unpack(value)[0] == abi.ALLOW:
                groups.setdefault(number, []).append(identity)
        return {
            abi.SMALL_KEY.unpack(key)[1]: self._lists_of(generation, abi.LOCK.unpack(value)[0], groups)
            for key, value in self._items(Map.LOCKS, generation)
        }

    def _lists_of(self, generation: int, number: int, groups: Dict[int, List[int]]) -> Lists:
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

    def rows(self, generation: int) -> List[Tuple[bytes, bytes]]:
        """The report's records of a generation."""
        return self._items(Map.REPORT, generation)


def _key(number: int) -> bytes:
    return number.to_bytes(4, BYTE_ORDER)


def open_map(pins: str, number: Map) -> int:
    """The fd of a pinned map. Raises FileNotFoundError, and GuardError for a map of another version's shape."""
    path = os.path.join(pins, number.name.lower())
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


# --- the ring buffer ------------------------------------------------------------------------------------------------


class Source:
    """The records of one guard, for its one reader. Close it."""

    def __init__(self, pins: str) -> None:
        self._pin = os.path.join(pins, Map.EVENTS.name.lower())
        self._inode = os.stat(self._pin).st_ino if os.path.exists(self._pin) else 0
        self._names: Dict[int, Dict[int, str]] = {}
        self._serials: Dict[int, int] = {}
        self._lists: Tuple[int, Dict[int, Lists]] = (0, {})
        self.tables = Tables(pins)
        try:
            self._watch = open_map(pins, Map.WATCH)
        except (GuardError, OSError):
            self.tables.close()
            raise
        try:
            self.ring = RingBuffer(open_map(pins, Map.EVENTS))
        except (GuardError, OSError):
            self.tables.close()
            os.close(self._watch)
            raise
        self.refresh()

    @classmethod
    def open(cls, place: Place) -> Optional[Source]:
        """The guard's records, or None when there is no guard, or it is going away at this moment."""
        with trying("opening the guard's ring buffer", "run imds-guard status"):
            pins = place.pins()
            if pins is None:
                return None
            try:
                return cls(pins)
            except FileNotFoundError:
                return None

    def close(self) -> None:
        """What was not read stays for the next reader."""
        self.ring.close()
        self.tables.close()
        os.close(self._watch)

    def is_current(self) -> bool:
        """False when the guard was removed, or its maps were replaced by others."""
        try:
            return os.stat(self._pin).st_ino == self._inode
        except FileNotFoundError:
            return False

    def log_allowed(self, wanted: bool) -> None:
        """Whether the hooks also tell of what they let through; stays as it is when we are killed."""
        with trying("telling the hooks what to log", "run imds-guard status"):
            bpf.map_update(self._watch, _ZERO, abi.WATCH.pack(int(wanted)))

    def refresh(self) -> None:
        """Reads the names of the locks anew when the policy has changed; those of the one before are kept."""
        generation, serial = self.tables.in_force()
        if generation and self._serials.get(generation) != serial:
            self._names[generation] = self.tables.lock_names(generation)
            self._serials[generation] = serial

    def lock_name(self, record: Record) -> Optional[str]:
        """The name of a record's lock; None when it has none, or its policy is gone and nobody remembers."""
        if record.lock is None:
            return None
        if record.lock not in self._names.get(record.generation, {}):
            self.refresh()
        return self._names.get(record.generation, {}).get(record.lock)

    def lists_of(self, record: Record) -> Optional[Lists]:
        """What the record's lock lets through, if the policy that judged it is still in force."""
        generation, serial = self.tables.in_force()
        if record.lock is None or record.generation != generation:
            return None
        if self._lists[0] != serial:
            self._lists = (serial, self.tables.lists(generation))
        return self._lists[1].get(record.lock)


# --- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Denials of one user at one lock for one reason; address, port and ``comm`` are those of the first."""

    lock: Optional[str]
    reason: Reason
    fsuid: int
    count: int
    first_ns: int
    """CLOCK_BOOTTIME, as is ``last_ns``."""
    last_ns: int
    address: Address
    port: int
    protocol: Optional[Protocol]
    comm: bytes


@dataclass(frozen=True)
class Report:
    """Who was denied, or would have been in audit mode, since the policy in force came into force."""

    generation: int
    serial: int
    mode: Mode
    rows: Tuple[Row, ...]
    overflow: int
    """Denials without a row, for want of room, since the guard's maps were made."""


def read_report(place: Place) -> Optional[Report]:
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


def _row(key: bytes, value: bytes, names: Dict[int, str]) -> Row:
    _, reason, lock, fsuid = abi.REPORT_KEY.unpack(key)
    count, first_ns, last_ns, address, port, protocol, comm = abi.REPORT.unpack(value)
    return Row(
        names.get(lock),
        Reason(reason),
        fsuid,
        count,
        first_ns,
        last_ns,
        _address(address),
        port,
        _PROTOCOLS.get(protocol),
        comm.split(b"\0")[0],
    )
