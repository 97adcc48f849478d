# SPDX-License-Identifier: Apache-2.0
"""The result of a command that changed the guard."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from imds_guard.text import count_of

# What is for types alone is not imported: start-up time.
if TYPE_CHECKING:
    from imds_guard.commands.preflight import Preflight
    from imds_guard.commands.turn import Turn
    from imds_guard.connections.values import CutResult
    from imds_guard.policy.difference import Difference
    from imds_guard.policy.model import Policy


class Pending(NamedTuple):
    """What guard.complete() has still to do."""

    turn: Turn
    cgroup: str | None
    look: bool = True
    """Look for open connections that the policy does not allow."""
    keep: bool = False
    """... but cut none."""
    clients: bool = True
    """Look for metadata clients that are shut out."""


class Outcome(NamedTuple):
    """``done`` and ``warnings`` are sentences."""

    backend: str
    policy: Policy
    done: list[str]
    warnings: list[str]
    shut_out: Preflight | None = None
    """Clients that the policy shuts out; None before guard.complete(), and where nothing was changed."""
    existing: CutResult | None = None
    """Connections that are older than the policy; None where nobody lost a right, and before guard.complete()."""
    pending: Pending | None = None
    difference: Difference | None = None
    """What changed; None where the policy before could not be read."""
    dry_run: bool = False
    """Nothing was changed: ``policy`` is what would be in force."""

    @property
    def done_in_short(self) -> list[str]:
        """What was done; of the connections that were cut only the number."""
        cut = len(self.existing.cut) if self.existing is not None else 0
        return [*self.done, f"cut {count_of(cut, 'open connection')}"] if cut else list(self.done)
