# SPDX-License-Identifier: Apache-2.0
"""Every planted fault is found: by the comparison with the model, or by the test that is named for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.conftest import need_compiled_hooks
from tests.vm.decisions import differences, scene_of
from tests.vm.machine import Machine
from tests.vm.planted import FAULTS, FAULTS_OF_FILTERS, Fault, planted
from tests.vm.test_corners import empty_entry_passes
from tests.vm.test_decisions import FIXED_SEED
from tests.vm.test_egress import connections_of_others_are_known, every_earlier_mark_counts
from tests.vm.test_redirect import a_mark_is_for_its_filter, nothing_stands_in_for_a_listener
from tests.vm.test_report import rows_beyond_a_share_are_of_all_locks

_SCENES = 100
"""Most faults show in one of the first three. Those about callers with very many groups are the rarest."""

_OTHER_TESTS = {
    "an-entry-without-ranges-locks": empty_entry_passes,
    "rows-of-others-are-of-one-lock": rows_beyond_a_share_are_of_all_locks,
    "an-earlier-mark-is-not-read": every_earlier_mark_counts,
    "half-of-the-digest": nothing_stands_in_for_a_listener,
    "a-socket-that-does-not-listen": nothing_stands_in_for_a_listener,
    "any-mark-is-one-for-a-filter": a_mark_is_for_its_filter,
    "one-filter-for-another": a_mark_is_for_its_filter,
    **{
        fault.name: connections_of_others_are_known
        for fault in FAULTS
        if fault.file == "incoming.h" or fault.name == "an-accepted-socket-counts-as-a-client"
    },
}


_PLANTED = [
    *(pytest.param(fault, "plain", id=fault.name) for fault in (*FAULTS, *FAULTS_OF_FILTERS)),
    *(pytest.param(fault, "bare-plain", id=f"{fault.name}-bare") for fault in FAULTS),
]


@pytest.mark.parametrize(("fault", "form"), _PLANTED)
def test_a_planted_fault_is_found(fault: Fault, form: str, tmp_path: Path) -> None:
    """Also in the programs of policies without filters, which are compiled from the same source."""
    need_compiled_hooks()
    with planted(fault, tmp_path), Machine(forms=[form]) as machine:
        test = _OTHER_TESTS.get(fault.name)
        if test is not None:
            assert not test(machine)
        else:
            assert any(_differs(number, machine) for number in range(_SCENES))


@pytest.mark.parametrize("file", ["decide.h", "imds_guard.backends.ebpf.render", "imds_guard.policy.decide"])
def test_a_copy_without_a_fault_passes(file: str, tmp_path: Path) -> None:
    need_compiled_hooks()
    nothing = Fault("nothing", file, "SPDX-License-Identifier", "SPDX-License-Identifier")
    with planted(nothing, tmp_path), Machine(forms=["plain"]) as machine:
        assert not any(_differs(number, machine) for number in range(3))


def _differs(number: int, machine: Machine) -> bool:
    return next(differences(scene_of(FIXED_SEED, number, filters=machine.has_filters), machine), None) is not None
