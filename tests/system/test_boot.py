# SPDX-License-Identifier: Apache-2.0
"""start --boot: the configuration's policy, or the emergency lock, or the policy in force before; never less."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import command
from tests.command import ONE, STRANGER, TIMEOUT_S, TWO, Guard, Result

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and cgroups needs root")

IPV4, IPV6, ELSEWHERE = "169.254.169.254", "fd00:ec2::254", "192.0.2.1"
"""Built-in endpoints, on lo of the test's own network namespace, and an address that is not locked."""
EVERYWHERE = (IPV4, IPV6, ELSEWHERE)

NO_BPF = Path(__file__).resolve().parents[2] / "vagrant" / "guest" / "refuse_bpf.py"
"""Runs a command with bpf(2) refused: it uses iptables, in this network namespace only."""

GOOD = f"""
[lock.default]
endpoints = ["{IPV4}"]
users = [{ONE}]
"""
UNUSABLE = {
    "unknown user": GOOD.replace(str(ONE), '"nobody-of-that-name"'),
    "unknown key": "colour = 1\n" + GOOD,
    "no TOML": "[lock.default\n",
    "nothing locked": "",
    "the name of the emergency lock": GOOD.replace("default", "emergency"),
}


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard(addresses=EVERYWHERE) as one:
        yield one


def boot(guard: Guard, folder: Path, text: str | None) -> Result:
    """``start --boot`` with this configuration; with None there is no file."""
    path = folder / "config.toml"
    if text is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(text, encoding="utf-8")
    return guard("start", "--boot", "--config", str(path))


def who(guard: Guard, to: str = IPV4) -> list[int]:
    """The user IDs that get through."""
    return [uid for uid in (0, ONE, TWO, STRANGER) if guard.reach(uid, to) == "connected"]


def status_line(guard: Guard) -> str:
    """The first line of status."""
    return guard("status").stdout.splitlines()[0]


def test_boot_locks_what_the_configuration_says(guard: Guard, tmp_path: Path) -> None:
    done = boot(guard, tmp_path, GOOD)
    assert (done.status, "active (ebpf)" in done.stdout) == (0, True), done
    assert (who(guard), who(guard, IPV6)) == ([ONE], [0, ONE, TWO, STRANGER])
    assert boot(guard, tmp_path, GOOD.replace(str(ONE), str(TWO))).status == 0
    assert who(guard) == [TWO]


def test_boot_uses_the_saved_id_of_a_name(guard: Guard, tmp_path: Path) -> None:
    """It warns that the name now belongs to another ID."""
    name = pwd.getpwuid(1).pw_name
    done = boot(guard, tmp_path, GOOD.replace(str(ONE), f'{{ name = "{name}", id = {TWO} }}'))
    assert done.status == 0, done
    assert f"warning: users: '{name}' was {TWO} when it was saved and is 1 now; the saved ID is used" in done.stderr
    assert who(guard) == [TWO]


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_configuration_locks_the_built_in_endpoints_for_all_but_root(
    guard: Guard, tmp_path: Path, text: str
) -> None:
    """The exit status is 78, and status reads from the kernel that it is the emergency lock."""
    done = boot(guard, tmp_path, text)
    assert done.status == 78, done
    assert done.stderr.splitlines()[-1].endswith("locked for everyone but root (emergency lock)")
    assert str(tmp_path / "config.toml") in done.stderr
    assert (who(guard), who(guard, IPV6), who(guard, ELSEWHERE)) == ([0], [0], [0, ONE, TWO, STRANGER])
    assert status_line(guard) == "imds-guard: degraded: emergency lock (ebpf)"
    status = guard("status", "--json")
    assert (status.status, status.values["emergency"]) == (1, True)
    assert boot(guard, tmp_path, GOOD).status == 0
    assert (who(guard), status_line(guard)) == ([ONE], "imds-guard: active (ebpf)")


def test_without_a_configuration_the_emergency_lock_is_put_on(guard: Guard, tmp_path: Path) -> None:
    done = boot(guard, tmp_path, None)
    assert done.status == 78
    assert f"there is no configuration {tmp_path}/config.toml: write it, or save a policy" in done.stderr
    assert (who(guard), status_line(guard)) == ([0], "imds-guard: degraded: emergency lock (ebpf)")


