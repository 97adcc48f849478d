# SPDX-License-Identifier: Apache-2.0
"""The command that tries mutants finds most of a small sample in a second, and leaves the machine as it was."""

from __future__ import annotations

import itertools

import pytest

from tests.vm.conftest import need_compiled_hooks
from tests.vm.decisions import differences, scene_of
from tests.vm.machine import Machine
from tests.vm.mutants import decoded, mutants
from tests.vm.mutate import HOOKS_OF, SEED, Stages, Tally
from tests.vm.programs import ADDRESS_HOOKS, compiled

SAMPLE = 100


@pytest.mark.parametrize("form", ["better", "bare-better"])
def test_most_mutants_of_a_small_sample_are_found(form: str) -> None:
    """With the code of filters, and without it."""
    need_compiled_hooks()
    with Machine(forms=[form]) as machine:
        tally = Tally(machine, form, ["connect"], SAMPLE, SEED)
        for stage in itertools.islice(Stages(machine, form, 0.1).all(["connect"]), 2):
            tally.try_all(stage)
        assert tally.found["decisions"] + len(tally.live["connect"]) == SAMPLE
        assert tally.found["decisions"] > SAMPLE / 2
        scene = scene_of(SEED, 0, filters=machine.has_filters)
        assert next(differences(scene, machine), None) is None


@pytest.mark.parametrize("form", ["better", "bare-better"])
def test_every_instruction_has_a_mutant_and_none_is_the_instruction_itself(form: str) -> None:
    """Only those that the compiler made for the upper halves of registers have none, and the exits."""
    need_compiled_hooks()
    for hooks in HOOKS_OF.values():
        whole = compiled(form)[hooks[0]].instructions
        made = list(mutants(whole))
        without = [one for at, one in decoded(whole) if at not in {mutant.at for mutant in made}]
        assert {(one.code & 0xF7, one.imm) for one in without} <= {(0x95, 0), (0x67, 32), (0x77, 32)}
        assert all(mutant.instruction != whole[8 * mutant.at : 8 * mutant.at + 8] for mutant in made)
    assert HOOKS_OF["connect"] == ADDRESS_HOOKS
