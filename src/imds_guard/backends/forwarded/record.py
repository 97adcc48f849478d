# SPDX-License-Identifier: Apache-2.0
"""A file that says what should be done with forwarded packets in this network namespace, and which rules do it.

After somebody's ``nft flush ruleset`` nothing in the kernel shows that rules are missing.
"""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.backends.forwarded.places import Written
from imds_guard.backends.iptables.state_file import StateFile

DROP = "drop"
LEAVE = "leave"
WRITERS = ("nft", "iptables")
"""In the order in which they are tried."""


class Record(NamedTuple):
    """``option`` is DROP, LEAVE, or "" before the first start. ``written`` is None unless rules should be in force."""

    option: str = ""
    written: Written | None = None


def read(file: StateFile) -> Record:
    """The record. A file of imds-guard 0.1.0 has the option alone."""
    option, _, rest = file.read().partition(" ")
    fields = rest.split(" ")
    if option != DROP or len(fields) != len(Written._fields) or fields[0] not in WRITERS:
        return Record(option)
    by, tracked, text, kernel = fields
    return Record(option, Written(by, tuple(int(version) for version in tracked if version.isdigit()), text, kernel))


def write(file: StateFile, record: Record) -> None:
    """Replaces the record."""
    fields = [record.option]
    if record.written is not None:
        tracked = "".join(map(str, record.written.tracked)) or "-"
        fields += [record.written.by, tracked, record.written.text, record.written.kernel]
    file.write(" ".join(fields))
