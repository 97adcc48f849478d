# SPDX-License-Identifier: Apache-2.0
"""``start``, ``check`` and ``watch`` next to processes that do what they can to hang, fill and deceive them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from imds_guard.kernel.namespaces import INITIAL_PID_NAMESPACE, namespace_inode
from tests import command
from tests.command import ONE, SERVICE, TIMEOUT_S, Guard
from tests.hostile import USER, crowd, held_command_line, hostile
from tests.watched import watch

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root"),
    pytest.mark.skipif(namespace_inode("pid") != INITIAL_PID_NAMESPACE, reason="in a container every caller is denied"),
]

WITHIN_S = 15.0
"""A start takes 2 s where nobody hinders it, a command line that hangs one second."""
MOST_BYTES = 200 << 20
"""The compiler alone takes 150 MB."""
ESCAPES = "\x1b[8m\x1b]0;own\x07"


class Ran(NamedTuple):
    """A command that ended: its exit status, its output, its time, and the largest RSS of it and its children."""

    status: int
    output: str
    seconds: float
    rss: int


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="imds-guard-test-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


@pytest.fixture
def held(folder: Path) -> Iterator[int]:
    """All of them at once: the ID of the process whose command line hangs."""
    with ExitStack() as running:
        running.enter_context(hostile("long", "1500"))
        running.enter_context(crowd(folder, 300, ESCAPES))
        yield running.enter_context(held_command_line(folder, comm="waagent"))


def measured(guard: Guard, *arguments: str) -> Ran:
    """Runs a command, and measures it."""
    before = time.monotonic()
    with tempfile.TemporaryFile() as output:
        status, rss = command.run_measured(command.argv(guard.arguments(*arguments)), output)
        output.seek(0)
        text = output.read().decode()
    return Ran(status, text, time.monotonic() - before, rss)


@pytest.mark.parametrize("name", ["start", "check"])
def test_a_command_goes_on_and_says_in_a_few_lines_what_it_saw(name: str, guard: Guard, held: int) -> None:
    ran = measured(guard, name, "--nobody")
    assert (ran.status, ran.seconds < WITHIN_S, ran.rss < MOST_BYTES) == (0, True, True), ran
    assert "\x1b" not in ran.output
    assert len(ran.output.splitlines()) < 60, ran.output
    flat = " ".join(ran.output.split())
    assert f"and 299 more, user {USER}) is shut out" in flat
    assert f"waagent (pid {held}, user {USER}) is shut out" in flat
    assert f"could not be read in time (pid {held}" in flat


def test_watch_goes_on_and_prints_the_denial_without_the_command_line(guard: Guard, folder: Path) -> None:
    """It waits for no process for long: a denial that comes later is printed, too."""
    guard.start("--user", str(ONE), "--ip", SERVICE)
    reader, writer = os.pipe()

    def hold() -> None:
        with held_command_line(folder, comm="held", connect_to=SERVICE) as pid:
            os.write(writer, f"{pid}\n".encode())
            os.read(os.pipe()[0], 1)

    guard.sandbox.spawn(hold)
    with open(reader, encoding="ascii") as line:
        pid = int(line.readline())
    os.close(writer)
    with watch(guard) as one:
        held = one.event("denied", pid=pid)
        assert (held["uid"], held["comm"], held["cmdline"]) == (USER, "held", None)
        assert held["exe"] == os.path.realpath("/usr/bin/python3")
        assert guard.reach(USER + 1) == "EPERM"
        one.until(lambda line: line.get("uid") == USER + 1, within_s=TIMEOUT_S / 6)
