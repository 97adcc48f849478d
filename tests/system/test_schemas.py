# SPDX-License-Identifier: Apache-2.0
"""What each command prints with --json is as its schema says: a new key without a schema fails here.

All other tests that read JSON check it by the same schemas (tests/command.py, tests/watched.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import command, schemas
from tests.command import NEIGHBOUR, ONE, SERVICE, SERVICE_V6, STAFF, STRANGER, TWO, Guard, Result, imds_guard_command
from tests.system.test_verify import unpin_map
from tests.tools import missing
from tests.unit.test_schemas import COMMANDS
from tests.watched import watch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

LOCK = ("--user", str(ONE), "--group", str(STAFF), "--ip", SERVICE, "--ip", SERVICE_V6)
FILE = f"""
strict = true

[lock.default]
endpoints = ["{SERVICE}:80"]
users = [{ONE}]

[lock.second]
endpoints = ["{NEIGHBOUR}"]
deny_users = [{TWO}]

[filter.region]
locks = ["default"]
users = [{STRANGER}]
allow = ["GET /latest/**"]
"""


@pytest.fixture(autouse=True)
def _jsonschema() -> None:
    if not schemas.INSTALLED:
        missing("jsonschema is not installed")


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def answers(done: Result, status: int = 0) -> Result:
    """Checks the output, which must be an answer and no error."""
    assert done.status == status, done
    assert done.command, done
    assert done.values.keys() != {"schema", "error"}
    return done


def test_every_command(guard: Guard) -> None:
    """Each command with --json; ``watch`` prints lines."""
    tried: list[str] = []

    def answer(name: str, *more: str, status: int = 0) -> Result:
        tried.append(name)
        return answers(guard(name, "--json", *more), status)

    answer("check", *LOCK)
    answer("status", status=3)
    answer("start", *LOCK, "--dry-run")
    answer("start", *LOCK)
    with watch(guard) as events:
        events.event("began")
        assert guard.reach(STRANGER) == "EPERM"
        events.event("denied")
        tried.append("watch")
    answer("allow", "--user", str(TWO), "--ip", SERVICE)
    answer("revoke", "--user", str(TWO), "--ip", SERVICE)
    answer("mode", "audit")
    assert guard.reach(STRANGER, SERVICE_V6) == "connected"
    answer("report")
    answer("explain", "--user", "root", SERVICE)
    answer("status")
    answer("verify")
    tried += [name for name in ("endpoints", "demo") if answers(imds_guard_command(name, "--json"))]
    assert set(tried) == COMMANDS


def test_a_policy_with_everything(guard: Guard, tmp_path: Path) -> None:
    """Filters, deny lists, several locks: as check, start, status and explain print them."""
    file = tmp_path / "config.toml"
    file.write_text(FILE, encoding="utf-8")
    answers(guard("check", "--json", "--config", str(file)))
    guard.start(*LOCK)
    changed = answers(guard("start", "--json", "--config", str(file))).values["difference"]
    assert all(changed[key] for key in ("locked", "unlocked", "lists", "settings", "filters"))
    assert guard.status()["policy"]["filters"]
    answers(guard("explain", "--json", "--pid", str(os.getpid()), f"{SERVICE}:80"), status=1)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_an_error_of_every_command(name: str) -> None:
    """The command line is wrong, so the command does nothing."""
    failed = imds_guard_command(name, "--json", "--no-such-option")
    assert (failed.status, failed.stderr) == (2, "")
    assert failed.values["error"]["status"] == failed.status


def test_a_boot_with_a_bad_file_is_one_object(guard: Guard, tmp_path: Path) -> None:
    """The emergency lock is on, and the file is wrong: both are in the same object."""
    file = tmp_path / "config.toml"
    file.write_text("[lock.default\n", encoding="utf-8")
    started = guard("start", "--boot", "--json", "--config", str(file))
    assert started.status == started.values["error"]["status"] == 78
    assert started.values["policy"]["locks"]


def test_a_repair_that_fails_is_one_object(guard: Guard, tmp_path: Path) -> None:
    """The state is known all the same."""
    file = tmp_path / "config.toml"
    file.write_text('on_error = "open"\n[lock.default]\n', encoding="utf-8")
    guard.start(*LOCK)
    unpin_map(guard)
    left = guard("verify", "--repair", "--json", "--config", str(file))
    assert (left.values["state"], left.stderr) == ("degraded", "")
    assert left.values["error"]["status"] == left.status == 1


def test_nothing_to_take_back(guard: Guard) -> None:
    guard.start(*LOCK)
    answers(guard("revoke", "--json", "--timer", "imds-guard-for-nothing"))
