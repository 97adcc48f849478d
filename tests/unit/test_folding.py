# SPDX-License-Identifier: Apache-2.0
"""Floods made small, with nothing lost on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imds_guard.watch import fold as folding
from imds_guard.watch.fold import KINDS, LINES_A_SECOND, WINDOW_S, Folding, Rate


def new() -> Folding:
    """Records of three octets: kind, process, number."""
    return Folding(lambda record: record[:1], lambda record: record[1:2])


def told(one: Folding) -> list[tuple[bytes, int]]:
    """What is new, taken as told."""
    found = []
    for fold in one.fresh():
        found.append((fold.last, fold.count))
        one.came_out(fold)
    return found


def test_the_first_of_a_kind_comes_out_at_once_and_those_after_it_as_one() -> None:
    one = new()
    one.add(b"a11", 0.0)
    assert told(one) == [(b"a11", 1)]
    for number in b"234":
        one.add(b"a1" + bytes([number]), 1.0)
    assert told(one) == []
    assert one.due(WINDOW_S - 1) == []
    (fold,) = one.due(WINDOW_S)
    assert (fold.first, fold.last, fold.count) == (b"a12", b"a14", 3)


def test_a_kind_that_goes_on_comes_out_once_a_window() -> None:
    one = new()
    one.add(b"a11", 0.0)
    told(one)
    one.add(b"a12", 1.0)
    (fold,) = one.due(WINDOW_S)
    one.again(fold, WINDOW_S)
    one.add(b"a13", WINDOW_S + 1)
    assert one.fresh() == []
    assert one.due(2 * WINDOW_S - 1) == []
    assert [fold.count for fold in one.due(2 * WINDOW_S)] == [1]


def test_a_kind_of_which_nothing_came_is_forgotten_and_is_new_when_it_comes_again() -> None:
    one = new()
    one.add(b"a11", 0.0)
    told(one)
    assert one.due(WINDOW_S) == []
    assert one.next_due() == float("inf")
    one.add(b"a12", WINDOW_S + 1)
    assert told(one) == [(b"a12", 1)]


def test_processes_are_told_apart() -> None:
    one = new()
    for record in (b"a11", b"a21", b"a12", b"a31"):
        one.add(record, 0.0)
    (fold,) = one.fresh()
    assert (fold.count, len(fold.processes)) == (4, 3)


def test_kinds_are_bounded_and_what_has_no_room_is_counted() -> None:
    one = Folding(lambda record: record, lambda record: record)
    for number in range(KINDS + 5):
        one.add(number.to_bytes(4, "big"), 0.0)
    assert len(one.fresh()) == KINDS
    assert one.crowded_out == 5


def test_processes_of_a_kind_are_bounded() -> None:
    one = Folding(lambda record: b"", lambda record: record)
    for number in range(folding.PROCESSES + 5):
        one.add(number.to_bytes(4, "big"), 0.0)
    (fold,) = one.fresh()
    assert (fold.count, len(fold.processes)) == (folding.PROCESSES + 5, folding.PROCESSES)


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abcd"), st.booleans()), max_size=60))
def test_every_record_comes_out_once(steps: list[tuple[int, str, bool]]) -> None:
    """Whatever comes when, and whether or not there is room for a line."""
    one, out, now = new(), 0, 0.0
    for later, kind, room in steps:
        now += later
        one.add(kind.encode() + b"11", now)
        for fold in one.fresh():
            if room:
                out += fold.count
                one.came_out(fold)
        for fold in one.due(now):
            out += fold.count
            if room:
                one.again(fold, now)
    assert out + sum(fold.count for fold in one.rest()) == len(steps)


@given(st.lists(st.floats(0, 0.2), max_size=400), st.sampled_from([0, 10, 50]))
def test_no_second_has_more_lines_than_it_may(gaps: list[float], spared: int) -> None:
    rate, now = Rate(), 0.0
    taken: list[float] = []
    for gap in gaps:
        now += gap
        if rate.take(now, spared):
            taken.append(now)
    for at in taken:
        assert len([other for other in taken if at - 1.0 < other <= at]) <= LINES_A_SECOND - spared


def test_what_is_spared_is_left_for_others() -> None:
    rate = Rate()
    assert sum(rate.take(0.0, 10) for _ in range(200)) == LINES_A_SECOND - 10
    assert sum(rate.take(0.0) for _ in range(200)) == 10
    assert not rate.take(0.5)
    assert rate.take(1.0)
