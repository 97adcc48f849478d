# SPDX-License-Identifier: Apache-2.0
"""A deadline for work that is done in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Deadline(BaseException):
    """The time is over. No handler of errors may take it for one of its own, so it is no Exception."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Deadline in the block when the time is over, by SIGALRM: so also in a system call that waits.

    In a thread other than the first there is no deadline, since only the first one gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _on_alarm(_number: int, _frame: object) -> NoReturn:
    raise Deadline