def test_on_error_open_locks_nothing(guard: Guard, tmp_path: Path) -> None:
    """It must stand in a file that is valid TOML. The exit status is 78 as well."""
    done = boot(guard, tmp_path, 'on_error = "open"\n' + UNUSABLE["unknown user"])
    assert (done.status, done.stdout) == (78, "")
    assert done.stderr.rstrip().endswith('nothing is locked, since the configuration says on_error = "open"')
    assert (guard("status").status, who(guard)) == (3, [0, ONE, TWO, STRANGER])
    assert boot(guard, tmp_path, 'on_error = "open"\n' + UNUSABLE["no TOML"]).status == 78
    assert who(guard) == [0]


@pytest.mark.parametrize("start", ["a usable one", "the emergency lock"])
def test_an_unusable_configuration_leaves_what_is_in_force(guard: Guard, tmp_path: Path, start: str) -> None:
    """A reload after a mistake in the file takes no lock away and lets nobody in."""
    boot(guard, tmp_path, GOOD if start == "a usable one" else UNUSABLE["no TOML"])
    before = who(guard)
    done = boot(guard, tmp_path, UNUSABLE["unknown user"])
    assert (done.status, done.stdout) == (78, "")
    assert done.stderr.rstrip().endswith("what was in force stays so")
    assert who(guard) == before == ([ONE] if start == "a usable one" else [0])


def test_the_emergency_lock_can_be_changed_but_not_saved(guard: Guard, tmp_path: Path) -> None:
    """A user can be let in until the configuration is right. The emergency lock never gets into the file."""
    boot(guard, tmp_path, UNUSABLE["unknown user"])
    path = tmp_path / "config.toml"
    assert guard("allow", "--user", str(ONE)).status == 0
    assert (who(guard), status_line(guard)) == ([0, ONE], "imds-guard: degraded: emergency lock (ebpf)")
    refused = guard("allow", "--user", str(TWO), "--save", "--config", str(path))
    assert refused.status == 78
    assert "it is the emergency lock; correct the configuration instead" in refused.sentence
    assert (who(guard), path.read_text(encoding="utf-8")) == ([0, ONE], UNUSABLE["unknown user"])


def test_boot_refuses_options_that_say_who_or_where(guard: Guard) -> None:
    done = guard("start", "--boot", "--user", str(ONE))
    assert done.status == 2
    assert "--boot takes everything from the configuration" in done.sentence


def _with_iptables(guard: Guard, *words: str) -> Result:
    argv = (sys.executable, str(NO_BPF), *command.argv(words))
    return guard.sandbox.call(lambda: command.run(argv, {"PYTHONPATH": command.SOURCES}), timeout_s=TIMEOUT_S)


def test_without_ebpf_both_locks_use_iptables(guard: Guard, tmp_path: Path) -> None:
    """As at any start that names no backend, iptables takes over."""
    path = tmp_path / "config.toml"
    words = ("start", "--boot", "--config", str(path))
    path.write_text(UNUSABLE["unknown user"], encoding="utf-8")
    assert _with_iptables(guard, *words).status == 78
    assert (who(guard), who(guard, IPV6)) == ([0], [0])
    emergency = _with_iptables(guard, "status")
    assert (emergency.status, emergency.stdout.splitlines()[0]) == (
        1,
        "imds-guard: degraded: emergency lock (iptables)",
    )
    path.write_text(GOOD, encoding="utf-8")
    assert _with_iptables(guard, *words).status == 0
    assert (who(guard), who(guard, IPV6)) == ([ONE], [0, ONE, TWO, STRANGER])
    assert _with_iptables(guard, "status").status == 0


def test_a_backend_that_does_not_work_leads_to_the_emergency_lock(guard: Guard, tmp_path: Path) -> None:
    """The configuration asks for eBPF only: the error says why, and iptables holds the emergency lock."""
    path = tmp_path / "config.toml"
    path.write_text('backend = "ebpf"\n' + GOOD, encoding="utf-8")
    done = _with_iptables(guard, "start", "--boot", "--config", str(path))
    assert done.status == 69, done
    assert "no backend can hold the policy here" in done.stderr
    assert done.stderr.rstrip().endswith("(emergency lock)")
    assert who(guard) == [0]


def test_no_process_of_ours_runs_after_boot(guard: Guard, tmp_path: Path) -> None:
    """Enforcement does not depend on a process that could be killed."""
    boot(guard, tmp_path, GOOD)
    found = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.stdout == ""
