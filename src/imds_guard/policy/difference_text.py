# SPDX-License-Identifier: Apache-2.0
"""A difference of two policies in words, a line for each change. Pure: whoever calls it knows the names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable, NamedTuple

from imds_guard.policy.difference import Difference, ListChange
from imds_guard.policy.difference_pairs import Endpoints
from imds_guard.policy.endpoint_syntax import format_endpoint
from imds_guard.policy.model import Verdict
from imds_guard.text import and_more

MAX_LINES = 40
"""Of one difference. More are counted."""


_WELL_KNOWN = "169.254.169.254"


class Names(NamedTuple):
    """Names for IDs, as printed: ``www-data (33)``, or the number alone."""

    user: Callable[[int], str]
    group: Callable[[int], str]


def difference_lines(found: Difference, names: Names, shown: int = 1) -> list[str]:
    """``+ group canAccessIP (999)``, ``no longer locked: 169.254.169.254 and 9 more``; empty where nothing differs.

    ``shown`` endpoints are named in a line.
    """
    lines: list[str] = []
    for line in _lines(found, names, shown):
        if len(lines) >= MAX_LINES:
            return [*lines, _rest(found)]
        lines.append(line)
    return lines


def _lines(found: Difference, names: Names, shown: int) -> Iterator[str]:
    if found.unlocked:
        yield f"no longer locked: {_endpoints(found.unlocked, shown)}"
    if found.locked:
        yield f"now locked: {_endpoints(found.locked, shown)}"
    for change in found.lists:
        yield from _list_lines(change, names, shown)
    for one in found.others:
        now = "allowed" if one.after is Verdict.ALLOW else "denied"
        yield f"everyone else is {now} now at {_endpoints(one.endpoints, shown)}"
    if found.many_groups:
        yield f"callers with many groups are judged by the lists now at {_endpoints(found.many_groups, shown)}"
    for setting in found.settings:
        yield f"{setting.name}: {setting.before} -> {setting.after}"
    yield from (f"+ filter {name}" for name in found.filters_added)
    yield from (f"- filter {name}" for name in found.filters_removed)
    yield from (f"filter {name}: changed" for name in found.filters_changed)


def _rest(found: Difference) -> str:
    entries = sum(len(one.who.users) + len(one.who.groups) for one in found.lists)
    return f"and more: {entries} entries of lists changed in all (--json has them)"


def _list_lines(change: ListChange, names: Names, shown: int) -> Iterator[str]:
    sign = "+" if change.added else "-"
    denied = "denied " if change.kind == "deny" else ""
    where = "" if change.endpoints is None else f" at {_endpoints(change.endpoints, shown)}"
    for uid in sorted(change.who.users):
        yield f"{sign} {denied}user {names.user(uid)}{where}"
    for gid in sorted(change.who.groups):
        yield f"{sign} {denied}group {names.group(gid)}{where}"


def _endpoints(endpoints: Endpoints, shown: int) -> str:
    """``a``; ``a and 9 more``. The address that everybody knows stands first."""
    texts = [text for endpoint in endpoints for text in format_endpoint(endpoint)]
    texts.sort(key=lambda text: not text.startswith(_WELL_KNOWN))
    return ", ".join(texts[:shown]) + and_more(len(texts), shown, " ")
