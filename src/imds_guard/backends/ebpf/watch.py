# SPDX-License-Identifier: Apache-2.0
"""What the hooks tell people at once: the records of the ring buffer, and the guard that they come from."""

from __future__ import annotations

import os
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.pins import PinLocation, map_pin
from imds_guard.backends.ebpf.reader import PROTOCOLS, MapReader, address_of, open_map, reason_of
from imds_guard.errors import GuardError, trying
from imds_guard.kernel import bpf
from imds_guard.kernel.ringbuf import RingBuffer
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Address, Protocol

_ZERO = bytes(4)
_HOOKS = {
    abi.HOOK_CONNECT4: "connect4",
    abi.HOOK_CONNECT6: "connect6",
    abi.HOOK_SENDMSG4: "sendmsg4",
    abi.HOOK_SENDMSG6: "sendmsg6",
    abi.HOOK_EGRESS: "egress",
}
_VERDICTS = {abi.VERDICT_DENIED: "denied", abi.VERDICT_AUDITED: "audited", abi.VERDICT_ALLOWED: "allowed"}
_AT_VERDICT = 83


# --- records --------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
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
    protocol: Protocol | None
    lock: int | None
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
        address_of(address),
        port,
        PROTOCOLS.get(protocol),
        None if lock == abi.NO_LOCK else lock,
        generation,
        comm.split(b"\0")[0],
        _HOOKS.get(hook, str(hook)),
        reason_of(reason),
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


# --- the ring buffer ------------------------------------------------------------------------------------------------


class Source:
    """The records of one guard, for its one reader. Close it."""

    def __init__(self, pins: str) -> None:
        self._pin = map_pin(pins, Map.EVENTS)
        self._inode = os.stat(self._pin).st_ino if os.path.exists(self._pin) else 0
        self._names: dict[int, dict[int, str]] = {}
        self._serials: dict[int, int] = {}
        self._groups: tuple[int, dict[int, frozenset[int]]] = (0, {})
        self.maps = MapReader.open_checked(pins)
        try:
            self._watch = open_map(pins, Map.WATCH)
        except (GuardError, OSError):
            self.maps.close()
            raise
        try:
            self.ring = RingBuffer(open_map(pins, Map.EVENTS))
        except (GuardError, OSError):
            self.maps.close()
            os.close(self._watch)
            raise
        try:
            self.refresh()
        except OSError:
            self.close()
            raise

    @classmethod
    def open(cls, location: PinLocation) -> Source | None:
        """The guard's records, or None when there is no guard, or it is going away at this moment."""
        with trying("opening the guard's ring buffer", "run imds-guard status"):
            pins = location.pins()
            if pins is None:
                return None
            try:
                return cls(pins)
            except FileNotFoundError:
                return None

    def close(self) -> None:
        """What was not read stays for the next reader."""
        self.ring.close()
        self.maps.close()
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
        generation, serial = self.maps.in_force()
        if generation and self._serials.get(generation) != serial:
            self._names[generation] = self.maps.lock_names(generation)
            self._serials[generation] = serial

    def lock_name(self, record: Record) -> str | None:
        """The name of a record's lock; None when it has none, or its policy is gone and nobody remembers."""
        if record.lock is None:
            return None
        if record.lock not in self._names.get(record.generation, {}):
            self.refresh()
        return self._names.get(record.generation, {}).get(record.lock)

    def allowed_groups(self, record: Record) -> frozenset[int]:
        """The groups that the record's lock allows. None are known once another policy is in force."""
        generation, serial = self.maps.in_force()
        if record.lock is None or record.generation != generation:
            return frozenset()
        if self._groups[0] != serial:
            self._groups = (serial, self.maps.allowed_groups(generation))
        return self._groups[1].get(record.lock, frozenset())
