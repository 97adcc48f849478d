# SPDX-License-Identifier: Apache-2.0
"""``imds-guard report`` and ``imds-guard metrics``. The commands and the configuration that they print work."""

from __future__ import annotations

import ctypes
import os
import pty
import re
import select
import shlex
import socket
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imds_guard import __version__
from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.kernel import bpf
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from tests import command
from tests.adversary.privileges import become_user, enter_user_namespace, in_mapped_user_namespace
from tests.command import (
    NEIGHBOUR,
    ONE,
    SERVICE,
    SERVICE_V6,
    STRANGER,
    TIMEOUT_S,
    TWO,
    Guard,
    argv,
    imds_guard_command,
)
from tests.kernel import places
from tests.kernel.guards import folder_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def start(guard: Guard, *options: str) -> None:
    guard.start("--user", str(ONE), "--ip", SERVICE, "--ip", SERVICE_V6, *options)


# --- report ---------------------------------------------------------------------------------------------------------


def test_audit_first_then_enforce(guard: Guard) -> None:
    """In audit mode nobody is denied. The users that the report's commands allow get through in enforce mode."""
    start(guard, "--mode", "audit")
    for _ in range(3):
        assert guard.reach(STRANGER, SERVICE) == "connected"
    assert guard.reach(TWO, SERVICE_V6) == "connected"
    found = guard("report", "--json").values
    assert found["mode"] == "audit"
    assert [(row["uid"], row["count"], row["reason"]) for row in found["rows"]] == [
        (STRANGER, 3, "not-listed"),
        (TWO, 1, "not-listed"),
    ]
    commands = [shlex.split(one["command"]) for one in found["allow"]]
    assert [arguments[:4] for arguments in commands] == [
        ["imds-guard", "allow", "--user", str(STRANGER)],
        ["imds-guard", "allow", "--user", str(TWO)],
    ]
    assert imds_guard_command(*commands[0][1:]).status == 0
    start_again = ("--user", str(ONE), "--user", str(STRANGER), "--ip", SERVICE, "--ip", SERVICE_V6)
    assert guard.start(*start_again).status == 0
    assert [guard.reach(uid, SERVICE) for uid in (ONE, STRANGER, TWO)] == ["connected", "connected", "EPERM"]


def test_the_configuration_of_a_report_can_be_started(guard: Guard, tmp_path: Path) -> None:
    start(guard)
    for uid, to in ((STRANGER, SERVICE), (TWO, SERVICE_V6)):
        assert guard.reach(uid, to) == "EPERM"
    config = tmp_path / "config.toml"
    config.write_text(guard("report", "--as-config").answer)
    assert config.read_text() == guard("report", "--json").values["config"]
    assert "[lock." not in guard("report").answer
    assert guard("report", "--as-config", "--json").status == 2
    assert imds_guard_command("start", "--config", str(config)).status == 0
    assert [guard.reach(uid, SERVICE) for uid in (ONE, STRANGER, TWO, 0)] == ["connected"] * 3 + ["EPERM"]


def test_a_row_has_the_first_destination_and_the_first_and_last_time(guard: Guard) -> None:
    start(guard)
    before = time.time()
    guard.reach(STRANGER, SERVICE_V6, 443)
    guard.reach(STRANGER, SERVICE)
    after = time.time()
    (row,) = guard("report", "--json").values["rows"]
    assert (row["address"], row["port"], row["protocol"], row["count"]) == (SERVICE_V6, 443, "tcp", 2)
    assert row["comm"] == Path("/proc/self/comm").read_text().strip()
    assert row["lock"] == "default"
    form = "%Y-%m-%dT%H:%M:%S"
    first, last = (time.strptime(row[key][:19], form) for key in ("first", "last"))
    assert time.gmtime(before - 1) <= first <= last <= time.gmtime(after + 1)


def rows_of(guard: Guard) -> dict[tuple[str, int], int]:
    """(lock, user ID) -> count."""
    return {(row["lock"], row["uid"]): row["count"] for row in guard("report", "--json").values["rows"]}


