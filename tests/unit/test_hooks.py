# SPDX-License-Identifier: Apache-2.0
"""Which of the programs at a hook are ours, which nothing pins, and which run after ours."""

from __future__ import annotations

import pytest

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.hooks import Attached, Hook

OTHER, OURS, OLD, LATER = (
    Attached(1, "somebody", None),
    Attached(2, "ig_c4_01234567", "01234567"),
    Attached(3, "ig_c4_89abcdef", "89abcdef"),
    Attached(4, "somebody", None),
)


@pytest.mark.parametrize(("name", "behind"), [("connect4", [LATER]), (abi.EGRESS, [])])
def test_programs_behind_ours(name: str, behind: list[Attached]) -> None:
    """They may rewrite the address of a connect. At egress no program can."""
    hook = Hook(name, (OTHER, OURS, OLD, LATER), linked=OURS.id)
    assert (hook.ours, hook.unpinned, hook.behind) == (OURS, [OLD], behind)


@pytest.mark.parametrize("linked", [None, 5, OTHER.id], ids=["no link", "not attached", "somebody else's program"])
def test_without_a_program_of_ours_at_the_link_none_is_ours(linked: int | None) -> None:
    hook = Hook("connect4", (OTHER, OURS), linked)
    assert (hook.ours, hook.unpinned, hook.behind) == (None, [OURS], [])
