# SPDX-License-Identifier: Apache-2.0
"""Every hook sees the old policy or the new one, whole, at every moment of a change by the real store.

A third of ``--vm-cases`` are run, of a fixed seed and of a fresh one. More of them:

    pytest tests/vm/test_changes.py -k policy --vm-cases 3000000
"""

from __future__ import annotations

import itertools
import random
import tempfile

import pytest

from imds_guard.backends.ebpf.store import MapStore
from imds_guard.kernel import grace
from imds_guard.policy.model import Policy
from tests.vm.changes import Changer, Waits, changer, policy
from tests.vm.machine import Machine
from tests.vm.map_calls import MapCalls

FIXED_SEED = 17
_WITHIN = 40
"""A control must fail within so many histories."""


@pytest.mark.parametrize("which", ["fixed", "fresh"])
def test_the_old_policy_or_the_new_one(machine: Machine, which: str, pytestconfig: pytest.Config) -> None:
    """Verdict, counters, record, row of the report and mark, also where a command is killed and another one follows."""
    given, cases = pytestconfig.getoption("vm_seed"), pytestconfig.getoption("vm_cases")
    if given and which == "fixed":
        pytest.skip("--vm-seed names the one seed to try")
    fresh = random.SystemRandom().getrandbits(32)
    seed, first = given or (FIXED_SEED if which == "fixed" else fresh, 0)
    with changer(machine) as one:
        for number in itertools.count(first):
            one.changes(f"{seed}:{number}")
            if one.report.wrong:
                pytest.fail(one.report.wrong[0], pytrace=False)
            if one.report.hooks >= cases / 6:
                break


def test_a_serial_number_is_given_once(machine: Machine) -> None:
    """Also when stop was killed before it unpinned the maps, and then start before it had written its policy.

    A mark names its policy by the serial number.
    """
    policies = [policy(random.Random(number)) for number in range(3)]
    calls = MapCalls(machine)
    machine.reset()
    with tempfile.TemporaryDirectory() as pins, calls.in_place(), MapStore.create(pins) as store:
        store.change(policies[0])
        first = store.in_force()[1]
        store.flip(0)
        with machine.rollback():
            start = calls.record(lambda: store.change(policies[1]))
        for killed in range(len(start.operations)):
            with machine.rollback(), calls.in_place():
                for one in start.operations[:killed]:
                    one.apply()
                store.change(policies[2])
                assert store.in_force()[1] > first, f"killed after {killed} operations"


# --- controls: each must fail ---------------------------------------------------------------------------------------

_WAITS: dict[str, Waits] = {
    "none": lambda _: (),
    "not before the new policy is written": lambda waits: tuple(wait for wait in waits if wait),
    "not after the flip": lambda waits: tuple(wait for wait in waits if not wait),
}


@pytest.mark.parametrize("left", _WAITS)
def test_without_grace_periods_a_hook_sees_neither(machine: Machine, left: str) -> None:
    """Each of the two grace periods is needed: the first one after a command was killed right behind its flip."""
    with changer(machine, waits=_WAITS[left]) as one:
        assert _is_found(one)


class _FlipsFirst(MapStore):
    """Puts the new generation in force before it is written."""

    def change(self, policy: Policy, serial: int = 0) -> None:
        old = self.generation()
        new = 2 if old == 1 else 1
        grace.wait_for_running_programs()
        self.empty(new)
        self.flip(new)
        self.fill(policy, new, self._last_serial() + 1)
        if old:
            self.empty(old)


class _EmptiesFirst(MapStore):
    """Removes the old policy before the new one is in force."""

    def change(self, policy: Policy, serial: int = 0) -> None:
        old = self.generation()
        new = 2 if old == 1 else 1
        grace.wait_for_running_programs()
        serial = self._last_serial() + 1
        self.empty(new)
        self.fill(policy, new, serial)
        if old:
            self.empty(old)
        self.flip(new)


class _LeavesTheOldThere(MapStore):
    """Never removes anything, so that members of an earlier policy are there again."""

    def empty(self, generation: int) -> None:
        return


class _WritesToTheOneInForce(MapStore):
    """Uses one generation alone."""

    def change(self, policy: Policy, serial: int = 0) -> None:
        grace.wait_for_running_programs()
        serial = self._last_serial() + 1
        self.empty(1)
        self.fill(policy, 1, serial)
        self.flip(1)


@pytest.mark.parametrize("store", [_FlipsFirst, _EmptiesFirst, _LeavesTheOldThere, _WritesToTheOneInForce])
def test_a_store_in_the_wrong_order_is_found(machine: Machine, store: type[MapStore]) -> None:
    with changer(machine, store) as one:
        assert _is_found(one)


def _is_found(one: Changer) -> bool:
    for number in range(_WITHIN):
        one.changes(f"{FIXED_SEED}:{number}")
        if one.report.wrong:
            return True
    return False
