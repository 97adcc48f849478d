# SPDX-License-Identifier: Apache-2.0
"""The catalogue of attacks at the root of cgroup2, under what the installed command has started.

tests/adversary/test_attacks.py tries each attack under a guard of a child cgroup, and without a guard. The attacks, the
code that performs them and the expectations are the same here. A row takes its share of them, as of the conformance
table; with ``./run matrix --every 1 --test vagrant/guest/test_4_attacks.py ROW`` it takes all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.adversary.conftest import Stages
from tests.adversary.model import Attack, Guard
from tests.adversary.test_attacks import RUNS, attack_at
from vagrant.guest.at_root import AtRoot

PLACE, OF = next(
    tuple(map(int, share.split("/")))
    for backend, _, share in (word.partition("=") for word in os.environ["IMDS_GUARD_SHARE"].split())
    if backend == "ebpf"
)
_GUARDED = [
    (guard, attack, name)
    for guard, attack, name in RUNS
    if guard is not Guard.NONE and "subtree" not in attack.ways[name].needs  # at the root no cgroup is outside
]
AT_ROOT = [run for number, run in enumerate(_GUARDED) if number % OF == PLACE]


@pytest.fixture(scope="module")
def stages(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """The stages for all attacks."""
    kept = Stages(tmp_path_factory.mktemp(backend), AtRoot)
    try:
        yield kept
    finally:
        kept.close()


@pytest.mark.parametrize("backend", ["ebpf"], indirect=True)
@pytest.mark.parametrize(
    ("guard", "attack", "name"),
    [pytest.param(guard, attack, name, id=f"{guard.value}-{attack.id}-{name}") for guard, attack, name in AT_ROOT],
)
def test_attack(guard: Guard, attack: Attack, name: str, stages: Stages) -> None:
    """The attacker gets the service's secret if the catalogue says so, and else does not."""
    attack_at(guard, attack, name, stages)