def test_rows_stay_through_an_allow_until_their_caller_would_pass(guard: Guard) -> None:
    """A day of audit is not lost with the first command of its report."""
    start(guard, "--mode", "audit")
    for uid in (TWO, STRANGER, STRANGER):
        assert guard.reach(uid, SERVICE) == "connected"
    first = guard("report", "--json").values
    assert guard("allow", "--user", str(TWO)).status == 0
    after = guard("report", "--json").values
    assert rows_of(guard) == {("default", STRANGER): 2}
    assert after["change"] > first["change"]
    assert [row for row in first["rows"] if row["uid"] == STRANGER] == after["rows"]
    assert guard("mode", "enforce").status == 0
    assert guard.reach(STRANGER, SERVICE) == "EPERM"
    assert rows_of(guard) == {("default", STRANGER): 3}
    assert guard("allow", "--user", str(STRANGER)).status == 0
    assert "nobody yet" in guard("report").answer


def test_rows_follow_their_address_to_the_lock_that_decides_now(guard: Guard) -> None:
    guard.start("--user", str(ONE), "--ip", SERVICE, "--ip", NEIGHBOUR)
    guard.reach(STRANGER, NEIGHBOUR)
    assert guard("allow", "--user", str(TWO), "--ip", NEIGHBOUR).status == 0
    assert rows_of(guard) == {(NEIGHBOUR, STRANGER): 1}
    guard.start("--user", str(ONE), "--ip", SERVICE)
    assert rows_of(guard) == {}


def test_a_member_of_a_group_that_is_allowed_now_has_no_row_any_more(guard: Guard) -> None:
    """By /etc/passwd and /etc/group: daemon is an account of every Debian."""
    start(guard)
    guard.reach(1, SERVICE)
    guard.reach(STRANGER, SERVICE)
    assert guard("allow", "--group", "daemon").status == 0
    assert rows_of(guard) == {("default", STRANGER): 1}


def test_rows_that_stay_count_in_the_share_of_their_user(guard: Guard) -> None:
    """Else a user with sub-IDs would get as many rows again with each change."""
    start(guard)
    guard.sandbox.call(lambda: _connect_as(*range(200_000, 200_512)))
    assert guard("allow", "--user", str(TWO)).status == 0
    guard.sandbox.call(lambda: _connect_as(*range(201_000, 201_100)))
    found = Counter(row["who"] for row in guard("report", "--json").values["rows"])
    assert found == {"user": 512, "others": 1}


def test_the_lines_of_a_report_work_in_order_and_the_last_one_enforces(guard: Guard) -> None:
    """With several lists, each names the address that was denied, and the cgroup of the guard."""
    guard.start("--user", str(ONE), "--ip", SERVICE, "--ip", NEIGHBOUR, "--mode", "audit")
    guard("allow", "--user", str(ONE + 10), "--ip", SERVICE)
    for uid, to in ((TWO, SERVICE), (STRANGER, NEIGHBOUR), (STRANGER, NEIGHBOUR)):
        guard.reach(uid, to)
    lines = [line.split("#")[0] for line in guard("report").answer.splitlines() if line.startswith("  imds-guard ")]
    assert [shlex.split(line)[1] for line in lines] == ["allow", "allow", "mode"]
    assert all(f"--cgroup {guard.sandbox.cgroup}" in line for line in lines)
    assert f"--ip {NEIGHBOUR}" in lines[0]
    for line in lines:
        assert imds_guard_command(*shlex.split(line)[1:]).status == 0, line
    outcomes = [guard.reach(uid, to) for uid, to in ((TWO, SERVICE), (STRANGER, NEIGHBOUR), (STRANGER, SERVICE))]
    assert outcomes == ["connected", "connected", "EPERM"]


def test_locks_with_different_allowlists_get_a_command_each(guard: Guard) -> None:
    """A command lets its user through one lock, and not through the other."""
    guard.start("--user", str(ONE), "--ip", SERVICE)
    assert ip_lockdown(guard, NEIGHBOUR, str(TWO)).status == 0
    assert [guard.reach(STRANGER, to) for to in (SERVICE, NEIGHBOUR)] == ["EPERM"] * 2
    assert guard.reach(ONE, NEIGHBOUR) == "EPERM"
    commands = [shlex.split(one["command"])[1:] for one in guard("report", "--json").values["allow"]]
    assert len(commands) == 3
    (arguments,) = [arguments for arguments in commands if str(ONE) in arguments]
    assert NEIGHBOUR in " ".join(arguments)
    assert imds_guard_command(*arguments).status == 0
    assert guard.reach(ONE, NEIGHBOUR) == "connected"
    assert guard.reach(STRANGER, NEIGHBOUR) == "EPERM"


