# SPDX-License-Identifier: Apache-2.0
"""The hooks decide as decide() does, and report what the model says, in every form.

Each run of the tests tries the policies of a fixed seed and those of a fresh one. More of them:

    pytest tests/vm/test_decisions.py --vm-cases 20000000
"""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from imds_guard.policy.decide import Reason
from tests.vm.conftest import need_compiled_hooks
from tests.vm.decisions import differences, runs_of, scene_of
from tests.vm.machine import Machine
from tests.vm.programs import BARE_FORMS
from tests.vm.shrink import shrunk

FIXED_SEED = 17
BARE_SCENES = 60

_ONLY_FAULTS = {Reason.UNREADABLE, Reason.NO_SETTINGS}
"""No policy leads to these, a failing call does."""


@pytest.mark.parametrize("form", BARE_FORMS)
def test_the_forms_without_filters_do_the_same(form: str) -> None:
    """For policies that have none."""
    need_compiled_hooks()
    seed = random.SystemRandom().getrandbits(32)
    with Machine([form]) as machine:
        for number in range(BARE_SCENES):
            scene = scene_of(seed, number, filters=False)
            found = next(differences(scene, machine), None)
            assert found is None, f"scene_of({seed}, {number}, filters=False)\n{shrunk(found, machine)}"


@pytest.mark.parametrize("which", ["fixed", "fresh"])
def test_the_hooks_do_what_the_model_says(machine: Machine, which: str, pytestconfig: pytest.Config) -> None:
    """Verdict, counters, record, row of the report and mark are right to the last byte."""
    given, cases = pytestconfig.getoption("vm_seed"), pytestconfig.getoption("vm_cases")
    if given and which == "fixed":
        pytest.skip("--vm-seed names the one seed to try")
    fresh = random.SystemRandom().getrandbits(32)
    seed, first = given or (FIXED_SEED if which == "fixed" else fresh, 0)
    met, runs = Counter[Reason](), 0
    for number in itertools.count(first):
        scene = scene_of(seed, number)
        found = next(differences(scene, machine, met), None)
        if found is not None:
            again = f"pytest tests/vm/test_decisions.py --vm-seed {seed}:{number} --vm-cases 1"
            pytest.fail(f"to repeat: {again}\n{shrunk(found, machine)}", pytrace=False)
        runs += runs_of(scene, machine)
        if runs >= (cases if given else cases // 2):
            break
    if which == "fixed" and cases >= 300_000:
        assert set(met) == set(Reason) - _ONLY_FAULTS
