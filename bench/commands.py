# SPDX-License-Identifier: Apache-2.0
"""Measures the time and memory of commands, in a cgroup of its own.

Run as root from the top of the tree: /usr/bin/python3 -m bench.commands.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path[:0] = [str(SOURCE)]

from imds_guard.backends.ebpf import compiled
from imds_guard.kernel.sandbox import Sandbox

ROUNDS = 5


@dataclass(frozen=True)
class Budget:
    """The maximum for a command: seconds, and peak memory in MiB."""

    seconds: float
    mebibytes: float = 200


def _run(arguments: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak memory in MiB of one run of imds-guard."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from imds_guard.cli import main; main()"
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execv(sys.executable, [sys.executable, "-I", "-c", code, *arguments])  # noqa: S606
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"bench: imds-guard {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - begun, usage.ru_maxrss / 1024


def _line(name: str, runs: list[tuple[float, float]], budget: Budget) -> bool:
    """Prints the median time and the maximum memory. Returns whether both are within the budget."""
    seconds, mebibytes = statistics.median(r[0] for r in runs), max(r[1] for r in runs)
    print(
        f"{name:34} {seconds:6.3f} s {mebibytes:5.0f} MiB   ({budget.seconds:g} s, {budget.mebibytes:g} MiB)",
        flush=True,
    )
    return seconds <= budget.seconds and mebibytes <= budget.mebibytes


def main() -> int:
    """Prints one line per command. Returns 1 when one is above its budget."""
    if os.geteuid() != 0:
        print("bench: run this as root", file=sys.stderr)
        return 77
    within = []
    with Sandbox() as sandbox, tempfile.NamedTemporaryFile("w", suffix=".toml") as many:
        here = ["--cgroup", sandbox.cgroup]
        users = ", ".join(str(uid) for uid in range(10**6, 10**6 + 100_000))
        many.write(f'[lock.many]\npreset = "default"\nusers = [{users}]\n')
        many.flush()
        try:
            cold = []
            for _ in range(ROUNDS):
                compiled.FOLDER.remove()
                cold.append(_run(["start", "--user", "1", *here]))
                _run(["stop", *here])
            within.append(_line("start, cold", cold, Budget(2)))
            cached = []
            for _ in range(ROUNDS):
                cached.append(_run(["start", "--user", "1", *here]))
                _run(["stop", *here])
            within.append(_line("start, from the cache", cached, Budget(1, 60)))
            _run(["start", "--user", "1", *here])
            pairs = [
                (_run(["allow", "--user", "2", *here]), _run(["revoke", "--user", "2", *here])) for _ in range(ROUNDS)
            ]
            within.append(_line("allow", [p[0] for p in pairs], Budget(0.3)))
            within.append(_line("revoke", [p[1] for p in pairs], Budget(0.3)))
            changed = [_run(["start", "--user", str(10 + n), *here]) for n in range(ROUNDS)]
            within.append(_line("start, another policy", changed, Budget(0.3)))
            within.append(_line("start, 100,000 users", [_run(["start", "--config", many.name, *here])], Budget(2)))
        finally:
            _run(["stop", *here])
    print(f"peak memory of all commands: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB")
    return int(not all(within))


if __name__ == "__main__":
    sys.exit(main())
