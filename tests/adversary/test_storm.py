# SPDX-License-Identifier: Apache-2.0
"""No denied connect succeeds and no allowed one fails during changes. The number of connects counts, not the time."""

from __future__ import annotations

import pytest

from tests.adversary.storm import storm

CONNECTS, FLIPS = 20_000, 20


@pytest.mark.parametrize("strict", [False, True], ids=["guard", "guard-strict"])
def test_storm(as_root: None, strict: bool) -> None:
    """Every connect gets the right verdict during changes of the policy, the programs, processes and IDs."""
    outcome = storm(CONNECTS, flips=FLIPS, strict=strict)
    assert (outcome.tally.slipped_through, outcome.tally.failed) == (0, 0), outcome
    assert outcome.tally.connects >= CONNECTS
    assert all(tally.denied or tally.connected for tally in outcome.kinds.values())
    assert outcome.flips >= FLIPS
    assert outcome.updates
