# SPDX-License-Identifier: Apache-2.0
"""What the reader keeps of a caller that is gone."""

from __future__ import annotations

import os
import time

from imds_guard.watch import leader as reader
from imds_guard.watch.fold import Fold
from imds_guard.watch.process_info import NOTHING, Program
from tests.unit.test_events import RECORD


def gone() -> int:
    """The ID of a process that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_the_program_of_a_line_before_is_that_of_the_same_process_later() -> None:
    fold = Fold(b"", b"", 0.0, set())
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    ours = RECORD._replace(tgid=os.getpid(), time_ns=now)
    program = reader._program_of(ours, fold)
    assert program.exe is not None
    reborn = ours._replace(time_ns=0)  # as if the process had begun after it
    assert reader._program_of(reborn, fold) == program


def test_another_process_does_not_get_it() -> None:
    fold = Fold(b"", b"", 0.0, set())
    fold.memory = (1, Program("/bin/one"))
    assert reader._program_of(RECORD._replace(tgid=gone()), fold) == NOTHING


def test_a_packet_has_no_program() -> None:
    assert reader._program_of(RECORD._replace(tgid=0), Fold(b"", b"", 0.0, set())) == NOTHING


def test_signals_are_something_to_wait_for_and_are_given_back() -> None:
    import select
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with reader.Ended() as ended:
        assert not ended.now
        os.kill(os.getpid(), signal.SIGTERM)
        assert select.select([ended], [], [], 10)[0]
        assert ended.now
    assert signal.getsignal(signal.SIGTERM) is before
