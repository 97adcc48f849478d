# SPDX-License-Identifier: Apache-2.0
"""A child that answers questions, and what happens when it hangs."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from imds_guard.errors import BadPolicy
from imds_guard.kernel import abandonable, children, untrusted
from imds_guard.kernel.abandonable import Limits, Unanswered, Worker
from imds_guard.kernel.children import ChildFailed

HUNG, NOT_ASKED = Unanswered.HUNG, Unanswered.NOT_ASKED
QUICK = Limits(share_s=0.5, total_s=60.0)


def double_or_hang(number: int) -> int:
    """Hangs for negative numbers."""
    if number < 0:
        signal.pause()
    return 2 * number


def answers(*numbers: int, limits: Limits = QUICK, by_tens: bool = False) -> dict[int, int | Unanswered]:
    with Worker(double_or_hang) as worker:
        return dict(worker.ask_each(numbers, limits, (lambda number: number // 10) if by_tens else None))


def test_every_question_is_answered_in_order() -> None:
    with Worker(double_or_hang) as worker:
        assert list(worker.ask_each(range(1000), QUICK)) == [(number, 2 * number) for number in range(1000)]


def test_the_next_questions_of_one_that_hangs_are_answered() -> None:
    assert answers(1, -1, 2, -2, 3) == {1: 2, -1: HUNG, 2: 4, -2: HUNG, 3: 6}


def test_a_question_that_hangs_costs_its_share() -> None:
    before = time.monotonic()
    answers(1, -1, 2)
    assert 0.5 <= time.monotonic() - before < 10


def test_a_child_answers_one_question_after_another() -> None:
    with Worker[int, int](lambda _: os.getpid()) as worker:
        pids = {worker.ask(number, 5.0) for number in range(5)}
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_after_so_many_that_hang_the_rest_is_not_asked() -> None:
    assert answers(-1, -2, 3, limits=Limits(0.1, 60.0, hung=2)) == {-1: HUNG, -2: HUNG, 3: NOT_ASKED}


def test_after_two_that_hang_the_rest_of_their_owner_is_not_asked() -> None:
    assert answers(-1, -2, -3, 4, -11, by_tens=True) == {-1: HUNG, -2: HUNG, -3: NOT_ASKED, 4: 8, -11: HUNG}


def test_after_the_total_time_the_rest_is_not_asked() -> None:
    assert answers(-1, 2, limits=Limits(share_s=60.0, total_s=3.0)) == {-1: HUNG, 2: NOT_ASKED}


def test_no_time_is_no_question() -> None:
    assert answers(1, 2, limits=Limits(total_s=0.0)) == {1: NOT_ASKED, 2: NOT_ASKED}


def test_no_more_children_are_left_than_may_hang() -> None:
    """And none of them once they can end."""
    answers(-1, -2, -3)
    assert children.abandoned() == 0


def test_a_child_that_ends_has_no_answer_and_another_one_goes_on() -> None:
    with Worker[int, object](lambda number: os._exit(3) if number < 0 else number) as worker:
        assert dict(worker.ask_each([1, -1, 2], QUICK)) == {1: 1, -1: HUNG, 2: 2}


def test_an_answer_that_nobody_took_is_not_taken_for_the_next() -> None:
    with Worker(double_or_hang) as worker:
        for _ in worker.ask_each([1, 2, 3], QUICK):
            break
        assert worker.ask(4, 5.0) == 8


@pytest.mark.parametrize(("error", "raised"), [(BadPolicy("no"), BadPolicy), (ValueError("no"), ChildFailed)])
def test_an_error_of_the_work_is_raised(error: Exception, raised: type[Exception]) -> None:
    def fails(_: int) -> None:
        raise error

    with Worker(fails) as worker:
        with pytest.raises(raised, match="no"):
            worker.ask(1, 5.0)
        with pytest.raises(raised, match="no"):
            worker.ask(2, 5.0)


def test_an_answer_may_be_long_but_not_endless() -> None:
    with Worker(bytes) as worker:
        assert worker.ask(3_000_000, 5.0) == bytes(3_000_000)
        with pytest.raises(ChildFailed, match="too long"):
            worker.ask(abandonable.MAX_ANSWER + 1, 5.0)


def test_questions_may_be_long() -> None:
    """Longer than a pipe takes at once, while the child works on the first."""
    with Worker(len) as worker:
        asked = [bytes(10_000 + number) for number in range(100)]
        assert [answer for _, answer in worker.ask_each(asked, QUICK)] == [len(one) for one in asked]


def test_a_child_holds_nothing_of_its_parent() -> None:
    """No file, no lock, not the terminal, no directory: in state D it would hold them for good."""

    def held(_: int) -> tuple[list[str], str]:
        links = []
        for name in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
            except FileNotFoundError:
                continue  # the one that listed them
        return sorted(links), os.getcwd()

    reader, writer = os.pipe()
    with open(__file__, encoding="utf-8"), Worker(held) as worker:
        assert worker.ask(1, 5.0) == (["/dev/null"] * 3 + ["pipe"] * 2, "/")
    os.close(reader)
    os.close(writer)


def test_a_child_works_where_its_parent_has_no_standard_files() -> None:
    """The pipes then get the numbers 0 to 2."""

    def ask() -> object:
        for number in range(3):
            os.close(number)
        with Worker(double_or_hang) as worker:
            return worker.ask(4, 5.0)

    assert children.run_in_child(ask) == 8


def test_a_signal_of_the_terminal_is_left_to_the_parent() -> None:
    with Worker[int, int](lambda _: os.getpid()) as worker:
        pid = worker.ask(1, 5.0)
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGINT)
        assert worker.ask(2, 5.0) == pid


def test_its_descriptors_are_closed_once_also_where_its_end_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards their numbers are those of other files."""
    worker: Worker[int, int] = Worker(lambda number: number)
    assert worker.ask(7, 10) == 7
    end = children.abandon

    def fail(pid: int) -> None:
        end(pid)
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(children, "abandon", fail)
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        worker.close()
    worker.close()


def test_where_no_child_can_be_forked_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    before = os.listdir("/proc/self/fd")
    assert answers(1, 2) == {1: NOT_ASKED, 2: NOT_ASKED}
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("read", [untrusted.describe, lambda pid: untrusted.sockets_of(pid, frozenset())])
def test_what_may_hang_is_refused_outside_such_a_child(read: object) -> None:
    with pytest.raises(ChildFailed, match="outside a child"):
        read(os.getpid())  # type: ignore[operator]
