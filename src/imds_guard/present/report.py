# SPDX-License-Identifier: Apache-2.0
"""The report of denials, as text and as values for JSON."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from imds_guard.backends.ebpf.report import Who
from imds_guard.policy.model import Mode, Protocol
from imds_guard.present.forwarded import count_texts, forwarding_values
from imds_guard.present.refusals import refusal_lines, refusal_values
from imds_guard.present.wrap import WIDTH, named, wrapped
from imds_guard.text import and_more, columns, count_of, escaped, host_port
from imds_guard.watch.process_info import NameCache, decoded
from imds_guard.watch.timestamps import iso_time_of, wall_clock

if TYPE_CHECKING:
    from imds_guard.backends.ebpf.report import Report, Row
    from imds_guard.commands.report import ReportResult

MAX_ROWS = 40
"""More rows or commands are only in the JSON."""
_MIN_COLUMN = 7
_NARROWED = (0, 1, 3, 6)
"""WHO, BY, WHY and LOCK: an address that is broken can't be copied."""
_GAP = "  "
_AUDIT_NOTE = "audit mode denies nobody: when everyone who needs access is on an allowlist, run imds-guard mode enforce"
_HEAD = ("WHO", "BY", "FIRST TO", "WHY", "TIMES", "FIRST, LAST")


# --- values ---------------------------------------------------------------------------------------------------------


def report_values(result: ReportResult) -> dict[str, Any]:
    """The report for JSON."""
    names = NameCache()
    return {
        "mode": result.report.mode.value,
        "generation": result.report.generation,
        "change": result.report.serial,
        "overflow": result.report.overflow,
        "rows": [_row_values(row, names) for row in result.report.rows],
        "allow": [{"command": command, "denials": count} for command, count in result.suggestion.commands],
        "config": result.suggestion.config or None,
        "enforce": result.enforce,
        "notes": list(result.notes),
        "forwarded": None if result.forwarded is None else forwarding_values(result.forwarded),
        "refusals": refusal_values(result.refusals),
    }


def _row_values(row: Row, names: NameCache) -> dict[str, Any]:
    return {
        "lock": row.lock,
        **_who_values(row, names),
        "reason": row.reason.label,
        "count": row.count,
        "first": iso_time_of(row.first_ns),
        "last": iso_time_of(row.last_ns),
        "address": str(row.address),
        "port": row.port,
        "protocol": None if row.protocol is None else row.protocol.value,
        "comm": escaped(decoded(row.comm)),
    }


def _who_values(row: Row, names: NameCache) -> dict[str, Any]:
    if not row.has_user:
        return {"who": "unknown", "user": None, "uid": None, "last_uid": None}
    user = escaped(names.user(row.uid)) if row.uid == row.last_uid else None
    return {"who": row.who.label, "user": user, "uid": row.uid, "last_uid": row.last_uid}


# --- text -----------------------------------------------------------------------------------------------------------


def report_lines(result: ReportResult) -> list[str]:
    """The title, the table, the notes, and how to let the callers through."""
    report = result.report
    return [
        *_title(report),
        "",
        *_rows(report),
        *_overflow(report),
        *_forwarded(result),
        *refusal_lines(result.refusals),
        *_notes(result),
        *_suggestion(result),
    ]


def _title(report: Report) -> list[str]:
    audit = report.mode is Mode.AUDIT
    who = "Who would have been denied (audit mode)." if audit else "Who was denied, or would have been in audit mode."
    return [who, "A change of policy removes the callers whom it lets through."]


def _rows(report: Report) -> list[str]:
    if not report.rows:
        return ["nobody yet"]
    names = NameCache()
    shown = _shown(report.rows)
    with_lock = len({row.lock for row in shown}) > 1
    table = _table([_cells(row, with_lock, names) for row in shown], (*_HEAD, *(["LOCK"] if with_lock else [])))
    more = and_more(len(report.rows), MAX_ROWS, "")
    return [*table, f"{more} (--json has them all)"] if more else table


