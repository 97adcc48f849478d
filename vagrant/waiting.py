# SPDX-License-Identifier: Apache-2.0
"""Waiting in a guest under systemd. What units and containers do is told in its journal."""

from __future__ import annotations

import os
import select
import subprocess
import time
from typing import Callable

LOOK_AGAIN_S = 1.0
"""For what is not told in the journal, such as a port that a program of a container listens on."""


def wait_until(condition: Callable[[], bool], why: Callable[[], str], within_s: float) -> None:
    """Looks at the condition again when the journal has a new line. Fails with ``why()`` after ``within_s``."""
    if condition():
        return
    deadline = time.monotonic() + within_s
    argv = ["journalctl", "--follow", "--lines=0", "--output=cat"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as journal:
        assert journal.stdout is not None
        try:
            while not condition():
                assert time.monotonic() < deadline, why()
                if select.select([journal.stdout], [], [], LOOK_AGAIN_S)[0]:
                    assert os.read(journal.stdout.fileno(), 1 << 16), "journalctl has ended"
        finally:
            journal.kill()
