# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT as a file descriptor for poll(2)."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class StopSignal:
    """A context manager that catches both signals. It restores the handlers from before at the end."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_wakeup_fd = signal.set_wakeup_fd(self._writer)
        self._old_handlers: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup_fd)
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        """Readable once a signal was received."""
        return self._reader