def ip_lockdown(guard: Guard, *arguments: str) -> command.Result:
    return command.run(argv((*arguments, "--cgroup", guard.sandbox.cgroup), entry="ip_lockdown"))


def test_a_user_on_a_deny_list_gets_a_note_and_no_command(guard: Guard) -> None:
    guard.start("--user", str(ONE), "--deny-user", str(TWO), "--ip", SERVICE)
    guard.reach(TWO, SERVICE)
    found = guard("report", "--json").values
    assert [row["reason"] for row in found["rows"]] == ["denied-user"]
    assert (found["allow"], found["config"]) == ([], None)
    assert found["notes"] == ["denied-user: take the user off the deny list"]


def test_the_names_of_callers_are_safe_to_print(guard: Guard) -> None:
    def connect() -> None:
        become(uids=(STRANGER,) * 3, gids=(51_999,) * 3, groups=())
        ctypes.CDLL(None).prctl(15, b"\x1b[2J\nx", 0, 0, 0)  # PR_SET_NAME
        with socket.socket() as client:
            client.connect_ex((SERVICE, 80))

    start(guard)
    guard.sandbox.call(connect)
    assert guard("report", "--json").values["rows"][0]["comm"] == "\\x1b[2J\\x0ax"
    assert "\\x1b[2J\\x0ax" in guard("report").answer


def _connect_as(*uids: int) -> None:
    """As each of these users in turn, as a process that may take any ID that is assigned to its user."""
    for uid in uids:
        ctypes.CDLL(None).setfsuid(uid)
        with socket.socket() as client:
            client.connect_ex((SERVICE, 80))


def test_a_user_with_sub_ids_hides_nobody(guard: Guard) -> None:
    start(guard)
    sub_ids = range(200_000, 200_700)
    guard.sandbox.call(lambda: _connect_as(*sub_ids))
    assert guard.reach(STRANGER, SERVICE) == "EPERM"
    found = guard("report", "--json").values
    rows = {(row["who"], row["uid"]): row for row in found["rows"]}
    assert Counter(who for who, _ in rows) == {"user": 513, "others": 1}
    assert ("user", STRANGER) in rows
    beyond = rows["others", 196_608]
    assert (beyond["count"], beyond["last_uid"], beyond["user"], beyond["lock"]) == (188, 262_143, None, None)
    assert found["overflow"] == 0
    assert len(found["allow"]) == 513
    shown = guard("report").answer
    assert str(STRANGER) in shown, "no rows of one user hide those of another one"
    assert re.search(r"\b188\b", shown)


def test_without_settings_the_row_still_names_the_caller(guard: Guard) -> None:
    """Without the settings of the policy the hook denies everybody. Nobody is counted for root."""
    start(guard)
    key = abi.ARRAY_KEY.pack(guard.backend.state().generation)
    fd = bpf.pinned(os.path.join(folder_of(guard.sandbox.cgroup).path, Map.SETTINGS.pin_name))
    settings = bpf.map_lookup(fd, key, abi.SETTINGS.size)
    assert settings is not None
    bpf.map_update(fd, key, bytes(abi.SETTINGS.size))
    assert guard.reach(STRANGER, SERVICE) == "EPERM"
    bpf.map_update(fd, key, settings)  # without them there is no policy to report on
    os.close(fd)
    (row,) = guard("report", "--json").values["rows"]
    assert (row["who"], row["uid"], row["reason"]) == ("user", STRANGER, "no-settings")
    assert "caller unknown" not in guard("report").answer


def test_callers_in_a_user_namespace_are_counted_for_its_owner(guard: Guard) -> None:
    """The namespace maps 600 IDs. No command is suggested for it."""

    def in_namespace() -> None:
        in_mapped_user_namespace(["0 300000 600"], lambda: _connect_as(*range(600)))

    def in_own_namespace() -> None:
        become_user(STRANGER, 51_999)
        enter_user_namespace(0, 0)
        _connect_as(0)

    start(guard, "--containers", "allow")
    guard.sandbox.call(in_namespace)
    guard.sandbox.call(in_own_namespace)
    found = guard("report", "--json").values
    rows = [(row["who"], row["uid"], row["count"], row["reason"]) for row in found["rows"]]
    assert rows == [("user-namespaces", 0, 600, "not-listed"), ("user-namespaces", STRANGER, 1, "not-listed")]
    assert (found["allow"], found["config"]) == ([], None)
    (note,) = found["notes"]
    assert note.startswith("user namespaces: ")
    assert "user namespaces" in guard("report").answer


