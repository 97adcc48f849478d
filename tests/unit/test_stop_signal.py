# SPDX-License-Identifier: Apache-2.0
"""Signals as a file descriptor."""

from __future__ import annotations

import os
import select
import signal

from imds_guard.watch.stop_signal import StopSignal


def test_a_signal_makes_it_readable_and_the_handler_from_before_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert select.select([stop], [], [], 10)[0]
        assert stop.received
    assert signal.getsignal(signal.SIGTERM) is before
