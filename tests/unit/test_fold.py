# SPDX-License-Identifier: Apache-2.0
"""Similar records become one line with a count, and none is forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.watch import fold as fold_module
from imds_guard.watch.fold import LINES_PER_SECOND, MAX_FOLDS, MAX_PROCESSES, WINDOW_S, Folding, RateLimit


def new_folding() -> Folding:
    """For records of three bytes: key, process, number."""
    return Folding(lambda record: record[:1], lambda record: record[1:2])


def emit_new(folding: Folding) -> list[tuple[bytes, int]]:
    """Emits the new folds: their last record and their count."""
    emitted = []
    for fold in folding.take_new():
        emitted.append((fold.last, fold.count))
        folding.mark_emitted(fold)
    return emitted


def test_the_first_record_is_emitted_at_once_and_later_ones_together() -> None:
    folding = new_folding()
    folding.add(b"a11", 0.0)
    assert emit_new(folding) == [(b"a11", 1)]
    for number in b"234":
        folding.add(b"a1" + bytes([number]), 1.0)
    assert emit_new(folding) == []
    assert folding.take_due(WINDOW_S - 1) == []
    (fold,) = folding.take_due(WINDOW_S)
    assert (fold.first, fold.last, fold.count) == (b"a12", b"a14", 3)


def test_a_reopened_fold_is_due_once_per_window() -> None:
    folding = new_folding()
    folding.add(b"a11", 0.0)
    emit_new(folding)
    folding.add(b"a12", 1.0)
    (fold,) = folding.take_due(WINDOW_S)
    folding.reopen(fold, WINDOW_S)
    folding.add(b"a13", WINDOW_S + 1)
    assert folding.take_new() == []
    assert folding.take_due(2 * WINDOW_S - 1) == []
    assert [fold.count for fold in folding.take_due(2 * WINDOW_S)] == [1]


def test_an_empty_fold_ends_with_its_window() -> None:
    """A similar record after that begins a new fold."""
    folding = new_folding()
    folding.add(b"a11", 0.0)
    emit_new(folding)
    assert folding.take_due(WINDOW_S) == []
    assert folding.next_due() == float("inf")
    folding.add(b"a12", WINDOW_S + 1)
    assert emit_new(folding) == [(b"a12", 1)]


def test_processes_are_counted_once() -> None:
    folding = new_folding()
    for record in (b"a11", b"a21", b"a12", b"a31"):
        folding.add(record, 0.0)
    (fold,) = folding.take_new()
    assert (fold.count, len(fold.processes)) == (4, 3)


def test_folds_are_bounded_and_dropped_records_are_counted() -> None:
    folding = Folding(lambda record: record, lambda record: record)
    for number in range(MAX_FOLDS + 5):
        folding.add(number.to_bytes(4, "big"), 0.0)
    assert len(folding.take_new()) == MAX_FOLDS
    assert [folding.take_dropped(), folding.take_dropped()] == [5, 0]


def test_processes_of_a_fold_are_bounded() -> None:
    folding = Folding(lambda record: b"", lambda record: record)
    for number in range(MAX_PROCESSES + 5):
        folding.add(number.to_bytes(4, "big"), 0.0)
    (fold,) = folding.take_new()
    assert (fold.count, len(fold.processes)) == (MAX_PROCESSES + 5, MAX_PROCESSES)


def test_processes_of_all_folds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And there is space for new ones when the old ones have been emitted."""
    monkeypatch.setattr(fold_module, "MAX_ALL_PROCESSES", 6)
    folding = new_folding()

    def counted(now: float) -> int:
        for key in b"abc":
            for process in b"12345":
                folding.add(bytes([key, process, 0]), now)
        return sum(len(fold.processes) for fold in folding.take_new())

    assert counted(0.0) == 5 + 1 + 1  # a fold has at least one
    assert len(folding.take_due(WINDOW_S)) == 3
    assert counted(WINDOW_S) == 7
    for fold in folding.take_due(2 * WINDOW_S):
        folding.reopen(fold, 2 * WINDOW_S)
    assert [len(folding.take_all()), counted(3 * WINDOW_S)] == [0, 7]


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abcd"), st.booleans()), max_size=60))
def test_every_record_is_emitted_once(steps: list[tuple[int, str, bool]]) -> None:
    """Whatever the times and keys, and whether or not a line may be printed."""
    folding, emitted, now = new_folding(), 0, 0.0
    for pause, key, may_print in steps:
        now += pause
        folding.add(key.encode() + b"11", now)
        for fold in folding.take_new():
            if may_print:
                emitted += fold.count
                folding.mark_emitted(fold)
        for fold in folding.take_due(now):
            emitted += fold.count
            if may_print:
                folding.reopen(fold, now)
    assert emitted + sum(fold.count for fold in folding.take_all()) == len(steps)


@given(st.lists(st.floats(0, 0.2), max_size=400), st.sampled_from([0, 10, 50]))
def test_no_second_has_more_lines_than_the_limit(pauses: list[float], reserved: int) -> None:
    rate, now = RateLimit(), 0.0
    taken: list[float] = []
    for pause in pauses:
        now += pause
        if rate.take(now, reserved):
            taken.append(now)
    for at in taken:
        assert len([other for other in taken if at - 1.0 < other <= at]) <= LINES_PER_SECOND - reserved


def test_a_line_counts_for_exactly_one_second() -> None:
    rate = RateLimit()
    assert all(rate.take(2.0) for _ in range(LINES_PER_SECOND))
    assert [rate.take(now) for now in (2.0, 2.999, 3.0)] == [False, False, True]


def test_reserved_lines_are_left_for_others() -> None:
    rate = RateLimit()
    assert sum(rate.take(0.0, 10) for _ in range(200)) == LINES_PER_SECOND - 10
    assert sum(rate.take(0.0) for _ in range(200)) == 10
    assert not rate.take(0.5)
    assert rate.take(1.0)
