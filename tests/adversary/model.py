# SPDX-License-Identifier: Apache-2.0
"""What an entry of the catalogue is."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from tests.adversary.scene import Scene


class Guard(enum.Enum):
    """What stands between the attacker and the service."""

    NONE = "no-guard"
    PLAIN = "guard"
    STRICT = "guard-strict"


class Verdict(enum.Enum):
    """What becomes of an attack, in the words of docs/security.md."""

    BLOCKED = "blocked"
    STRICT = "blocked with `--strict`"
    OPEN = "not stopped"

    @property
    def through(self) -> dict[Guard, bool]:
        """Which runs an attack of this verdict takes, and whether the attacker then has the service's secret.

        One that is blocked succeeds where nothing guards: else its failure would prove nothing.
        """
        return {
            Verdict.BLOCKED: {Guard.NONE: True, Guard.PLAIN: False, Guard.STRICT: False},
            Verdict.STRICT: {Guard.PLAIN: True, Guard.STRICT: False},
            Verdict.OPEN: {Guard.PLAIN: True, Guard.STRICT: True},
        }[self]


Run = Callable[["Scene"], bytes]
"""Takes place in the test's process; returns what the attacker got from the service, or raises privileges.Refused."""


@dataclass(frozen=True)
class Way:
    """One form of an attack."""

    run: Run
    needs: tuple[str, ...] = ()
    """Keys of needs.PROBES: what the kernel must have for it."""
    own_network: bool = False
    """It changes the network namespace, so it gets one of its own."""


@dataclass(frozen=True)
class Attack:
    """A row of the table in docs/security.md."""

    id: str
    title: str
    verdict: Verdict
    why: str
    """What happens, for somebody who reads the table alone."""
    ways: dict[str, Way] = field(default_factory=dict)
    test: str = "adversary/test_attacks.py"
    """The file below tests/ that shows it."""

    def runs(self) -> list[tuple[Guard, str]]:
        """Every (guard, way) that has to be tried."""
        return [(guard, name) for guard in self.verdict.through for name in self.ways]
