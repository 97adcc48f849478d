# SPDX-License-Identifier: Apache-2.0
"""The tests execute every instruction of every program in every form, and take every conditional jump both ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imds_guard.backends.ebpf import abi
from tests.vm import coverage
from tests.vm.conftest import need_compiled_hooks
from tests.vm.egress import egress_forms
from tests.vm.lines import Line, lines
from tests.vm.machine import Machine
from tests.vm.programs import BARE_FORMS, FORMS

KNOWN_BCC = ("0.26.0",)
"""Another compiler arranges branches in another way. There the numbers alone are held."""
ELSEWHERE = 0.97

NEVER: dict[tuple[str, str, str], str] = {
    ("imds_guard.bpf.c", "return sk ? ig_check_connect(", "never jumps"): (
        "The kernel always gives a socket; the verifier demands the test."
    ),
    ("groups.h", "if (next >= IG_MAX_SEARCHED_GROUPS)", "never jumps"): (
        "bpf_loop() is told to make no more calls than that; the verifier demands the test."
    ),
    ("groups.h", "return search->verdict || search->failed;", "never jumps"): (
        "The first listed group that is found ends the loop, so there is no verdict yet where this is tested."
    ),
    ("redirect.h", "if (hook == IG_CONNECT4) {", "never jumps"): (
        "The branch after it: no other hook than these two redirects."
    ),
    ("egress.h", "if (packet->first_fragment || ig_skb_load_bytes(", "never jumps"): (
        "Before the first extension header no fragment header was met: the loop is unrolled."
    ),
}
"""What no run does: file, beginning of the line, and which. Other instructions of the same line do it."""
GAPS = {"plain": 2, "direct": 2, "bare-plain": 1}
"""Of forms without bpf_loop(): about sk, and about hooks that don't redirect. To find their lines takes a second."""


PROGRAMS = [*((form, "connect4") for form in FORMS), *(("loop", hook) for hook in (abi.EGRESS, *abi.GETPEERNAME))]


@pytest.fixture(scope="module")
def covered() -> Iterator[Machine]:
    """A machine on which everything has run."""
    need_compiled_hooks()
    with Machine() as machine:
        coverage.run_everything(machine)
        yield machine


@pytest.fixture(scope="module")
def covered_bare() -> Iterator[Machine]:
    """The same, of the forms for policies without filters."""
    need_compiled_hooks()
    with Machine(tuple(BARE_FORMS)) as machine:
        coverage.run_everything(machine)
        yield machine


@pytest.mark.parametrize("form", BARE_FORMS)
def test_the_forms_without_filters_are_executed_too(covered_bare: Machine, form: str) -> None:
    assert_covered(covered_bare, form, "connect4")


@pytest.mark.parametrize(("form", "hook"), PROGRAMS)
def test_every_instruction_is_executed_and_every_jump_goes_both_ways(covered: Machine, form: str, hook: str) -> None:
    """The program at egress is the same in every form."""
    if hook == abi.EGRESS:
        assert egress_forms(covered) == [form]
    assert_covered(covered, form, hook)


def assert_covered(covered: Machine, form: str, hook: str) -> None:
    """But for what NEVER explains."""
    found = list(coverage.gaps(covered, form, hook))
    if bcc_version() not in KNOWN_BCC:
        instructions, jumps = coverage.size(covered, form, hook)
        assert len(found) <= (1 - ELSEWHERE) * (instructions + jumps)
        return
    if form in GAPS:
        assert len(found) == GAPS[form]
        return
    where = lines(form, hook)
    unexplained = [f"{gap.what}: {gap.at}, {where[gap.at]}" for gap in found if not explained(gap, where[gap.at])]
    assert unexplained == []


def explained(gap: coverage.Gap, line: Line) -> bool:
    return any((gap.what, line.file) == (what, file) and line.text.startswith(begin) for file, begin, what in NEVER)


def test_the_table_has_nothing_that_is_executed(covered: Machine) -> None:
    if bcc_version() not in KNOWN_BCC:
        pytest.skip(f"bcc {bcc_version()} arranges branches in another way than {', '.join(KNOWN_BCC)}")
    met = set[tuple[str, str, str]]()
    for form, hook in (("better", "connect4"), ("loop", abi.EGRESS)):
        where = lines(form, hook)
        found = [(where[gap.at], gap.what) for gap in coverage.gaps(covered, form, hook)]
        met |= {row for row in NEVER for line, what in found if (line.file, what) == (row[0], row[2])}
    assert met == set(NEVER)


def bcc_version() -> str:
    import bcc

    return str(bcc.__version__)
