# SPDX-License-Identifier: Apache-2.0
"""The output of the commands: JSON for scripts, text for terminals of 80 columns."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imds_guard.kernel import bpf
from tests import command
from tests.command import ONE, SERVICE, TWO, Guard
from tests.kernel.guards import load_stranger

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

MANY = tuple(word for uid in range(41_000, 41_100) for word in ("--user", str(uid)))


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


# --- JSON -----------------------------------------------------------------------------------------------------------


@needs_root
def test_every_json_parses_and_has_its_keys(guard: Guard) -> None:
    """Scripts read these keys: one that is removed or renamed breaks them."""
    started = guard("start", "--json", "--user", str(ONE), "--group", "root", "--ip", SERVICE)
    assert set(started.values) == {
        *("backend", "policy", "done", "warnings", "shut_out", "not_inspected", "connections"),
        *("schema", "difference", "dry_run"),
    }
    assert set(started.values["difference"]) == {
        *("locked", "unlocked", "lists", "others", "settings", "filters", "many_groups", "locks_less"),
    }
    status = guard("status", "--json").values
    assert set(status) == {
        *("schema", "state", "backend", "emergency", "faults", "known", "policy", "ebpf", "temporary", "notes"),
        *("since", "guards", "boot", "file"),
    }
    assert set(status["ebpf"]) == {
        *("cgroup", "cgroup_is_root", "pins", "generation", "versions", "hooks", "other_programs", "counters"),
    }
    assert [hook["hook"] for hook in status["ebpf"]["hooks"]] == ["connect4", "connect6", "sendmsg4", "sendmsg6"]
    assert set(status["policy"]) == {"mode", "containers", "strict", "locks", "filters", "filter_user"}
    (lock,) = status["policy"]["locks"]
    assert set(lock) == {"name", "endpoints", "allow", "deny", "default"}
    assert lock["allow"] == {"users": [{"id": ONE, "name": str(ONE)}], "groups": [{"id": 0, "name": "root"}]}
    allowed = guard("allow", "--json", "--user", str(TWO)).values
    assert set(allowed) == set(started.values)
    explained = guard("explain", "--json", "--user", "root", SERVICE).values
    assert set(explained) == {
        *(
            "schema",
            "allowed",
            "reason",
            "lock",
            "matched",
            "caller",
            "container",
            "forwarded",
            "destination",
            "neighbours",
            "filter",
            "would_allow",
            "new_process",
        ),
    }
    assert explained["matched"] == {"kind": "group", "id": 0}
    checked = guard("check", "--json").values
    assert set(checked) == {"schema", "backends", "configuration", "taken", "shut_out", "not_inspected", "connections"}
    assert checked["backends"] == [{"name": "ebpf", "works": True, "reason": None}]
    guard("stop")
    status = guard("status", "--json").values
    assert set(status.pop("file")) == {"path", "exists", "error", "line", "in_force"}
    assert (status.pop("since"), set(status.pop("boot"))) == (None, {"unit"})
    assert not [one for one in status.pop("guards") if one["cgroup"] == guard.sandbox.cgroup]
    assert status | {"ebpf": None} == {
        "schema": 1,
        "state": "inactive",
        "backend": None,
        "emergency": False,
        "faults": [],
        "known": [],
        "policy": None,
        "ebpf": None,
        "temporary": [],
        "notes": [],
    }


def test_endpoints_as_json() -> None:
    rows = json.loads(command.imds_guard_command("endpoints", "--json").answer)["endpoints"]
    keys = {"address", "endpoint", "protocol", "presets", "default", "locked_by_default_here", "services", "note"}
    assert all(set(row) == keys for row in rows)
    assert all(service["source"] for row in rows for service in row["services"])
    (aws,) = (row for row in rows if row["address"] == "169.254.169.254")
    assert aws["locked_by_default_here"] is True


@needs_root
def test_the_demonstration_as_json() -> None:
    shown = command.imds_guard_command("demo", "--json").values
    assert set(shown) == {"schema", "backend", "as_decided", "rows"}
    assert shown["as_decided"] is True
    assert all(set(row) == {"caller", "address", "before", "after", "why"} for row in shown["rows"])


def test_a_reader_may_stop_reading() -> None:
    """``imds-guard endpoints | head -1`` prints no error, and is none."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command.argv(("endpoints",)), stdout=writer, stderr=subprocess.PIPE, timeout=command.TIMEOUT_S, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# --- 80 columns -----------------------------------------------------------------------------------------------------

COLUMNS = 80

_URL = re.compile(r"https?://\S+")


def too_long(text: str, guard: Guard) -> list[str]:
    """The lines of more than 80 columns. The path of the test's cgroup is longer than usual and does not count."""
    shown = text.replace(guard.sandbox.cgroup, "/sys/fs/cgroup/unified/web.slice")
    return [line for line in shown.splitlines() if len(line) > COLUMNS and not _URL.search(line)]


