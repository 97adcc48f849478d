# SPDX-License-Identifier: Apache-2.0
"""What the running service of the filters has refused. It is not root, so its answer is read with bounds."""

from __future__ import annotations

from typing import Any, NamedTuple

from imds_guard.errors import GuardError
from imds_guard.filter.client import FilterClient

_MAX_TEXT = 256


class RefusalRow(NamedTuple):
    """Similar requests that were refused, or passed on in audit mode."""

    filter: str
    uid: int
    method: str
    path: str
    rule: str
    status: int
    audited: bool
    times: int
    first: float
    last: float


class Refusals(NamedTuple):
    """Since the service was started."""

    rows: tuple[RefusalRow, ...]
    left_out: int
    """Refusals that had no row."""
    counters: tuple[tuple[str, str, int], ...]
    """Filter, outcome, number of requests."""
    connections: int
    """That are open now."""


def read_refusals() -> Refusals | None:
    """None where no service runs, or where it gives no usable answer: status says so."""
    try:
        client = FilterClient.open()
        if client is None:
            return None
        with client:
            return _parsed(client.report())
    except (GuardError, KeyError, TypeError, ValueError):
        return None


def _parsed(found: dict[str, Any]) -> Refusals:
    return Refusals(
        tuple(_row(values) for values in found["rows"]),
        int(found["left_out"]),
        tuple(
            (str(one["filter"])[:_MAX_TEXT], str(one["outcome"])[:_MAX_TEXT], int(one["count"]))
            for one in found["counters"]
        ),
        int(found["connections"]),
    )


def _row(values: dict[str, Any]) -> RefusalRow:
    texts = {key: str(values[key])[:_MAX_TEXT] for key in ("filter", "method", "path", "rule")}
    return RefusalRow(
        **texts,
        uid=int(values["uid"]),
        status=int(values["status"]),
        audited=bool(values["audited"]),
        times=int(values["count"]),
        first=float(values["first"]),
        last=float(values["last"]),
    )