def test_without_a_guard_there_is_no_report(guard: Guard) -> None:
    assert guard("report").sentence == "nothing is locked, so there is no report: run imds-guard start first"


def on_a_terminal(guard: Guard, environment: dict[str, str]) -> tuple[str, int]:
    """The output of ``report`` on a terminal of 80 columns, and its exit status."""
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", "80", "rows", "25"], stdin=theirs, check=True)
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    with subprocess.Popen(
        argv(guard.arguments("report")), stdout=theirs, stderr=theirs, stdin=theirs, env={**base, **environment}
    ) as process:
        os.close(theirs)
        text = b""
        deadline = time.monotonic() + TIMEOUT_S
        while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                text += os.read(ours, 1 << 16)
            except OSError:  # EIO: the other end is closed
                break
        status = process.wait(TIMEOUT_S)
    os.close(ours)
    return text.decode().replace("\r\n", "\n"), status


def table_of(text: str) -> list[str]:
    """The lines above the commands."""
    return text.partition("To let them through")[0].splitlines()


def test_on_a_terminal_the_table_fits_and_has_no_colour(guard: Guard) -> None:
    start(guard)
    guard.reach(STRANGER, SERVICE)
    guard.reach(0, SERVICE_V6)
    text, status = on_a_terminal(guard, {"TERM": "xterm-256color"})
    assert status == 0
    assert "\x1b" not in text
    assert text == guard("report").answer
    table = table_of(text)
    assert max(map(len, table)) <= 80
    assert any(f"{SERVICE}:80" in line for line in table)
    assert any(re.search(r"^root \(0\) .*2001:db8::1\]:80 .*not-listed", line) for line in table)


