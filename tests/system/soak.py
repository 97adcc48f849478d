# SPDX-License-Identifier: Apache-2.0
"""A user without privilege does all that hinders the commands, at once, while root works with them.

``sudo python3 -m tests.system.soak --seconds 600`` runs it alone; test_soak.py does so for half a minute. It fails when
a command takes too long or too much memory, ends by a signal or with a status that it must not have, or when a denied
connect gets through. A lock, its callers and its commands are in a sandbox: nothing of the machine is locked.

What the user does: holds a command line (hostile.py), has one of gigabytes, crowds of processes with escapes in their
names, denials by thousands of sub-IDs, denied connects all the time, and connections whose socket is locked from before
the right to it was revoked.
"""

from __future__ import annotations

import argparse
import functools
import os
import select
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from imds_guard.kernel.credentials import become
from tests import command, hostile
from tests.adversary.privileges import in_mapped_user_namespace
from tests.command import ONE, SERVICE, SERVICE_V6, Guard
from tests.kernel.guards import Storm

WITHIN_S = 10.0
MOST_BYTES = 200 << 20
STRANGER, HOLDER = hostile.USER, hostile.USER + 1
"""One is never allowed, the other now and then."""
FIRST_SUB_ID = 165_536
_HOLDERS = 4

CYCLE: tuple[tuple[str, ...], ...] = (
    ("status",),
    ("allow", "--user", str(HOLDER)),
    ("verify",),
    ("revoke", "--user", str(HOLDER)),
    ("report",),
    ("start", "--user", str(ONE), "--ip", SERVICE, "--ip", SERVICE_V6),
    ("check", "--user", str(ONE), "--ip", SERVICE),
    ("verify", "--repair"),
)
"""What root does, again and again."""


class Ran(NamedTuple):
    """A command that ended: its exit status and output, its time, and the largest RSS of it and its children."""

    words: tuple[str, ...]
    status: int
    output: str
    seconds: float
    rss: int

    @property
    def problem(self) -> str:
        """What is wrong with it; empty when nothing is."""
        if self.status != 0:
            return f"{' '.join(self.words)}: status {self.status}: {self.output}"
        if self.seconds > WITHIN_S:
            return f"{' '.join(self.words)}: {self.seconds:.1f} s"
        if self.rss > MOST_BYTES:
            return f"{' '.join(self.words)}: {self.rss >> 20} MiB"
        return f"{' '.join(self.words)}: a raw escape" if "\x1b" in self.output else ""


class Soaked(NamedTuple):
    """The commands that ran, what was wrong, and how many denied connects there were."""

    ran: list[Ran]
    problems: list[str]
    denied: int


def run(guard: Guard, words: tuple[str, ...]) -> Ran:
    """Runs a command and measures it."""
    before = time.monotonic()
    with tempfile.TemporaryFile() as output:
        status, rss = command.run_measured(command.argv(guard.arguments(*words)), output)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ran(words, status, text, time.monotonic() - before, rss)


# --- what the user does -----------------------------------------------------------------------------------------------


def fill_report() -> None:
    """Is denied as one sub-ID after the other."""
    for uid in range(1, 5000):
        become(fsuid=uid)
        with socket.socket() as one, suppress(OSError):
            one.connect((SERVICE, 80))


def fill_report_again_and_again() -> None:
    """Until this process is killed."""
    while True:
        in_mapped_user_namespace([f"0 {FIRST_SUB_ID} 65536"], fill_report)


def hold_connection(device: str, mount: str) -> None:
    """When the user may connect, keeps the connection and locks its socket, until this process is killed."""
    become(uids=(HOLDER,) * 3, gids=(HOLDER,) * 3, groups=())
    with socket.socket() as one:
        while one.connect_ex((SERVICE, 80)) != 0:
            select.select([], [], [], 0.05)
        hostile.lock_socket(one, device, mount)
        select.select([], [], [])


@contextmanager
def nuisances(guard: Guard, folder: Path) -> Iterator[list[Storm]]:
    """All of them at once. The storms count what gets through."""
    with ExitStack() as running:
        running.enter_context(hostile.hostile("long", "700"))
        running.enter_context(hostile.crowd(folder, 100, "\x1b[8m\x1b]0;own\x07"))
        running.enter_context(hostile.held_command_line(folder, comm="waagent"))
        guard.sandbox.spawn(fill_report_again_and_again)
        for number in range(_HOLDERS):
            (folder / str(number)).mkdir(mode=0o755)
            held = running.enter_context(hostile.fuse_device(folder / str(number)))
            guard.sandbox.spawn(functools.partial(hold_connection, *held))
        yield [Storm(guard.sandbox, STRANGER, address) for address in (SERVICE, SERVICE_V6)]


def soak(seconds: float) -> Soaked:
    """Works until the time is over, in whole cycles."""
    ran: list[Ran] = []
    with tempfile.TemporaryDirectory(prefix="imds-guard-test-") as path, command.guard() as guard:
        os.chmod(path, 0o755)
        guard.start("--user", str(ONE), "--ip", SERVICE, "--ip", SERVICE_V6)
        with nuisances(guard, Path(path)) as storms:
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                ran += [run(guard, words) for words in CYCLE]
            problems = [one.problem for one in ran if one.problem]
            counts = [storm.counts() for storm in storms]
        problems += [f"{through} denied connects got through" for through, _, _ in counts if through]
        return Soaked(ran, problems, sum(denied for _, denied, _ in counts))


def main(arguments: Sequence[str]) -> int:
    """The status is 1 when something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    done = soak(parser.parse_args(arguments).seconds)
    slowest, largest = max(one.seconds for one in done.ran), max(one.rss for one in done.ran) >> 20
    lines = [f"{len(done.ran)} commands, the slowest {slowest:.1f} s, the largest {largest} MiB, {done.denied} denials"]
    sys.stdout.write("\n".join([*lines, *(f"problem: {problem}" for problem in done.problems)]) + "\n")
    return 1 if done.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
