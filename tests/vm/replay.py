# SPDX-License-Identifier: Apache-2.0
"""Runs that were recorded, and are repeated with another instruction in the program."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_uint32

from tests.vm.library import buffer
from tests.vm.structs import COVERED_WORDS, OutcomeC, ReplayC

_OUTCOME = ctypes.sizeof(OutcomeC)


class Replays:
    """Runs with their outcomes, on the maps and tasks as they are. Machine.replays() makes them."""

    def __init__(self, library: ctypes.CDLL, machine: object, runs: Sequence[ReplayC], data: bytes) -> None:
        self._library, self._m, self._data, self.count = library, machine, data, len(runs)
        self._runs = (ReplayC * self.count)(*runs)
        self._covered = (c_uint32 * (COVERED_WORDS * self.count))()
        self._outcomes, self._got = buffer(_OUTCOME * self.count), buffer(_OUTCOME)
        library.vm_replay_record(machine, self._runs, self.count, data, self._outcomes, self._covered)

    def outcome(self, number: int) -> bytes:
        """The struct outcome of one run, as it was recorded."""
        return bytes(self._outcomes[number * _OUTCOME : (number + 1) * _OUTCOME])

    @property
    def covered(self) -> int:
        """One bit for each instruction: some run has executed it."""
        whole, size = bytes(self._covered), 4 * COVERED_WORDS
        found = 0
        for at in range(0, len(whole), size):
            found |= int.from_bytes(whole[at : at + size], "little")
        return found

    def difference(self, at: int, begin: int = 0) -> tuple[int, bytes] | None:
        """The first run, from ``begin`` on, that executed instruction ``at`` and ends otherwise now."""
        found = self._library.vm_replay_differs(
            self._m, self._runs, self.count, self._data, self._outcomes, self._covered, at, begin, self._got
        )
        return None if found == self.count else (int(found), bytes(self._got))
