# SPDX-License-Identifier: Apache-2.0
"""The program in an event, when the caller may have ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from imds_guard.watch.describe import program_for
from imds_guard.watch.fold import Fold
from imds_guard.watch.process_info import UNKNOWN, ProcessInfo, Programs
from tests.unit.test_process_info import ended_process
from tests.unit.test_record import RECORD


@pytest.fixture
def programs() -> Iterator[Programs]:
    one = Programs()
    yield one
    one.close()


def new_fold() -> Fold:
    return Fold(b"", b"", 0.0, set())


def test_an_ended_caller_keeps_the_program_of_its_earlier_event(programs: Programs) -> None:
    fold = new_fold()
    ours = RECORD._replace(tgid=os.getpid(), time_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    program = program_for(ours, fold, programs)
    assert program.exe is not None
    seems_to_start_later = ours._replace(time_ns=0)
    assert program_for(seems_to_start_later, fold, programs) == program


def test_another_process_does_not_get_it(programs: Programs) -> None:
    fold = new_fold()
    fold.note = (1, ProcessInfo("/bin/one"))
    assert program_for(RECORD._replace(tgid=ended_process()), fold, programs) == UNKNOWN


def test_a_packet_has_no_program(programs: Programs) -> None:
    assert program_for(RECORD._replace(tgid=0), new_fold(), programs) == UNKNOWN
