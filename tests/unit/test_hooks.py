# SPDX-License-Identifier: Apache-2.0
"""Which of the programs at a hook are ours, which nothing pins, which run before ours and which behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from imds_guard.backends.ebpf import abi, other_programs
from imds_guard.backends.ebpf.hooks import Attached, Hook
from imds_guard.kernel import bpf
from imds_guard.kernel.cgroup import Cgroup

OTHER, OURS, OLD, LATER = (
    Attached(1, "somebody", None),
    Attached(2, "ig_c4_01234567", "01234567"),
    Attached(3, "ig_c4_89abcdef", "89abcdef"),
    Attached(4, "somebody", None),
)


ABOVE = Attached(5, "of a cgroup above", None)
HERE = cast(Cgroup, SimpleNamespace(fd=-1, id=7, path="/x"))


def ordered(hook: Hook) -> list[tuple[int, str]]:
    return [(one.id, one.order.name.lower()) for one in other_programs.find(HERE, [hook])]


@pytest.fixture(autouse=True)
def _nothing_else_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf, "programs_of_type", lambda wanted: iter(()))
    monkeypatch.setattr(other_programs, "ancestors", lambda cgroup: iter(()))


def test_programs_before_and_behind_ours() -> None:
    """They may rewrite the address of a connect. At egress no program can."""
    hook = Hook("connect4", (OTHER, OURS, OLD, LATER), OURS.id, (OTHER, OURS, OLD, LATER, ABOVE))
    assert (hook.ours, hook.unpinned, hook.is_first, hook.is_reordered) == (OURS, [OLD], False, False)
    assert ordered(hook) == [(1, "before"), (4, "behind"), (5, "behind")]
    assert ordered(hook._replace(name=abi.EGRESS)) == []


def test_the_order_in_which_programs_run_counts() -> None:
    """BPF_F_PREORDER puts a program in front that stands behind ours in the list, or is attached above."""
    hook = Hook("connect4", (OURS, OTHER), OURS.id, (OTHER, OURS))
    assert (hook.is_first, hook.is_reordered, ordered(hook)) == (True, True, [(1, "before")])
    hook = Hook("connect4", (OURS,), OURS.id, (ABOVE, OURS))
    assert (hook.is_first, hook.is_reordered, ordered(hook)) == (True, True, [(5, "before")])


def test_a_program_that_the_kernel_does_not_run_is_not_ours() -> None:
    hook = Hook("connect4", (OURS, OTHER), OURS.id, (OTHER,))
    assert (hook.ours, ordered(hook)) == (None, [])


@pytest.mark.parametrize("linked", [None, 5, OTHER.id], ids=["no link", "not attached", "somebody else's program"])
def test_without_a_program_of_ours_at_the_link_none_is_ours(linked: int | None) -> None:
    hook = Hook("connect4", (OTHER, OURS), linked)
    assert (hook.ours, hook.unpinned, ordered(hook)) == (None, [OURS], [])
