# SPDX-License-Identifier: Apache-2.0
"""Every attack of the catalogue, in every one of its ways, without a guard, with one, and with a strict one."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Dict, List, Optional

import pytest

from tests.adversary.catalogue import CATALOGUE
from tests.adversary.model import Attack, Guard
from tests.adversary.privileges import Refused
from tests.adversary.scene import Scene, Stage

RUNS = [(guard, attack, way) for attack in CATALOGUE for guard, way in attack.runs()]
"""Sorted by guard, so that each is put up once."""
RUNS.sort(key=lambda run: list(Guard).index(run[0]))


@pytest.mark.parametrize(
    ("stage", "attack", "name"),
    [pytest.param(guard, attack, name, id=f"{guard.value}-{attack.id}-{name}") for guard, attack, name in RUNS],
    indirect=["stage"],
)
def test_attack(stage: Stage, attack: Attack, name: str, scene: Scene, lacking: Dict[str, Optional[str]],
                secret: bytes) -> None:  # fmt: skip
    """The attacker has the service's secret afterwards, or has it not, as the catalogue says."""
    way = attack.ways[name]
    missing: List[str] = [reason for reason in (lacking[need] for need in way.needs) if reason is not None]
    if missing:
        pytest.skip("; ".join(missing))
    with ExitStack() as stack:
        place = stack.enter_context(stage.scene()) if way.own_network else scene
        try:
            got, why = way.run(place), ""
        except Refused as refusal:
            got, why = b"", str(refusal)
    assert (got == secret) is attack.verdict.through[stage.guard], f"the attacker got {got!r}; {why}"
