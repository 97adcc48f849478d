# SPDX-License-Identifier: Apache-2.0
"""A caller that connects in a loop and counts the outcomes: a denied caller must never connect."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from types import TracebackType

from vagrant.guest.world import IPV4, IPV6, PATIENCE_S

_LOOP = """
import errno, json, os, signal, socket, sys
os.nice(10)  # leave the processor to the commands under test
counts, going = {}, True
def end(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, end)
print("begun", flush=True)
while going:
    for address in sys.argv[1:]:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
            one.settimeout(20)
            try:
                one.connect((address, 80))
                outcome = "connected"
            except OSError as error:
                outcome = errno.errorcode.get(error.errno, repr(error))
        counts[outcome] = counts.get(outcome, 0) + 1
print(json.dumps(counts), flush=True)
"""


class Storm:
    """Runs during the ``with`` block. ``outcomes`` are set at its end."""

    def __init__(self, uid: int) -> None:
        self._uid = uid
        self.outcomes: dict[str, int] = {}

    def __enter__(self) -> Storm:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LOOP, IPV4, IPV6],
            user=self._uid,
            group=self._uid + 1,
            extra_groups=(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            said, _ = self._process.communicate(timeout=PATIENCE_S)
        finally:
            self._process.kill()
        self.outcomes = json.loads(said)