@needs_root
def test_text_fits_a_terminal(guard: Guard) -> None:
    """With long lists, many locks and other tools' programs at the hooks."""
    ips = tuple(word for n in range(1, 30) for word in ("--ip", f"10.200.{n}.0/24:8000-8100+9000,tcp"))
    shown = [
        guard("start", *MANY, "--ip", SERVICE, "--deny-user", "7", *ips).answer,
        guard("start", *MANY, "--ip", SERVICE, *ips).answer,
        guard("allow", "--user", str(TWO + 5000), "--ip", "10.200.7.0/24:8000-8100+9000,tcp").answer,
        guard("status").answer,
        guard("explain", "--user", "root", f"{SERVICE}:80").stdout,
        guard("check").answer,
    ]
    with strangers(guard, 12):
        degraded = guard("status", "-v")
    assert degraded.status == 1
    assert degraded.stdout.count("somebody_else") >= 24
    assert [line for text in (*shown, degraded.stdout) for line in too_long(text, guard)] == []
    assert guard("stop").stdout.startswith("removed ")


@contextmanager
def strangers(guard: Guard, count: int) -> Iterator[None]:
    """Attaches programs of another tool behind ours; they let everything through."""
    with contextlib.ExitStack() as fds:

        def kept(fd: int) -> int:
            fds.callback(os.close, fd)
            return fd

        cgroup = kept(os.open(guard.sandbox.cgroup, os.O_RDONLY))
        program = kept(load_stranger(bpf.AttachType.CGROUP_INET4_CONNECT))
        for _ in range(count):
            kept(bpf.link_create(program, cgroup, bpf.AttachType.CGROUP_INET4_CONNECT))
        yield


def test_the_built_in_table_fits_a_terminal_but_for_long_urls() -> None:
    lines = command.imds_guard_command("endpoints").answer.splitlines()
    assert [line for line in lines if len(line) > COLUMNS and not line.strip().startswith("https://")] == []


@pytest.mark.parametrize(
    "name", ["", "start", "stop", "status", "allow", "revoke", "mode", "check", "explain", "endpoints"]
)
def test_help(name: str) -> None:
    """--help and -h print the same, in 80 columns."""
    words = (name,) if name else ()
    shown = command.imds_guard_command(*words, "--help")
    assert shown.answer.startswith("Usage: imds-guard " + name)
    assert [line for line in shown.stdout.splitlines() if len(line) > COLUMNS] == []
    assert command.imds_guard_command(*words, "-h") == shown


def test_version() -> None:
    from imds_guard import __version__

    assert command.imds_guard_command("--version").answer == f"imds-guard, version {__version__}\n"


# --- names ----------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize(
    "name", ["two words", 'a "quoted" one', "back\\slash", "it's", "$(reboot)", "Zürich", "-rf", "[x]", "#"]
)
def test_a_name_that_needs_quoting(guard: Guard, tmp_path: Path, name: str) -> None:
    """It goes unchanged through the file, the kernel, the file again and JSON."""
    file = tmp_path / "config.toml"
    file.write_text(f'[lock.{json.dumps(name)}]\nendpoints = ["{SERVICE}"]\nusers = [{ONE}]\n', encoding="utf-8")
    guard.start("--config", str(file))
    assert [lock["name"] for lock in guard.status()["policy"]["locks"]] == [name]
    assert f"\nlock {name}\n" in guard("status").answer
    assert guard("explain", "--json", "--user", "root", SERVICE).values["lock"] == name
    guard("allow", "--user", str(TWO), "--save", "--without-root", "--config", str(file))
    guard("stop")
    guard.start("--config", str(file))
    (lock,) = guard.status()["policy"]["locks"]
    assert (lock["name"], [user["id"] for user in lock["allow"]["users"]]) == (name, [ONE, TWO])


@needs_root
def test_a_terminal_without_unicode(guard: Guard, tmp_path: Path) -> None:
    """With LC_ALL=C, as in a cron job, a character that can't be shown does not end the command."""
    file = tmp_path / "config.toml"
    file.write_text(f'[lock."Zürich"]\nendpoints = ["{SERVICE}"]\nusers = [{ONE}]\n', encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONIOENCODING": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    started = command.run(command.argv(guard.arguments("start", "--config", str(file)), interpreter=("-s",)), plain)
    assert started.status == 0, started
    shown = command.run(command.argv(guard.arguments("status"), interpreter=("-s",)), plain)
    assert shown.status == 0, shown
    assert "lock Z" in shown.stdout


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("status", "--json", "--cgroup", "/nowhere"), 4),
        (("explain", "--json", "--user", "nobody-has-this", SERVICE), 78),
        (("start", "--group", "nobody-has-this", "--json"), 78),
        (("allow", "--json"), 2),
        (("report", "--json", "--frobnicate"), 2),
        (("watch", "--once", "--json", "--cgroup", "/nowhere"), 1),
        (("frobnicate", "--json"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@needs_root
def test_an_error_is_json_where_that_was_asked_for(words: tuple[str, ...], status: int) -> None:
    """One line, with the number of the schema, and nothing on standard error."""
    result = command.imds_guard_command(*words)
    assert (result.status, result.stderr, result.stdout.count("\n")) == (status, "", 1)
    assert result.values == {"schema": 1, "error": {"status": status, "message": result.values["error"]["message"]}}
