# SPDX-License-Identifier: Apache-2.0
"""Every way of every attack of the catalogue, without a guard, with a guard, and with a strict guard."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.adversary.catalogue import CATALOGUE
from tests.adversary.conftest import Stages
from tests.adversary.model import Attack, Guard
from tests.adversary.privileges import Refused

RUNS = [(guard, attack, way) for guard in Guard for attack in CATALOGUE for at, way in attack.runs() if at is guard]
"""Sorted by guard, so that each guard is started once."""


@pytest.mark.parametrize(
    ("guard", "attack", "name"),
    [pytest.param(guard, attack, name, id=f"{guard.value}-{attack.id}-{name}") for guard, attack, name in RUNS],
)
def test_attack(guard: Guard, attack: Attack, name: str, stages: Stages) -> None:
    """The attacker gets the service's secret if the catalogue says so, and else does not."""
    attack_at(guard, attack, name, stages)


def attack_at(guard: Guard, attack: Attack, name: str, stages: Stages) -> None:
    """Runs one way, or skips it where this machine lacks what it needs."""
    stage = stages.enter(guard)
    way = attack.ways[name]
    missing = [reason for reason in map(stages.lacks, way.needs) if reason is not None]
    if missing:
        pytest.skip("; ".join(missing))
    with ExitStack() as stack:
        scene = stack.enter_context(stage.scene()) if way.own_network else stages.scene
        try:
            got, why = way.run(scene), ""
        except Refused as refusal:
            got, why = b"", str(refusal)
    assert (got == stages.secret) is attack.verdict.through[guard], f"the attacker got {got!r}; {why}"