def _shown(rows: Sequence[Row]) -> list[Row]:
    """At most MAX_ROWS. Of more, each account or block of IDs has its first row in it before others have a second."""
    if len(rows) <= MAX_ROWS:
        return list(rows)
    ranks: Counter[int] = Counter()
    ranked = []
    for row in rows:
        ranked.append((ranks[row.share], row))
        ranks[row.share] += 1
    return [row for _, row in sorted(ranked, key=lambda one: one[0])[:MAX_ROWS]]


def _overflow(report: Report) -> list[str]:
    if not report.overflow:
        return []
    return ["", f"{count_of(report.overflow, 'denial')} did not fit into the report since the guard was started."]


def _forwarded(result: ReportResult) -> list[str]:
    counted = [] if result.forwarded is None else count_texts(result.forwarded.counts)
    return ["", *wrapped("forwarded packets, of no known user: ", ", ".join(counted))] if counted else []


def _notes(result: ReportResult) -> list[str]:
    notes = [*result.notes, *([_AUDIT_NOTE] if result.report.mode is Mode.AUDIT else [])]
    return ["", *(f"note: {note}" for note in notes)] if notes else []


def _suggestion(result: ReportResult) -> list[str]:
    suggestion = result.suggestion
    if not suggestion.commands:
        return []
    lines = ["", "To let them through, run the lines of those who should have access:", ""]
    lines += [f"  {command}    # {count}" for command, count in suggestion.commands[:MAX_ROWS]]
    more = and_more(len(suggestion.commands), MAX_ROWS, "")
    lines += [f"  # {more}"] if more else []
    lines += [] if result.enforce is None else [f"  {result.enforce}    # denies all others from then on"]
    return [*lines, "", "--as-config prints a configuration that lets all of them through."]


# --- the table ------------------------------------------------------------------------------------------------------


def _cells(row: Row, with_lock: bool, names: NameCache) -> tuple[str, ...]:
    where = "any lock" if row.who is Who.OTHERS else "no lock"
    protocol = "" if row.protocol is None or row.protocol is Protocol.TCP else f" {row.protocol.value}"
    return (
        _who(row, names),
        escaped(decoded(row.comm)),
        f"{host_port(row.address, row.port)}{protocol}",
        row.reason.label,
        f"{row.count:,}",
        ", ".join(dict.fromkeys((_clock(row.first_ns), _clock(row.last_ns)))),
        *([row.lock or where] if with_lock else []),
    )


def _clock(boot_ns: int) -> str:
    """The local time of today, or the day. The JSON has both."""
    then, today = time.localtime(wall_clock(boot_ns)), time.localtime()
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%b %d", then)


def _who(row: Row, names: NameCache) -> str:
    if not row.has_user:
        return "caller unknown"
    if row.uid != row.last_uid:
        return f"more of the IDs {row.uid} to {row.last_uid}"
    user = named(row.uid, escaped(names.user(row.uid)))
    before = {Who.USER: "", Who.USER_NAMESPACES: "user namespaces of ", Who.OTHERS: "more of "}
    return before[row.who] + user


def _table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> list[str]:
    """A line a row, in columns. Where that is wider than WIDTH, long cells are broken into more lines."""
    lines = [head, *rows]
    widths = _widths(lines)
    return [_joined(parts, widths) for line in lines for parts in _broken(line, widths)]


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    """The widths of the columns. In a table that is too wide, the widest of some is narrowed, at last that of all."""
    widths = [max(map(columns, column)) for column in zip(*lines)]
    for narrowed in (_NARROWED, range(len(widths))):
        while sum(widths) + len(_GAP) * (len(widths) - 1) > WIDTH:
            widest = max((one for one in narrowed if one < len(widths)), key=widths.__getitem__)
            if widths[widest] <= _MIN_COLUMN:
                break
            widths[widest] -= 1
    return widths


def _broken(line: Sequence[str], widths: list[int]) -> list[tuple[str, ...]]:
    return list(zip_longest(*map(_pieces, line, widths), fillvalue=""))


def _pieces(cell: str, width: int) -> list[str]:
    """The cell in parts that fit. One character at least is in each."""
    pieces = [""]
    for character in cell:
        if pieces[-1] and columns(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _joined(parts: Sequence[str], widths: list[int]) -> str:
    filled = (part + " " * (width - columns(part)) for part, width in zip(parts, widths))
    return _GAP.join(filled).rstrip()
