# SPDX-License-Identifier: Apache-2.0
"""A name service that hangs, at each question of each command: the work is done without it, or refused in time.

SIGTERM ends a command at any of them.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import pytest

from tests import command, own_names
from tests.command import ONE, SERVICE, STRANGER, TWO, Guard, Result
from tests.own_names import HangingNames

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

TERMINATED = 143
FAILED = 1
UNKNOWN = 4

SHORT = """
from imds_guard.config import names
from imds_guard.kernel import name_service
names.ask.__defaults__ = name_service.user.__defaults__ = name_service.group.__defaults__ = (0.5,)
name_service.ID_WITHIN_S = 0.5
"""
"""So that the tests need not wait for ten seconds."""


class Case(NamedTuple):
    """A command, and the question that is not answered."""

    words: tuple[str, ...]
    hangs_on: str
    locked: bool
    """Whether a lock is in force when the question is asked."""
    status: int = 0
    """How the command ends, when no signal ends it."""
    config: str = ""
    """The lines of a lock in a configuration."""


NAME, LOCK = "held", ("--ip", SERVICE)
IN_FILE = f'users = ["{NAME}", "root"]'

CASES: dict[str, Case] = {
    # The ID of a name: nothing is changed without it.
    "start": Case(("start", "--user", NAME, *LOCK), NAME, False, FAILED),
    "start-group": Case(("start", "--group", NAME, "--create-group", *LOCK), NAME, False, FAILED),
    "start-deny": Case(("start", "--deny-user", NAME, *LOCK), NAME, False, FAILED),
    "start-file": Case(("start",), NAME, False, FAILED, IN_FILE),
    "check": Case(("check", "--user", NAME, *LOCK), NAME, False, FAILED),
    "export": Case(("export", "--format", "nftables", "--user", NAME, *LOCK), NAME, False, FAILED),
    "ip-lockdown": Case(("ip-lockdown", SERVICE, NAME), NAME, False, FAILED),
    "allow": Case(("allow", "--user", NAME), NAME, True, FAILED),
    "revoke": Case(("revoke", "--user", NAME), NAME, True, FAILED),
    "explain": Case(("explain", "--user", NAME, SERVICE), NAME, True, UNKNOWN),
    "explain-id": Case(("explain", "--user", str(TWO), SERVICE), f"#{TWO}", True, UNKNOWN),
    # Digits are an ID where nobody says that they are a name; a stored ID needs no name.
    "start-digits": Case(("start", "--user", str(ONE), *LOCK), str(ONE), False),
    "start-stored": Case(("start",), NAME, False, 0, f'users = [{{ name = "{NAME}", id = {ONE} }}]'),
    # Names that are shown are shown as numbers.
    "start-shows": Case(("start", "--user", str(ONE), *LOCK), f"#{ONE}", True),
    "start-shows-group": Case(("start", "--group", str(ONE), *LOCK), f"#{ONE}", True),
    "allow-shows": Case(("allow", "--user", str(TWO)), f"#{TWO}", True),
    "status": Case(("status",), f"#{ONE}", True),
    "status-json": Case(("status", "--json"), f"#{ONE}", True),
    "report": Case(("report",), f"#{STRANGER}", True),
    "watch": Case(("watch", "--once"), f"#{STRANGER}", True),
    # Boot and repair lock without the name, and ask with a deadline.
    "boot": Case(("start", "--boot"), NAME, True, 0, IN_FILE),
    "repair": Case(("verify", "--repair"), NAME, True, 0, IN_FILE),
}


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> HangingNames:
    return HangingNames(tmp_path_factory.mktemp("names"))


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def argv(guard: Guard, case: Case, hanging: HangingNames, folder: Path, before: str = "") -> tuple[str, ...]:
    """The command line for the cgroup of the sandbox. What must be there before is made."""
    name, *words = case.words
    if case.locked and name != "start":
        guard.start("--user", str(ONE), "--user", "root", *LOCK)
        assert guard.reach(STRANGER) == "EPERM"
    if case.config:
        file = folder / "config.toml"
        file.write_text(f'[lock.x]\nendpoints = ["{SERVICE}"]\n{case.config}\n', encoding="ascii")
        words += ["--config", str(file)]
    entry = "ip_lockdown" if name == "ip-lockdown" else "main"
    first = () if name == "ip-lockdown" else (name,)
    called = command.argv((*first, "--cgroup", guard.sandbox.cgroup, *words), entry=entry, before=before)
    return own_names.within(hanging.folder, called)


@pytest.mark.parametrize("name", CASES)
def test_the_command_ends_without_an_answer(guard: Guard, hanging: HangingNames, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    words = argv(guard, case, hanging, tmp_path, SHORT)
    done = command.run(words, hanging.environment(case.hangs_on))
    assert done.status == case.status, done
    if case.status:
        assert_refused(done)
    is_locked = case.locked or (not case.status and case.words[0] == "start")
    assert guard.reach(STRANGER) == ("EPERM" if is_locked else "connected")


def assert_refused(done: Result) -> None:
    """One sentence with the reason, and what to do."""
    assert done.sentence.startswith("the name service gave no answer about the "), done
    assert done.sentence.endswith("repair it (nsswitch.conf(5)), or give IDs in place of names"), done


@pytest.mark.parametrize("name", CASES)
def test_a_signal_ends_it(guard: Guard, hanging: HangingNames, tmp_path: Path, name: str) -> None:
    """Within a second, beside the time that Python takes to end on this machine."""
    case = CASES[name]
    began = time.monotonic()
    command.imds_guard_command("--version")
    limit_s = 1 + time.monotonic() - began
    words = argv(guard, case, hanging, tmp_path)
    with asked(hanging.fifo) as wait:
        environment = {**os.environ, **hanging.environment(case.hangs_on)}
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=command.TIMEOUT_S)
    assert time.monotonic() - began < limit_s
    assert process.returncode == (0 if case.words[0] == "watch" else TERMINATED), said
    assert guard.reach(STRANGER) == ("EPERM" if case.locked else "connected")


@contextmanager
def asked(fifo: Path) -> Iterator[Callable[[], None]]:
    """A function that returns when the question was asked."""
    fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)

        def wait() -> None:
            assert poll.poll(command.TIMEOUT_S * 1000), "the question was not asked"
            os.read(fd, 1)

        yield wait
    finally:
        os.close(fd)


def test_a_local_account_is_found_without_asking_anybody(guard: Guard, hanging: HangingNames) -> None:
    """The C library, too, looks into the files first, where nsswitch.conf says so."""
    words = guard.arguments("start", "--user", "daemon", "--group", "daemon", *LOCK)
    done = command.run(own_names.within(hanging.folder, command.argv(words)), hanging.environment())
    assert done.status == 0, done
    assert "user daemon (1), group daemon (1)" in done.stdout


def test_it_is_asked_once_when_it_does_not_answer(guard: Guard, hanging: HangingNames) -> None:
    """Twenty IDs without a name are shown as numbers in the time of one."""
    guard.start(*(word for number in range(20) for word in ("--user", str(ONE + number))), *LOCK)
    began = time.monotonic()
    words = own_names.within(hanging.folder, command.argv(guard.arguments("status")))
    done = command.run(words, hanging.environment())
    assert done.status == 0, done
    assert time.monotonic() - began < 5
    assert f"user {ONE}, user {ONE + 1}," in done.stdout
