# SPDX-License-Identifier: Apache-2.0
"""The report that the hooks write: who was denied, by lock, caller and reason."""

from __future__ import annotations

import enum
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.reader import PROTOCOLS, MapReader, address_of, reason_of
from imds_guard.errors import GuardError, trying
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Address, Mode, Protocol

_ATTEMPTS = 20
_BEFORE_THE_CALLER = frozenset({Reason.NO_SETTINGS, Reason.UNREADABLE})
"""Reasons for which a hook may deny without the caller's credentials: where they can't be read, or for a packet."""


class Who(enum.IntEnum):
    """Whom a row is about: enum ig_who."""

    USER = abi.WHO_USER
    """The user with this ID."""
    USER_NAMESPACES = abi.WHO_NAMESPACES
    """Callers in user namespaces that this user owns. They choose among all IDs that are mapped there."""
    OTHERS = abi.WHO_OTHERS
    """All that is beyond the rows that an account, or a block of IDs above the accounts, can have for itself."""

    @property
    def label(self) -> str:
        """``user``, ``user-namespaces``, ``others``."""
        return self.name.lower().replace("_", "-")


class Row(NamedTuple):
    """Denials of one caller at one lock for one reason. Address, port and ``comm`` are those of the first."""

    lock: str | None
    """None also for OTHERS, whose row is for all locks."""
    reason: Reason
    who: Who
    uid: int
    """The first of the IDs, for OTHERS."""
    count: int  # type: ignore[assignment]  # a tuple has a method of that name
    first_ns: int
    """CLOCK_BOOTTIME, as is ``last_ns``."""
    last_ns: int
    address: Address
    port: int
    protocol: Protocol | None
    comm: bytes

    @property
    def has_user(self) -> bool:
        """False where the hook could not read the caller: it wrote ID 0, and no name of a program.

        Packets of sockets that root has opened are in the same row. Their hook reads no program.
        """
        return self.uid != 0 or bool(self.comm) or self.reason not in _BEFORE_THE_CALLER

    @property
    def share(self) -> int:
        """Rows with the same number share the space of one account, or of one block of IDs."""
        return abi.share_of(self.uid)

    @property
    def last_uid(self) -> int:
        """The last of the IDs that the row is about."""
        is_block = self.who is Who.OTHERS and self.uid >= abi.SHARE_IDS
        return self.uid + abi.SHARE_IDS - 1 if is_block else self.uid


class Report(NamedTuple):
    """Who was denied, or would have been in audit mode, since the policy in force came into force."""

    generation: int
    serial: int
    mode: Mode
    rows: tuple[Row, ...]
    overflow: int
    """Denials without a row because the report was full, since the guard was started."""


def read_report(location: PinLocation) -> Report | None:
    """The report of the policy in force. None when nothing is locked.

    It is read again when the policy changed meanwhile.
    """
    with trying("reading the report", "run imds-guard status"):
        for _ in range(_ATTEMPTS):
            pins = location.pins()
            if pins is None:
                return None
            try:
                with MapReader.open_checked(pins) as maps:
                    before = maps.in_force()
                    if before == (0, 0):
                        return None
                    report = _report(maps, *before)
                    if maps.in_force() == before:
                        return report
            except FileNotFoundError:
                continue
    raise GuardError("reading the report: the policy kept changing; try again")


def _report(maps: MapReader, generation: int, serial: int) -> Report:
    names = maps.lock_names(generation)
    rows = [_row(key, value, names) for key, value in maps.report_records(generation)]
    rows.sort(key=lambda row: (-row.count, row.lock or "", row.who, row.uid, row.reason))
    return Report(generation, serial, maps.mode(generation), tuple(rows), maps.overflow())


def _row(key: bytes, value: bytes, names: dict[int, str]) -> Row:
    _, reason, lock, who, uid = abi.REPORT_KEY.unpack(key)
    count, first_ns, last_ns, address, port, protocol, comm = abi.REPORT.unpack(value)
    return Row(
        names.get(lock),
        reason_of(reason),
        _who_of(who),
        uid,
        count,
        first_ns,
        last_ns,
        address_of(address),
        port,
        PROTOCOLS.get(protocol),
        comm.split(b"\0")[0],
    )


def _who_of(number: int) -> Who:
    try:
        return Who(number)
    except ValueError as error:
        raise GuardError(
            f"reading the report: this version of imds-guard knows no row of kind {number}; "
            "run imds-guard start, which puts its own programs in place"
        ) from error
