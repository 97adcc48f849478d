# SPDX-License-Identifier: Apache-2.0
"""Combines similar records into one line with a count, and limits the number of lines per second.

No record is forgotten: each one is counted in a Fold or in ``Folding.dropped``. Nothing here reads a clock; the caller
passes the time.
"""

from __future__ import annotations

from collections import deque
from typing import Callable

WINDOW_S = 10.0
"""The first record of a fold is due at once; similar ones are due together at the end of each window."""
MAX_FOLDS = 4096
MAX_PROCESSES = 1000
"""Processes of a fold are counted up to this number."""
MAX_ALL_PROCESSES = 100_000
"""Of all folds: somebody with sub-IDs can have thousands of folds with a thousand processes each."""


class Fold:
    """Similar records that have not been emitted yet."""

    def __init__(self, key: bytes, record: bytes, due: float, processes: set[bytes]) -> None:
        self.key = key
        self.first = self.last = record
        self.due = due
        self.count = 1
        self.processes = processes
        self.note: object = None
        """For the caller's own use; kept from one window to the next."""


class Folding:
    """Sorts records into folds. Records with equal ``key`` are similar; ``process`` gives the process of a record."""

    def __init__(self, key: Callable[[bytes], bytes], process: Callable[[bytes], bytes]) -> None:
        self._key = key
        self._process = process
        self._open: dict[bytes, Fold] = {}  # ordered by the time when they are due
        self._new: dict[bytes, Fold] = {}
        self._dropped = 0
        self._processes = 0
        """Of all open folds, as far as they are counted."""

    def add(self, record: bytes, now: float) -> None:
        """Adds a record to its fold. It is only counted if it would need one fold more than MAX_FOLDS."""
        key = self._key(record)
        fold = self._open.get(key)
        if fold is not None:
            self._join(fold, record)
        elif len(self._open) >= MAX_FOLDS:
            self._dropped += 1
        else:
            fold = Fold(key, record, now + WINDOW_S, {self._process(record)})
            self._processes += 1
            self._open[key] = self._new[key] = fold

    def _join(self, fold: Fold, record: bytes) -> None:
        if not fold.count:
            fold.first = record
        fold.last = record
        fold.count += 1
        if len(fold.processes) < MAX_PROCESSES and self._processes < MAX_ALL_PROCESSES:
            before = len(fold.processes)
            fold.processes.add(self._process(record))
            self._processes += len(fold.processes) - before

    def take_dropped(self) -> int:
        """The number of records since the last call that no fold had space for."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def take_new(self) -> list[Fold]:
        """The folds that began since the last call."""
        found = list(self._new.values())
        self._new.clear()
        return found

    def mark_emitted(self, fold: Fold) -> None:
        """Empties a fold whose records were emitted. Later ones are due at the end of its window."""
        fold.count = 0
        if self._open.get(fold.key) is fold:
            self._processes -= len(fold.processes)
        fold.processes.clear()

    def take_due(self, now: float) -> list[Fold]:
        """Removes the folds whose window is over, and returns those that hold records."""
        found: list[Fold] = []
        for fold in list(self._open.values()):
            if fold.due > now:
                break
            del self._open[fold.key]
            self._processes -= len(fold.processes)
            if fold.count:
                found.append(fold)
        return found

    def reopen(self, fold: Fold, now: float) -> None:
        """Begins another window for a fold that was due and was emitted."""
        self.mark_emitted(fold)
        fold.due = now + WINDOW_S
        self._open[fold.key] = fold

    def take_all(self) -> list[Fold]:
        """Removes all folds, due or not, and returns those that hold records."""
        found = [fold for fold in self._open.values() if fold.count]
        self._open.clear()
        self._processes = 0
        self._new.clear()
        return found

    def next_due(self) -> float:
        """When take_due() should be called next; infinity when there is no fold."""
        first = next(iter(self._open.values()), None)
        return float("inf") if first is None else first.due


LINES_PER_SECOND = 100


class RateLimit:
    """At most LINES_PER_SECOND lines within any second."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def take(self, now: float, reserved: int = 0) -> bool:
        """True when one more line may be printed now, with ``reserved`` lines left for others within this second."""
        while self._times and self._times[0] <= now - 1.0:
            self._times.popleft()
        if len(self._times) >= LINES_PER_SECOND - reserved:
            return False
        self._times.append(now)
        return True
