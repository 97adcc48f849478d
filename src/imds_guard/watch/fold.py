# SPDX-License-Identifier: Apache-2.0
"""Floods made small: records that are alike become one line and a count, and lines come at a bounded rate.

Nothing is forgotten: what is added comes out again in a ``Fold`` or in a number of what had no room. Pure; the caller
brings the time.
"""

from __future__ import annotations

from collections import deque
from typing import Callable

WINDOW_S = 10.0
"""The first record of its kind comes out at once; those alike after so many seconds, as one."""
KINDS = 4096
PROCESSES = 1000
"""Of a kind's processes so many are told apart."""


class Fold:
    """Records that are alike, and have not come out yet."""

    def __init__(self, key: bytes, record: bytes, due: float, processes: set[bytes]) -> None:
        self.key = key
        self.first = self.last = record
        self.due = due
        self.count = 1
        self.processes = processes
        self.memory: object = None
        """Whatever the caller wants to know again when the fold comes out the next time."""


class Folding:
    """Takes records, gives folds. ``key`` says which records are alike, ``process`` which process one is of."""

    def __init__(self, key: Callable[[bytes], bytes], process: Callable[[bytes], bytes]) -> None:
        self._key = key
        self._process = process
        self._open: dict[bytes, Fold] = {}  # in the order in which they fall due
        self._new: dict[bytes, Fold] = {}
        self.crowded_out = 0
        """Records of a kind that there was no room for."""

    def add(self, record: bytes, now: float) -> None:
        """Takes one record."""
        key = self._key(record)
        fold = self._open.get(key)
        if fold is not None:
            self._join(fold, record)
        elif len(self._open) >= KINDS:
            self.crowded_out += 1
        else:
            fold = Fold(key, record, now + WINDOW_S, {self._process(record)})
            self._open[key] = self._new[key] = fold

    def _join(self, fold: Fold, record: bytes) -> None:
        if not fold.count:
            fold.first = record
        fold.last = record
        fold.count += 1
        if len(fold.processes) < PROCESSES:
            fold.processes.add(self._process(record))

    def fresh(self) -> list[Fold]:
        """The kinds that were first seen since the last call, with what came of them so far."""
        found = list(self._new.values())
        self._new.clear()
        return found

    def came_out(self, fold: Fold) -> None:
        """What the fold held was told; what comes now is told when it falls due."""
        fold.count = 0
        fold.processes.clear()

    def due(self, now: float) -> list[Fold]:
        """Folds whose window is over and which hold something. A kind of which nothing came is forgotten."""
        found: list[Fold] = []
        for fold in list(self._open.values()):
            if fold.due > now:
                break
            del self._open[fold.key]
            if fold.count:
                found.append(fold)
        return found

    def again(self, fold: Fold, now: float) -> None:
        """Begins another window for a kind that was told: it may go on."""
        self.came_out(fold)
        fold.due = now + WINDOW_S
        self._open[fold.key] = fold

    def rest(self) -> list[Fold]:
        """Everything that has not come out, at the end."""
        found = [fold for fold in self._open.values() if fold.count]
        self._open.clear()
        self._new.clear()
        return found

    def next_due(self) -> float:
        """When due() has something to do next; infinity when nothing is held."""
        first = next(iter(self._open.values()), None)
        return float("inf") if first is None else first.due


LINES_A_SECOND = 100


class Rate:
    """At most ``LINES_A_SECOND`` lines within any second. ``spared`` of them are kept for others."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def take(self, now: float, spared: int = 0) -> bool:
        """True when one more line may go out now."""
        while self._times and self._times[0] <= now - 1.0:
            self._times.popleft()
        if len(self._times) >= LINES_A_SECOND - spared:
            return False
        self._times.append(now)
        return True
