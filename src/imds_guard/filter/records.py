# SPDX-License-Identifier: Apache-2.0
"""What the service has refused, and counters: bounded, and without anything that a log must not have.

A path is recorded; a query, a header and a body never are. The path of a credential of ECS is a secret itself.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any, Callable, NamedTuple

from imds_guard.policy.request_target import RequestTarget

MAX_ROWS = 4096
MAX_ROWS_OF_A_USER = 256
MAX_PATH = 160


class Refusal(NamedTuple):
    """One refused request, or one that audit mode passed on."""

    filter: str
    uid: int
    method: str
    path: str
    rule: str
    status: int
    audited: bool


class Row:
    """How often, and when."""

    def __init__(self, now: float) -> None:
        self.count = 0
        self.first = self.last = now


def path_of(target: RequestTarget) -> str:
    """The path as it is recorded. Source: https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-iam-roles.html,
    AWS_CONTAINER_CREDENTIALS_RELATIVE_URI."""
    path = target.path
    if target.segments[:2] == ("v2", "credentials") and len(target.segments) > 2:
        path = "/v2/credentials/(left out)"
    return path if len(path) <= MAX_PATH else f"{path[:MAX_PATH]}..."


class Records:
    """The refusals since the service was started. Similar ones are one row."""

    def __init__(self) -> None:
        self.rows: OrderedDict[Refusal, Row] = OrderedDict()
        self.counters: dict[tuple[str, str], int] = {}
        """(filter, outcome) -> requests."""
        self.left_out = 0
        """Refusals that had no row."""
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._rows_of: dict[int, int] = {}

    def count(self, filter_name: str, outcome: str) -> None:
        """One request more."""
        key = (filter_name, outcome)
        self.counters[key] = self.counters.get(key, 0) + 1

    def add(self, refusal: Refusal) -> None:
        """Adds a refusal, and tells those who listen. A user has only so many rows, so that nobody fills the table."""
        now = time.time()
        row = self.rows.get(refusal)
        if row is None:
            if len(self.rows) >= MAX_ROWS or self._rows_of.get(refusal.uid, 0) >= MAX_ROWS_OF_A_USER:
                self.left_out += 1
            else:
                row = self.rows[refusal] = Row(now)
                self._rows_of[refusal.uid] = self._rows_of.get(refusal.uid, 0) + 1
        if row is not None:
            row.count += 1
            row.last = now
        for tell in self.listeners:
            tell({**refusal._asdict(), "time": now})

    def report(self) -> dict[str, Any]:
        """Rows and counters as plain values."""
        return {
            "rows": [
                {**refusal._asdict(), "count": row.count, "first": row.first, "last": row.last}
                for refusal, row in self.rows.items()
            ],
            "left_out": self.left_out,
            "counters": [
                {"filter": name, "outcome": outcome, "count": count}
                for (name, outcome), count in sorted(self.counters.items())
            ],
        }
