# SPDX-License-Identifier: Apache-2.0
"""The types of the catalogue."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from tests.adversary.scene import Scene


class Guard(enum.Enum):
    """The guard between the attacker and the service."""

    NONE = "no-guard"
    PLAIN = "guard"
    STRICT = "guard-strict"


class Verdict(enum.Enum):
    """The result of an attack, as docs/security.md shows it."""

    BLOCKED = "blocked"
    STRICT = "blocked with `--strict`"
    OPEN = "not stopped"

    @property
    def through(self) -> dict[Guard, bool]:
        """The runs of an attack with this verdict, and whether the attacker gets the service's secret in each.

        An attack that is blocked must succeed without a guard. Otherwise its failure would prove nothing.
        """
        return {
            Verdict.BLOCKED: {Guard.NONE: True, Guard.PLAIN: False, Guard.STRICT: False},
            Verdict.STRICT: {Guard.PLAIN: True, Guard.STRICT: False},
            Verdict.OPEN: {Guard.PLAIN: True, Guard.STRICT: True},
        }[self]


Run = Callable[["Scene"], bytes]
"""Runs in the process of the test. Returns what the attacker got from the service, or raises privileges.Refused."""


@dataclass(frozen=True)
class Way:
    """One form of an attack."""

    run: Run
    needs: tuple[str, ...] = ()
    """Keys of needs.PROBES: features that the kernel must have."""
    own_network: bool = False
    """The way changes its network namespace, so it gets a new one."""


@dataclass(frozen=True)
class Attack:
    """A row of the table in docs/security.md."""

    id: str
    title: str
    verdict: Verdict
    why: str
    """The reason for the verdict, for somebody who reads only the table."""
    ways: dict[str, Way] = field(default_factory=dict)
    test: str = "adversary/test_attacks.py"
    """The file below tests/ that proves it."""

    def runs(self) -> list[tuple[Guard, str]]:
        """Every (guard, way) to try."""
        return [(guard, name) for guard in self.verdict.through for name in self.ways]
