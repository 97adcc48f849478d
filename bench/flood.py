# SPDX-License-Identifier: Apache-2.0
"""Measures what a flood of denials costs a watch, and checks that the watch accounts for each of them.

Run as root from the top of the tree: /usr/bin/python3 -m bench.flood. It runs in its own network namespace and child
cgroup.
"""

from __future__ import annotations

import ipaddress
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path[:0] = [str(SOURCE)]

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Endpoint, Identities, Lock, make_policy
from imds_guard.policy.ports import normal_ports

ADDRESS, PORT, UID, GID, ALLOWED = "169.254.169.254", 80, 61_001, 62_001, 61_002
DENIALS, WORKERS = 100_000, 2
STEADY_A_SECOND, STEADY_S, QUIET_S = 1_000, 20, 20
TARGET_PORTS = 50
"""Number of destination ports. The watch folds denials of the same port into one line."""
TICKS = os.sysconf("SC_CLK_TCK")

MAX_LINES, MAX_MEBIBYTES, MAX_CORE_SHARE = 100, 60, 0.05


@dataclass(frozen=True)
class Usage:
    """CPU seconds and peak memory in MiB of a process so far."""

    seconds: float
    mebibytes: float


def usage(pid: int) -> Usage:
    """Read from /proc: fields 14 and 15 of stat, VmHWM of status (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return Usage((int(fields[11]) + int(fields[12])) / TICKS, int(peak.split()[1]) / 1024)


class Watched:
    """A running ``imds-guard watch --json``, and its lines with the time of each."""

    def __init__(self, cgroup: str) -> None:
        code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from imds_guard.cli import main; main()"
        argv = [sys.executable, "-I", "-c", code, "watch", "--json", "--cgroup", cgroup]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE)
        self.lines: list[tuple[float, dict[str, Any]]] = []
        self._seen = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._seen:
                self.lines.append((time.monotonic(), json.loads(line)))
                self._seen.notify_all()

    def wait_for(self, event: str) -> None:
        """Waits for a line about this event."""
        with self._seen:
            if not self._seen.wait_for(lambda: any(line["event"] == event for _, line in self.lines), 30):
                raise SystemExit(f"bench: the watch did not print {event!r}")

    def end(self) -> None:
        """Ends the watch by SIGTERM, as a service manager does. All lines have been read when this returns."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        self._reader.join(30)
        if status:
            raise SystemExit(f"bench: the watch ended with {status}")


@contextmanager
def guarded() -> Iterator[Sandbox]:
    """A sandbox where the address is locked for all users but ALLOWED, who never connects."""
    ports = normal_ports([(PORT, PORT + TARGET_PORTS - 1)])
    lock = Lock("bench", (Endpoint(ipaddress.ip_network(ADDRESS), tcp=ports),), Identities(frozenset({ALLOWED})))
    with Sandbox((ADDRESS,)) as sandbox:
        backend = EbpfBackend(sandbox.cgroup)
        backend.apply(make_policy([lock]))
        try:
            yield sandbox
        finally:
            backend.remove()


def connect(times: int, a_second: int | None = None) -> int:
    """Connects, as fast as possible or evenly spaced. Returns the number of denials."""
    become(uids=(UID,) * 3, gids=(GID,) * 3, groups=())
    denied = 0
    begun = time.monotonic()
    with socket.socket() as one:
        for number in range(times):
            if a_second is not None:
                late = begun + number / a_second - time.monotonic()
                if late > 0:
                    time.sleep(late)
            try:
                one.connect((ADDRESS, PORT + number % TARGET_PORTS))
            except PermissionError:
                denied += 1
    return denied


