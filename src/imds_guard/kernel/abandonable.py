# SPDX-License-Identifier: Apache-2.0
"""Work that may never end, in a child that can be abandoned: its parent goes on, whatever the child hangs in.

An unprivileged process can make some calls of others wait forever, in state D, deaf to SIGKILL (see untrusted.py). So
such calls are made by a child that holds nothing: it has closed every descriptor but its two pipes, its directory is
``/``, and its parent kills it and does not wait for its end. It answers one question after another, so one child serves
thousands of processes. When it hangs, another one takes over after the question that it hung in.

    with Worker(work) as worker:
        for question, answer in worker.ask_each(questions, Limits(total_s=5)):
            if isinstance(answer, Unanswered): ...

``work`` runs in the child, with the memory that the parent had when it forked. Questions and answers are pickled; an
answer has at most MAX_ANSWER bytes.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import time
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator
from enum import Enum
from types import TracebackType
from typing import Callable, Generic, NamedTuple, TypeVar

from imds_guard.kernel import children
from imds_guard.kernel.children import ChildFailed

Q = TypeVar("Q")
A = TypeVar("A")

MAX_ANSWER = 4 << 20
_BATCH = 64
"""Questions that are sent together: the child works while its parent looks at an answer."""
_HUNG_PER_OWNER = 2
_FORK_WITHIN_S = 5.0
"""The time to fork a child does not count for the question; a busy machine may need a second."""
_LENGTH = struct.Struct("=Q")


class Unanswered(Enum):
    """Why a question has no answer."""

    HUNG = "no answer in time"
    NOT_ASKED = "not asked"
    """The total time was over, too many questions had hung, or two of the same owner, or no child could be forked."""


class Limits(NamedTuple):
    """Bounds of ask_each()."""

    share_s: float = 1.0
    """For one question. To read a file of /proc takes microseconds; a machine that swaps needs more."""
    total_s: float = 10.0
    hung: int = 5
    """After so many questions that hung the rest is not asked. It is also the largest number of abandoned children."""


class Worker(Generic[Q, A]):
    """A child that answers questions with ``work``; it is forked when it is first needed. Close it.

    The child dies with the thread that has forked it.
    """

    def __init__(self, work: Callable[[Q], A]) -> None:
        self._work = work
        self._child: _Child | None = None

    def __enter__(self) -> Worker[Q, A]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child, or abandons it where it hangs."""
        child, self._child = self._child, None  # its descriptors are closed once, whatever fails
        if child is not None:
            child.abandon()

    def ask(self, question: Q, within_s: float) -> A | Unanswered:
        """The answer to one question. Raises as ask_each()."""
        ((_, answer),) = self.ask_each([question], Limits(within_s, within_s + _FORK_WITHIN_S, 1))
        return answer

    def ask_each(
        self, questions: Iterable[Q], limits: Limits, owner: Callable[[Q], Hashable] | None = None
    ) -> Iterator[tuple[Q, A | Unanswered]]:
        """Every question once, with its answer. Raises the GuardError that ``work`` raised, or ChildFailed.

        ``owner`` tells whose a question is. Where two of one owner have hung the rest of that owner's is not asked, so
        that nobody uses up the time of all.
        """
        budget = _Budget(limits, owner)
        remaining = deque(questions)
        batch: deque[Q] = deque()
        try:
            while remaining:
                for question in _take(remaining, _BATCH):
                    if budget.allows(question) and self._has_child(budget):
                        batch.append(question)
                    else:
                        yield question, Unanswered.NOT_ASKED
                self._send(batch, budget)
                while batch:
                    answer = self._receive(budget)
                    question = batch.popleft()
                    if answer is Unanswered.HUNG:
                        budget.hung(question)
                        self.close()
                        remaining.extendleft(reversed(batch))
                        batch.clear()
                    yield question, answer
        finally:
            if batch:  # the caller has stopped listening, and answers are on their way
                self.close()

    def _has_child(self, budget: _Budget[Q]) -> bool:
        """False where none can be forked (EAGAIN, ENOMEM), or none is ready when the total time ends."""
        if self._child is None:
            try:
                self._child = _Child(self._work)
            except OSError:
                return False
            if self._child.receive(budget.ends) is None:
                self.close()
        return self._child is not None

    def _send(self, batch: deque[Q], budget: _Budget[Q]) -> None:
        if batch and self._child is not None:
            self._child.send(pickle.dumps(list(batch)), budget.share_ends())

    def _receive(self, budget: _Budget[Q]) -> A | Unanswered:
        assert self._child is not None
        message = self._child.receive(budget.share_ends())
        if message is None:
            return Unanswered.HUNG
        succeeded, answer = pickle.loads(message)  # noqa: S301 - written by our own child
        if not succeeded:
            self.close()
            raise answer
        return answer  # type: ignore[no-any-return]


