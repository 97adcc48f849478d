# SPDX-License-Identifier: Apache-2.0
"""The report that the hooks write: who was denied, by lock, user and reason."""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.reader import PROTOCOLS, MapReader, address_of, reason_of
from imds_guard.errors import GuardError, trying
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Address, Mode, Protocol

_ATTEMPTS = 20


class Row(NamedTuple):
    """Denials of one user at one lock for one reason. Address, port and ``comm`` are those of the first."""

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
    rows.sort(key=lambda row: (-row.count, row.lock or "", row.fsuid, row.reason))
    return Report(generation, serial, maps.mode(generation), tuple(rows), maps.overflow())


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
