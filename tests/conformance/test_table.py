# SPDX-License-Identifier: Apache-2.0
"""The table is complete, and every row would connect if nothing were locked."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import partial

import pytest

from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from tests.conformance.attempts import CONNECTED, FORMS
from tests.conformance.bench import SharedSandbox
from tests.conformance.cases import CASES, MODEL_CASES
from tests.conformance.differences import KNOWN
from tests.conformance.enforcers import ENFORCERS
from tests.conformance.families import ADDRESSES
from tests.conformance.model import Setting
from tests.conformance.perform import SETTINGS, perform
from tests.conformance.probes import PROBES


def test_every_reason_of_the_specification_is_expected_somewhere() -> None:
    """decide() can't give three reasons: UNREADABLE and NO_SETTINGS arise in hooks, UNAPPROVED_SOCKET for packets."""
    never = {Reason.UNREADABLE, Reason.NO_SETTINGS, Reason.UNAPPROVED_SOCKET}
    assert set(Reason) - {case.expected for case in MODEL_CASES} == never


def test_every_form_and_setting_is_used() -> None:
    """Every way to connect is used. A kernel thread is the only setting that can't be made."""
    assert {case.attempt.form for case in CASES} == set(FORMS)
    assert {case.who.setting for case in CASES} == set(SETTINGS)
    assert set(Setting) - set(SETTINGS) == {Setting.KERNEL_THREAD}


def test_every_requirement_can_be_probed() -> None:
    """Every requirement of a row has a probe, and every probe is required by a row."""
    assert {need for case in CASES for need in case.requires} == set(PROBES)


@pytest.mark.parametrize("backend", sorted(ENFORCERS))
def test_every_known_difference_names_a_row(backend: str) -> None:
    """Every pattern of differences.py matches a row."""
    idle = [pattern for pattern, _ in KNOWN[backend] if not any(fnmatchcase(case.id, pattern) for case in CASES)]
    assert idle == []


def test_ids_of_users_and_groups_differ() -> None:
    """No caller but root has uid == gid: such a row could not show that the two are mixed up."""
    same = {case.name for case in CASES if case.who.uids == case.who.gids and case.who.uids != (0, 0, 0)}
    assert same == set()


@pytest.fixture(scope="module")
def unguarded(as_root: None) -> Iterator[SharedSandbox]:
    """A sandbox where nothing is locked."""
    shared = SharedSandbox(lambda: Sandbox(ADDRESSES))
    yield shared
    shared.close()


@pytest.mark.parametrize("name", sorted({case.name for case in CASES}))
def test_connects_when_nothing_is_locked(name: str, unguarded: SharedSandbox, lacking: dict[str, str | None]) -> None:
    """Every row connects when nothing is locked. Otherwise a denial would prove nothing."""
    rows = [case for case in CASES if case.name == name and all(lacking[need] is None for need in case.requires)]
    with unguarded.use() as sandbox:
        outcomes = {case.id: sandbox.call(partial(perform, case)) for case in rows}
        assert outcomes == dict.fromkeys(outcomes, CONNECTED)