def flood(sandbox: Sandbox) -> float:
    """Makes DENIALS denied connects from several processes. Returns the seconds that it took."""
    reader, writer = os.pipe()
    begun = time.monotonic()
    for _ in range(WORKERS):
        sandbox.spawn(lambda: os.write(writer, b"%d\n" % connect(DENIALS // WORKERS)))
    os.close(writer)
    with os.fdopen(reader) as pipe:
        denied = [int(line) for line in pipe]
    assert sum(denied) == DENIALS, denied
    return time.monotonic() - begun


def share_while(watched: Watched, seconds: float) -> float:
    """The share of a core that the watch uses while nothing connects."""
    before, begun = usage(watched.process.pid).seconds, time.monotonic()
    select.select([], [], [], seconds)
    return (usage(watched.process.pid).seconds - before) / (time.monotonic() - begun)


def steady_share(sandbox: Sandbox, watched: Watched) -> float:
    """The share of a core that the watch uses at STEADY_A_SECOND denials per second."""
    before, begun = usage(watched.process.pid).seconds, time.monotonic()
    denied = sandbox.call(lambda: connect(STEADY_A_SECOND * STEADY_S, STEADY_A_SECOND), timeout_s=STEADY_S * 3)
    assert denied == STEADY_A_SECOND * STEADY_S
    return (usage(watched.process.pid).seconds - before) / (time.monotonic() - begun)


def reported(watched: Watched) -> dict[str, int]:
    """The numbers of denials that the watch reports as ``denied``, ``left-out`` and ``lost``."""
    sums: dict[str, int] = {"denied": 0, "left-out": 0, "lost": 0}
    for _, line in watched.lines:
        if line["event"] in sums:
            sums[line["event"]] += line["count"]
    return sums


def counted_in_the_kernel(sandbox: Sandbox) -> int:
    """The number of denials that the hooks counted."""
    return sum(enforced for enforced, _ in EbpfBackend(sandbox.cgroup).state().counters)


def max_lines_in_a_second(stamps: list[float]) -> int:
    """The maximum number of lines within any second."""
    best = first = 0
    for last, stamp in enumerate(stamps):
        while stamps[first] <= stamp - 1.0:
            first += 1
        best = max(best, last - first + 1)
    return best


class Verdict:
    """Prints numbers with their budgets. ``over`` says whether any number was above its budget."""

    def __init__(self) -> None:
        self.over = False

    def line(self, name: str, value: float, maximum: float, unit: str = "") -> None:
        """Prints one number."""
        self.over = self.over or value > maximum
        print(f"{name:58} {value:10.2f}{unit}   (max {maximum:g}{unit})", flush=True)


def main() -> int:
    """Prints the results. Returns 1 when a number is above its budget."""
    if os.geteuid() != 0:
        print("bench: run this as root", file=sys.stderr)
        return 77
    verdict = Verdict()
    with guarded() as sandbox:
        watched = Watched(sandbox.cgroup)
        try:
            watched.wait_for("began")
            before = usage(watched.process.pid)
            seconds = flood(sandbox)
            spent = usage(watched.process.pid).seconds - before.seconds
            print(f"{DENIALS} denials in {seconds:.1f} s; the watch used {spent:.2f} s of CPU in that time")
            after = share_while(watched, QUIET_S)
            steady = steady_share(sandbox, watched)
            peak = usage(watched.process.pid).mebibytes
        finally:
            watched.end()
        counted, sums = counted_in_the_kernel(sandbox), reported(watched)
    print(f"{len(watched.lines)} lines; denials that the kernel counted: {counted}, that the watch reported: {sums}")
    verdict.line("denials that the watch does not account for", abs(counted - sum(sums.values())), 0)
    verdict.line("lines within any second", max_lines_in_a_second([at for at, _ in watched.lines]), MAX_LINES)
    verdict.line(f"of a core, {QUIET_S} s after the flood", 100 * after, 100 * MAX_CORE_SHARE, " %")
    verdict.line(f"of a core, at {STEADY_A_SECOND} denials a second", 100 * steady, 100 * MAX_CORE_SHARE, " %")
    verdict.line("peak of the watch's memory", peak, MAX_MEBIBYTES, " MiB")
    return int(verdict.over)


if __name__ == "__main__":
    sys.exit(main())
