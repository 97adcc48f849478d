# SPDX-License-Identifier: Apache-2.0
"""What would let a denied caller through."""

from __future__ import annotations

import pytest

from imds_guard.policy.decide import Reason
from imds_guard.watch.advice import HELPED_BY_ALLOW, note, would_allow
from imds_guard.watch.process_info import NameCache

UID = 61_001


@pytest.mark.parametrize(
    ("reason", "uid", "groups", "advice"),
    [
        (Reason.NOT_LISTED, 0, {0}, "add root to group root, or imds-guard allow --user root"),
        (Reason.NOT_LISTED, 0, set(), "imds-guard allow --user root"),
        (Reason.NOT_LISTED, UID, {0}, "imds-guard allow --user 61001"),
        (
            Reason.NOT_LISTED,
            0,
            set(range(70_000, 70_005)),
            "add root to one of the groups 70000, 70001, 70002, and 2 more, or imds-guard allow --user root",
        ),
        (Reason.DENIED_USER, UID, set(), "take user 61001 off the deny list"),
        (
            Reason.TOO_MANY_GROUPS,
            UID,
            {0},
            "allow user 61001 by user ID (imds-guard allow --user 61001), or list at most 128 groups in the lock",
        ),
        (Reason.KERNEL_THREAD, UID, set(), None),
    ],
)
def test_advice_for_one_caller(reason: Reason, uid: int, groups: set[int], advice: str | None) -> None:
    assert would_allow(reason, uid, groups, NameCache()) == advice


def test_only_kernel_threads_get_no_advice() -> None:
    reasons = {reason for reason in Reason if not reason.permits and would_allow(reason, UID, (), NameCache()) is None}
    assert reasons == {Reason.KERNEL_THREAD}


def test_a_note_is_the_same_advice_for_any_user() -> None:
    assert note(Reason.DENIED_USER) == "denied-user: take the user off the deny list"
    assert note(Reason.KERNEL_THREAD) == "kernel-thread: nothing lets such a caller through"


@pytest.mark.parametrize("reason", [reason for reason in Reason if not reason.permits])
def test_watch_and_report_give_the_same_advice(reason: Reason) -> None:
    if reason in HELPED_BY_ALLOW or reason is Reason.KERNEL_THREAD:
        return
    advice = would_allow(reason, UID, (), NameCache()) or ""
    assert note(reason) == f"{reason.label}: {advice.replace(f'user {UID}', 'the user')}"
