# SPDX-License-Identifier: Apache-2.0
"""The requests that filters have refused, as text and as values for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imds_guard.present.wrap import named
from imds_guard.text import and_more, count_of, escaped
from imds_guard.watch.process_info import NameCache
from imds_guard.watch.timestamps import iso_time

if TYPE_CHECKING:
    from imds_guard.commands.filter_refusals import RefusalRow, Refusals

MAX_ROWS = 40
"""More rows are only in the JSON."""


def refusal_values(refusals: Refusals | None) -> list[dict[str, Any]] | None:
    """The rows for JSON; None where no service of filters runs."""
    if refusals is None:
        return None
    names = NameCache()
    return [_values(row, names) for row in refusals.rows]


def _values(row: RefusalRow, names: NameCache) -> dict[str, Any]:
    return {
        "filter": escaped(row.filter),
        "user": escaped(names.user(row.uid)),
        "uid": row.uid,
        "method": escaped(row.method),
        "path": escaped(row.path),
        "rule": escaped(row.rule),
        "status": row.status,
        "audited": row.audited,
        "count": row.times,
        "first": iso_time(row.first),
        "last": iso_time(row.last),
    }


def refusal_lines(refusals: Refusals | None) -> list[str]:
    """Two lines for each row, most often refused first; nothing where nothing was refused."""
    if refusals is None or not refusals.rows:
        return []
    lines = ["", "What filters refused since their service was started:", ""]
    ranked = sorted(refusals.rows, key=lambda row: -row.times)
    names = NameCache()
    for row in ranked[:MAX_ROWS]:
        who = named(row.uid, names.user(row.uid))
        audit = " (audit: it was passed on)" if row.audited else ""
        lines.append(escaped(f"  {row.times:,} x {row.filter}, {who}: {row.method} {row.path}"))
        lines.append(escaped(f"      {row.status}, {row.rule}{audit}"))
    more = and_more(len(ranked), MAX_ROWS, "")
    lines += [f"  {more} (--json has them all)"] if more else []
    return [*lines, f"  {count_of(refusals.left_out, 'refusal')} did not fit."] if refusals.left_out else lines
