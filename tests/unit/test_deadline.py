# SPDX-License-Identifier: Apache-2.0
"""A deadline that a signal brings."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest

from imds_guard.kernel.deadline import Deadline, within


def test_no_handler_of_errors_takes_it_for_one_of_its_own() -> None:
    with pytest.raises(Deadline), within(0.01), suppress(Exception):
        signal.pause()


def test_a_block_that_ends_in_time_leaves_no_alarm_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with within(60):
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before