# --- metrics --------------------------------------------------------------------------------------------------------

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """(name, labels) -> value, parsed by prometheus_client."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(found: Samples, name: str, **labels: str) -> float:
    """The value of one sample."""
    return found[f"imds_guard_{name}", tuple(sorted(labels.items()))]


def test_metrics_without_a_guard(guard: Guard) -> None:
    found = samples(guard("metrics").answer)
    assert (of(found, "active"), of(found, "degraded")) == (0, 0)
    assert of(found, "info", version=__version__, backend="none", programs="") == 1


def test_metrics_count_by_reason_outcome_and_lock(guard: Guard) -> None:
    start(guard)
    for uid in (ONE, ONE, STRANGER, TWO, STRANGER):
        guard.reach(uid, SERVICE)
    found = samples(guard("metrics").answer)
    assert (of(found, "active"), of(found, "degraded"), of(found, "audit")) == (1, 0, 0)
    assert of(found, "policy_generation") in (1, 2)
    assert of(found, "decisions_total", reason="allowed-user", outcome="allowed") == 2
    assert of(found, "decisions_total", reason="not-listed", outcome="denied") == 3
    assert of(found, "decisions_total", reason="not-listed", outcome="audited") == 0
    assert of(found, "report_denials", reason="not-listed", lock="default") == 3
    assert of(found, "policy_changes_total") == 1
    assert (of(found, "lost_records_total"), of(found, "report_overflow_total")) == (0, 0)
    assert of(found, "hook_attached", hook="connect4") == 1
    assert ("imds_guard_hook_attached", (("hook", "egress"),)) not in found


def test_metrics_of_audit_mode(guard: Guard) -> None:
    start(guard, "--mode", "audit")
    guard.reach(STRANGER, SERVICE)
    found = samples(guard("metrics").answer)
    assert of(found, "audit") == 1
    assert of(found, "decisions_total", reason="not-listed", outcome="audited") == 1
    assert of(found, "decisions_total", reason="not-listed", outcome="denied") == 0


def test_metrics_of_a_guard_without_one_of_its_hooks(guard: Guard) -> None:
    start(guard)
    os.unlink(os.path.join(folder_of(guard.sandbox.cgroup).path, "link_connect4"))
    deadline = time.monotonic() + TIMEOUT_S
    while of(samples(guard("metrics").answer), "degraded") == 0:
        assert time.monotonic() < deadline
    assert of(samples(guard("metrics").answer), "hook_attached", hook="connect4") == 0


def test_metrics_have_the_run_times_of_hooks_while_the_kernel_counts_them(guard: Guard) -> None:
    start(guard)
    assert not any("hook_runs" in name for name, _ in samples(guard("metrics").answer))
    statistics = bpf.enable_run_statistics()
    try:
        for _ in range(3):
            guard.reach(STRANGER, SERVICE)
    finally:
        os.close(statistics)
    found = samples(guard("metrics").answer)
    assert of(found, "hook_runs_total", hook="connect4") == 3
    assert 0 < of(found, "hook_seconds_total", hook="connect4") < 1


def test_a_textfile_is_replaced_in_one_step_and_readable_for_everyone(guard: Guard, tmp_path: Path) -> None:
    start(guard)
    path = tmp_path / "imds-guard.prom"
    path.write_text("old")
    with path.open() as old:
        assert guard("metrics", "--textfile", str(path)).answer == ""
        assert old.read() == "old"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert of(samples(path.read_text()), "active") == 1
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_textfile_that_cannot_be_written_is_an_error_and_leaves_no_file(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "folder.prom").mkdir()
    for path in (tmp_path / "absent" / "x.prom", tmp_path / "folder.prom"):
        done = guard("metrics", "--textfile", str(path))
        assert done.status == 1
        assert done.sentence.startswith(f"writing metrics to {path}: E")
    assert [one.name for one in tmp_path.iterdir()] == ["folder.prom"]


def test_the_emergency_lock_has_a_metric_of_its_own(guard: Guard, tmp_path: Path) -> None:
    start(guard)
    assert of(samples(guard("metrics").answer), "emergency") == 0
    bad = tmp_path / "bad.toml"
    bad.write_text("mode =")
    guard("stop")  # a policy that is in force stays, however bad the file
    guard("start", "--boot", "--config", str(bad))
    assert of(samples(guard("metrics").answer), "emergency") == 1


def test_a_textfile_that_node_exporter_would_not_read_is_refused(guard: Guard, tmp_path: Path) -> None:
    path = tmp_path / "imds-guard.txt"
    done = guard("metrics", "--textfile", str(path))
    assert done.status == 2
    assert done.sentence == f"--textfile {path}: node_exporter reads only *.prom; end the name in .prom"
    assert not path.exists()


def test_without_prometheus_client_the_error_names_the_package(guard: Guard) -> None:
    code = "import sys; sys.modules['prometheus_client'] = None"
    done = command.run(argv(guard.arguments("metrics"), before=code))
    assert done.status == 69
    assert "install python3-prometheus-client" in done.sentence


# --- without eBPF ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def under_iptables() -> dict[str, command.Result]:
    """The results of the commands under iptables, in a namespace with its own /run/imds-guard."""

    def inside() -> dict[str, command.Result]:
        places.with_own_run_folder()
        places.forbid_attaching()
        who = ("--user", str(ONE), "--ip", SERVICE, "--backend", "iptables", "--forwarded", "leave")
        started = imds_guard_command("start", *who)
        options = {"watch": ("--once",), "report": (), "metrics": ()}
        return {"start": started, **{name: imds_guard_command(name, *more) for name, more in options.items()}}

    with Sandbox((SERVICE,)) as sandbox:
        found = sandbox.call(inside, timeout_s=4 * TIMEOUT_S)
    assert found["start"].status == 0, found["start"]
    return found


@pytest.mark.parametrize(("name", "doing"), [("watch", "watching denials"), ("report", "reading the report")])
def test_watch_and_report_are_unsupported_under_iptables(
    under_iptables: dict[str, command.Result], name: str, doing: str
) -> None:
    assert under_iptables[name].status == 69
    assert under_iptables[name].sentence.startswith(
        f"{doing}: the iptables backend is in force, and its rules do not report"
    )


def test_metrics_under_iptables(under_iptables: dict[str, command.Result]) -> None:
    found = samples(under_iptables["metrics"].answer)
    assert of(found, "active") == 1
    assert of(found, "info", version=__version__, backend="iptables", programs="") == 1
