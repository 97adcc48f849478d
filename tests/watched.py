# SPDX-License-Identifier: Apache-2.0
"""Runs ``imds-guard watch`` as a process and reads its lines."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

from tests import schemas
from tests.command import Guard, argv

TIMEOUT_S = 60.0

Line = dict[str, Any]


class Watch:
    """A running watch, with or without ``--json``."""

    def __init__(self, process: subprocess.Popen[bytes], as_json: bool) -> None:
        self.process = process
        self._as_json = as_json
        self._text = b""
        self.seen: list[Line] = []
        self.errors = b""

    def _take(self, deadline: float) -> bool:
        """Reads more output. False at its end."""
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
        assert ready, f"nothing more came after {self.seen}"
        more = os.read(self.process.stdout.fileno(), 1 << 16)
        *lines, self._text = (self._text + more).split(b"\n")
        self.seen += [_event(line) if self._as_json else {"line": line.decode()} for line in lines]
        return bool(more)

    def until(self, test: Callable[[Line], bool], within_s: float = TIMEOUT_S) -> Line:
        """Waits for the first line that passes the test, and returns it."""
        deadline = time.monotonic() + within_s
        while True:
            for line in self.seen:
                if test(line):
                    return line
            assert self._take(deadline), f"it ended, having printed {self.seen}"

    def event(self, *events: str, **fields: Any) -> Line:
        """Waits for the first line about one of these events with these values."""
        return self.until(lambda line: line["event"] in events and all(line.get(k) == v for k, v in fields.items()))

    def counted(self, *events: str) -> int:
        """The sum of the counts in lines about these events."""
        return sum(line["count"] for line in self.seen if line["event"] in events)

    def until_counted(self, goal: int, *events: str) -> None:
        """Waits until the sum of the counts in lines about these events reaches the goal."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.counted(*events) < goal:
            assert self._take(deadline), f"it ended, having printed {self.seen}"

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal. Returns the exit status, after all lines were read into ``seen``."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Waits for its end. Returns the exit status."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._take(deadline):
            pass
        assert self.process.stderr is not None
        self.errors += self.process.stderr.read()
        return self.process.wait(TIMEOUT_S)


def _event(line: bytes) -> Line:
    """A line of JSON, which must be as the schema says."""
    found: Line = json.loads(line)
    schemas.check("watch", found)
    return found


@contextmanager
def watch(guard: Guard, *more: str, as_json: bool = True, environment: dict[str, str] | None = None) -> Iterator[Watch]:
    """Starts a watch. Kills it at the end of the block if it still runs."""
    arguments = argv(guard.arguments("watch", *(["--json"] if as_json else []), *more))
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    ) as process:
        try:
            yield Watch(process, as_json)
        finally:
            process.kill()