def _take(remaining: deque[Q], maximum: int) -> list[Q]:
    return [remaining.popleft() for _ in range(min(maximum, len(remaining)))]


class _Budget(Generic[Q]):
    """What the questions of one ask_each() may still cost."""

    def __init__(self, limits: Limits, owner: Callable[[Q], Hashable] | None) -> None:
        self._limits = limits
        self.ends = time.monotonic() + limits.total_s
        self._owner = owner
        self._hung: Counter[Hashable] = Counter()
        self._all_hung = 0

    def allows(self, question: Q) -> bool:
        if time.monotonic() >= self.ends or self._all_hung >= self._limits.hung:
            return False
        return self._owner is None or self._hung[self._owner(question)] < _HUNG_PER_OWNER

    def share_ends(self) -> float:
        return min(time.monotonic() + self._limits.share_s, self.ends)

    def hung(self, question: Q) -> None:
        self._all_hung += 1
        if self._owner is not None:
            self._hung[self._owner(question)] += 1


class _Child:
    """The child with its two pipes. Raises OSError where it can't be forked."""

    def __init__(self, work: Callable[[Q], A]) -> None:
        theirs, self._questions = os.pipe()
        self._answers, ours = os.pipe()
        try:
            self._pid = children.fork_detached(lambda: _answer(work, theirs, ours), keep=(theirs, ours))
        except OSError:
            os.close(self._questions)
            os.close(self._answers)
            raise
        finally:
            os.close(theirs)
            os.close(ours)
        os.set_blocking(self._questions, False)

    def abandon(self) -> None:
        os.close(self._questions)
        os.close(self._answers)
        children.abandon(self._pid)

    def send(self, message: bytes, deadline: float) -> None:
        """Gives up at the deadline, or when the child has ended: then there is no answer, either."""
        rest = memoryview(_LENGTH.pack(len(message)) + message)
        while rest and _is_ready(self._questions, select.POLLOUT, deadline):
            try:
                rest = rest[os.write(self._questions, rest) :]
            except BrokenPipeError:
                return

    def receive(self, deadline: float) -> bytes | None:
        """None when nothing comes before the deadline, or when the child has ended."""
        header = self._read(_LENGTH.size, deadline)
        if header is None:
            return None
        (size,) = _LENGTH.unpack(header)
        if size > MAX_ANSWER:
            raise ChildFailed(f"a child gave an answer of {size} bytes, which is too long")
        return self._read(size, deadline)

    def _read(self, size: int, deadline: float) -> bytes | None:
        chunks = b""
        while len(chunks) < size:
            ready = _is_ready(self._answers, select.POLLIN, deadline)
            more = os.read(self._answers, size - len(chunks)) if ready else b""
            if not more:
                return None
            chunks += more
        return chunks


def _is_ready(fd: int, event: int, deadline: float) -> bool:
    """select(2) can't wait for a descriptor above 1023."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


# --- in the child ---------------------------------------------------------------------------------------------------


def _answer(work: Callable[[Q], A], questions: int, answers: int) -> None:
    """Says that it is ready, and answers until the parent closes its pipe."""
    children.send(answers, b"")
    with os.fdopen(questions, "rb", closefd=False) as reader:
        while header := reader.read(_LENGTH.size):
            for question in pickle.loads(reader.read(*_LENGTH.unpack(header))):  # noqa: S301 - written by our parent
                children.send(answers, _try(work, question))


def _try(work: Callable[[Q], A], question: Q) -> bytes:
    try:
        return pickle.dumps((True, work(question)))
    except Exception as error:  # noqa: BLE001 - the parent raises it
        return pickle.dumps((False, children.portable(error)))
