# SPDX-License-Identifier: Apache-2.0
"""What the runs of the tests execute: every instruction, and every conditional jump both ways."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from tests.vm import decisions, egress, test_corners, test_egress, test_odd_states, test_redirect, test_report
from tests.vm.machine import Coverage, Machine
from tests.vm.mutants import decoded, is_condition
from tests.vm.programs import ADDRESS_HOOKS
from tests.vm.test_failing_calls import SEED, all_failures

DECISIONS, PACKETS = 40, 40
"""Scenes."""


class Gap(NamedTuple):
    """An instruction that no run executes, or a jump that goes one way alone."""

    at: int
    what: str
    """never executed, never jumps, or always jumps."""


def run_everything(machine: Machine) -> None:
    """A share of what the tests of this folder run, and all that random cases reach too seldom."""
    all_failures(machine, Random(SEED))
    for number in range(DECISIONS):
        scene = decisions.scene_of(SEED, number, filters=machine.has_filters)
        assert next(decisions.differences(scene, machine), None) is None
    for number in range(PACKETS):
        assert next(egress.differences(egress.egress_scene(SEED, number), machine), None) is None
    assert next(decisions.differences(test_odd_states.odd_addresses(), machine), None) is None
    test_egress.try_small_spaces(machine)
    test_corners.empty_entry_passes(machine)
    for _ in test_odd_states.every_odd_state(machine):
        for form in machine.forms:
            machine.cross(form, test_odd_states.TRIED, 1)
    for form in machine.forms:
        test_odd_states.without_settings(machine, form)
    test_odd_states.try_odd_packets(machine)
    test_report.try_full_shares(machine)
    if machine.has_filters:
        test_redirect.try_redirects(machine)
    else:
        test_redirect.without_its_code_a_filter_denies(machine)
        test_odd_states.mptcp_under_strict(machine)


def coverage(machine: Machine, form: str, hook: str) -> Coverage:
    """Of a program. That of the address hooks is one, loaded four times: a branch may be for one of them."""
    hooks = ADDRESS_HOOKS if hook in ADDRESS_HOOKS else (hook,)
    each = [machine.coverage(form, one) for one in hooks]
    executed, taken = zip(*(one.executed for one in each)), zip(*(one.taken for one in each))
    return Coverage(tuple(map(sum, executed)), tuple(map(sum, taken)))


def size(machine: Machine, form: str, hook: str) -> tuple[int, int]:
    """Instructions and conditional jumps of a program."""
    some = [one for _, one in decoded(machine.instructions(form, hook))]
    return len(some), sum(map(is_condition, some))


def gaps(machine: Machine, form: str, hook: str) -> Iterator[Gap]:
    """All gaps of a program since the machine was made."""
    executed, taken = coverage(machine, form, hook)
    for at, one in decoded(machine.instructions(form, hook)):
        if not executed[at]:
            yield Gap(at, "never executed")
        elif is_condition(one) and taken[at] in (0, executed[at]):
            yield Gap(at, "always jumps" if taken[at] else "never jumps")
