# SPDX-License-Identifier: Apache-2.0
"""No denied connect succeeds and no allowed one fails, whatever changes meanwhile: by counting, not by time."""

from __future__ import annotations

import pytest

from tests.adversary.storm import storm

CONNECTS, FLIPS = 20_000, 20


@pytest.mark.parametrize("strict", [False, True], ids=["guard", "guard-strict"])
def test_storm(as_root: None, strict: bool) -> None:
    """Flips, updates of the programs, forks and exits and changes of IDs at once."""
    outcome = storm(CONNECTS, flips=FLIPS, strict=strict)
    assert (outcome.tally.slipped_through, outcome.tally.failed) == (0, 0), outcome
    assert outcome.tally.connects >= CONNECTS
    assert all(tally.denied or tally.connected for tally in outcome.kinds.values())
    assert outcome.flips >= FLIPS
    assert outcome.updates
