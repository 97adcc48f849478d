# SPDX-License-Identifier: Apache-2.0
"""Random arguments: the command refuses with one sentence and a known status and changes nothing, or does its work.

Everything runs in a sandbox, a network namespace and a cgroup of its own, where no eBPF program can be loaded or
attached: a policy without --cgroup goes to iptables.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imds_guard.backends.iptables import IptablesBackend
from imds_guard.cli import ip_lockdown, main
from imds_guard.kernel import bpf
from imds_guard.kernel.sandbox import Sandbox
from tests.kernel import guards, places
from tests.kernel.guards import IPV4, IPV6

EXAMPLES = settings().max_examples * 3 // 5
_HUNG_MS = 120_000

_KNOWN = {0, 1, 2, 3, 4, 69, 77, 78}
_REFUSALS = {2, 69, 77, 78}
_NEVER = ("--save", "--create-group", "--boot", "demo", "watch", "metrics")
"""Arguments that make it write files or accounts, or not end."""

_OPTIONS = (
    *("--user", "--group", "--deny-user", "--deny-group", "--ip", "--preset", "--mode", "--containers", "--backend"),
    *("--nobody", "--json", "--strict", "--resolve-groups", "--forwarded", "--format", "--force", "--pid", "--config"),
    *("--without-root", "--cgroup", "--help", "--", "-"),
)
_VALUES = (
    *("root", "0", "-1", "4294967295", "no such name", "169.254.169.254", "10.0.0.0/8:!53,tcp", "fd00:ec2::254"),
    *("enforce", "audit", "allow", "deny", "ebpf", "iptables", "auto", "drop", "leave", "aws", "all", "default"),
    *(
        "iptables",
        "nftables",
        "pf",
        "ipfw",
        "windows",
        "systemd",
        "/dev/null",
        "/nonexistent",
        "",
        "\x00",
        "ü",
        "\udcff",
    ),
)
_COMMANDS = (
    "start",
    "stop",
    "allow",
    "revoke",
    "mode",
    "check",
    "explain",
    "export",
    "status",
    "endpoints",
    "nonsense",
)


def command_lines() -> st.SearchStrategy[list[str]]:
    """A command with options, values and arbitrary text."""
    option = st.tuples(st.sampled_from(_OPTIONS), st.one_of(st.sampled_from(_VALUES), st.text(max_size=10))).map(list)
    value = st.one_of(st.sampled_from(_VALUES), st.sampled_from(_OPTIONS), st.text(max_size=10)).map(lambda one: [one])
    rest = st.lists(st.one_of(option, option, value), max_size=5).map(
        lambda parts: [one for part in parts for one in part]
    )
    return st.builds(lambda command, more: [command, *more], st.sampled_from(_COMMANDS), rest).filter(
        lambda line: not any(argument.startswith(_NEVER) for argument in line)
    )


def _run(line: list[str], entry: object = main) -> tuple[int, str, str]:
    """(exit status, standard output, standard error). A failure that would print a traceback is raised."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        try:
            entry(line)  # type: ignore[operator]
        except SystemExit as end:
            return int(end.code or 0), stdout.getvalue(), stderr.getvalue()
    raise AssertionError("the command did not end")


def _check(line: list[str], status: int, stdout: str, stderr: str) -> None:
    errors = [one for one in stderr.split("\n") if one and not one.startswith("warning: ")]
    assert status in _KNOWN, (line, status, stderr)
    for text in (stdout, stderr):
        assert "Traceback" not in text, (line, text)
        assert "fault in imds-guard" not in text, (line, text)
        assert "no message covers" not in text, (line, text)
    if status not in _REFUSALS:
        return
    if "--json" in line and not errors:
        error = json.loads(stdout)["error"]
        assert error["status"] == status, (line, stdout)
        assert error["message"], (line, stdout)
        return
    if line[:1] == ["check"] and status == 69 and not errors:
        assert stdout, line  # what each backend lacks is the answer of this command
        return
    assert len(errors) == 1, (line, stderr)
    assert errors[0].startswith("imds-guard: "), (line, stderr)


@pytest.fixture
def _root() -> None:
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")


@pytest.mark.usefixtures("_root")
@pytest.mark.parametrize("entry", [main, ip_lockdown])
def test_any_arguments(entry: object, tmp_path: Path) -> None:
    """A known exit status and one sentence. A refusal leaves no rule, no attached program and no file."""

    @settings(max_examples=EXAMPLES, deadline=_HUNG_MS, suppress_health_check=list(HealthCheck), database=None)
    @given(command_lines())
    def one(line: list[str]) -> None:
        os.environ["IMDS_GUARD_TRACEBACK"] = "1"  # raises unexpected exceptions in place of a message
        line = line if entry is main else line[1:]
        before = _files(tmp_path)
        status, stdout, stderr = _run(line, entry)
        _check(line, status, stdout, stderr)
        if status in _REFUSALS:
            assert IptablesBackend().read() is None, line
            assert _files(tmp_path) == before, line
        IptablesBackend().remove()

    def inside() -> None:
        places.with_own_run_folder()
        places.forbid_attaching()
        places.forbid_bpf(errno.EPERM, (bpf.Command.PROG_LOAD,))
        os.chdir(tmp_path)
        one()

    with Sandbox((IPV4, IPV6)) as sandbox:
        sandbox.call(inside, timeout_s=1200)
        assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}


def _files(folder: Path) -> list[str]:
    configuration = sorted(os.listdir("/etc/imds-guard")) if os.path.isdir("/etc/imds-guard") else []
    return sorted(os.listdir(folder)) + configuration
