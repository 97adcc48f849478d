# SPDX-License-Identifier: Apache-2.0
"""start --boot: the configuration's policy, or the emergency lock, or the policy in force before; never less."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import command
from tests.command import ONE, STRANGER, TIMEOUT_S, TWO, Guard, Result
from tests.kernel.guards import Storm

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and cgroups needs root")

IPV4, IPV6, ELSEWHERE = "169.254.169.254", "fd00:ec2::254", "192.0.2.1"
"""Built-in endpoints, on lo of the test's own network namespace, and an address that is not locked."""
EVERYWHERE = (IPV4, IPV6, ELSEWHERE)
NO_LISTENER = 81
"""A locked port where a connect is refused at once."""

NO_BPF = Path(__file__).resolve().parents[2] / "vagrant" / "guest" / "refuse_bpf.py"
"""Runs a command with bpf(2) refused: it uses iptables, in this network namespace only."""

GOOD = f"""
[lock.default]
endpoints = ["{IPV4}"]
users = [{ONE}]
"""
UNUSABLE = {
    "no ID": GOOD.replace(str(ONE), "4294967295"),
    "unknown key": "colour = 1\n" + GOOD,
    "no TOML": "[lock.default\n",
    "nothing locked": "",
    "the name of the emergency lock": GOOD.replace("default", "emergency"),
    "500 brackets": f"x = {'[' * 500}{']' * 500}\n{GOOD}",
    "a null byte in a path": f'cgroup = "/sys\\u0000"\n{GOOD}',
}


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard(addresses=EVERYWHERE) as one:
        yield one


def boot(guard: Guard, folder: Path, text: str | None, before: str = "") -> Result:
    """``start --boot`` with this configuration; with None there is no file. ``before`` is Python that runs first."""
    path = folder / "config.toml"
    if text is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(text, encoding="utf-8")
    return command.run(command.argv(guard.arguments("start", "--boot", "--config", str(path)), before=before))


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


def test_boot_uses_the_saved_id_of_a_name_and_fails_visibly_when_it_is_another_one_now(
    guard: Guard, tmp_path: Path
) -> None:
    """A reload refuses such a file: what is in force stays."""
    name = pwd.getpwuid(1).pw_name
    moved = GOOD.replace(str(ONE), f'{{ name = "{name}", id = {TWO} }}')
    done = boot(guard, tmp_path, moved)
    assert done.status == 78, done
    sentence = f"users: '{name}' was {TWO} when it was saved and is 1 now: correct the name or the id"
    assert done.stderr.rstrip().endswith(f"{sentence}; the saved IDs are in force")
    assert who(guard) == [TWO]
    assert boot(guard, tmp_path, GOOD).status == 0
    done = boot(guard, tmp_path, moved)
    assert (done.status, done.stdout) == (78, "")
    assert done.stderr.rstrip().endswith(f"{sentence}; what was in force stays so")
    assert who(guard) == [ONE]


def test_a_configuration_for_audit_denies_nobody_at_any_moment(guard: Guard, tmp_path: Path) -> None:
    """The emergency lock, which would deny for a moment, comes only after an error."""
    storm = Storm(guard.sandbox, STRANGER, IPV4, NO_LISTENER)
    done = boot(guard, tmp_path, f'mode = "audit"\n{GOOD}')
    storm.wait_for(100)
    connected, denied, refused = storm.counts()
    assert (done.status, connected, denied, refused > 100) == (0, 0, 0, True), done
    assert guard.status()["policy"]["mode"] == "audit"
    assert guard("stop").status == 0
    assert boot(guard, tmp_path, f'mode = "audit"\n{UNUSABLE["no ID"]}').status == 78
    assert who(guard) == [0]


def test_an_unknown_name_lets_nobody_in_and_blocks_nothing(guard: Guard, tmp_path: Path) -> None:
    done = boot(guard, tmp_path, GOOD.replace(str(ONE), f'{ONE}, "nobody-of-that-name"'))
    assert done.status == 0, done
    assert "warning: users: there is no user 'nobody-of-that-name', so this entry is left out" in done.stderr
    assert (who(guard), status_line(guard)) == ([ONE], "imds-guard: active (ebpf)")


HANGING_NAMES = """
import signal
from imds_guard.config import names
names._id_or_none = lambda name: signal.pause()
names.ask.__defaults__ = (0.5,)
"""
"""A name service that never answers, and half a second of patience."""


@pytest.mark.parametrize(("key", "allowed"), [("users", [ONE]), ("deny_groups", [])])
def test_a_name_service_that_hangs_does_not_delay_the_lock(
    guard: Guard, tmp_path: Path, key: str, allowed: list[int]
) -> None:
    """On an allow list the name lets nobody in; on a deny list nobody gets in, since anybody may be in that group."""
    named = f'"name-of-{key}"'
    text = GOOD.replace(f"[{ONE}]", f"[{ONE}, {named}]") if key == "users" else f"{GOOD}{key} = [{named}]\n"
    done = boot(guard, tmp_path, text, before=HANGING_NAMES)
    assert done.status == 0, done
    assert f"warning: {key}: the name service gave no ID for 'name-of-{key}' yet" in done.stderr
    assert who(guard) == allowed
    reload = boot(guard, tmp_path, text, before=HANGING_NAMES)
    assert (reload.status, reload.stdout) == (78, "")
    assert f"the name service gave no ID for 'name-of-{key}'" in reload.stderr
    assert reload.stderr.rstrip().endswith("what was in force stays so")
    assert who(guard) == allowed


ANSWERING_NAMES = f"from imds_guard.config import names\nnames._id_or_none = lambda name: {TWO}"


def repair(guard: Guard, folder: Path, before: str) -> Result:
    """``verify --repair`` with the configuration of boot()."""
    words = guard.arguments("verify", "--repair", "--config", str(folder / "config.toml"))
    return command.run(command.argv(words, before=before))


def test_verify_asks_again_for_the_names_that_had_no_id(guard: Guard, tmp_path: Path) -> None:
    """A policy that somebody has changed since then stays as it is."""
    text = GOOD.replace(f"[{ONE}]", f'[{ONE}, "late"]')
    boot(guard, tmp_path, text, before=HANGING_NAMES)
    assert (repair(guard, tmp_path, HANGING_NAMES).status, who(guard)) == (0, [ONE])
    done = repair(guard, tmp_path, ANSWERING_NAMES)
    assert "repaired: names of the configuration had no ID: they have one now" in done.stdout
    assert (done.status, who(guard)) == (0, [ONE, TWO])
    assert repair(guard, tmp_path, ANSWERING_NAMES).stdout == "imds-guard: active (ebpf)\n"

    assert guard("stop").status == 0
    boot(guard, tmp_path, text, before=HANGING_NAMES)
    assert guard("allow", "--user", str(STRANGER)).status == 0
    assert repair(guard, tmp_path, ANSWERING_NAMES).status == 0
    assert who(guard) == [ONE, STRANGER]


def test_a_denied_group_that_is_unknown_lets_in_root_at_most(guard: Guard, tmp_path: Path) -> None:
    """As for a group of a directory whose daemon does not run yet. verify lets the others in when it has an ID."""
    text = f'[lock.default]\nendpoints = ["{IPV4}"]\ndeny_groups = ["group-of-no-machine"]\n'
    done = boot(guard, tmp_path, text)
    assert done.status == 0, done
    assert "deny_groups: there is no group 'group-of-no-machine'; until there is one, or the entry" in done.stderr
    assert who(guard) == [0]
    assert (boot(guard, tmp_path, text).status, who(guard)) == (78, [0])
    assert (repair(guard, tmp_path, "").status, who(guard)) == (0, [0])
    assert (repair(guard, tmp_path, ANSWERING_NAMES).status, who(guard)) == (0, [0, ONE, TWO, STRANGER])


KILLED = "import os\nfrom imds_guard.config import boot_file\nboot_file.config_of = lambda *_: os.kill(os.getpid(), {})"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_boot_that_is_ended_while_it_reads_the_configuration_leaves_the_emergency_lock(
    guard: Guard, tmp_path: Path, number: int, status: int
) -> None:
    done = boot(guard, tmp_path, 'on_error = "open"\n' + GOOD, before=KILLED.format(int(number)))
    assert done.status == status
    assert (who(guard), status_line(guard)) == ([0], "imds-guard: degraded: emergency lock (ebpf)")


@pytest.mark.parametrize("kind", ["fifo", "folder", "gibibyte"])
def test_a_configuration_that_is_no_file_of_text_leads_to_the_emergency_lock(
    guard: Guard, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "config.toml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 30)
    done = guard("start", "--boot", "--config", str(path))
    assert done.status == 78
    assert "could not be read: it " in done.stderr
    assert (who(guard), status_line(guard)) == ([0], "imds-guard: degraded: emergency lock (ebpf)")


@pytest.mark.parametrize("which", ["file", "folder"])
def test_a_configuration_that_others_can_change_is_not_used(guard: Guard, tmp_path: Path, which: str) -> None:
    """Not even its on_error: whoever can write it must not open the lock. Other commands warn of it."""
    path = tmp_path / "config.toml"
    path.write_text('on_error = "open"\n' + GOOD, encoding="utf-8")
    os.chown(path if which == "file" else tmp_path, ONE, ONE)
    done = guard("start", "--boot", "--config", str(path))
    assert done.status == 78
    assert "can be changed by others than root, who could open the lock; chown it to root" in done.stderr
    assert (who(guard), status_line(guard)) == ([0], "imds-guard: degraded: emergency lock (ebpf)")
    for words in (("check",), ("start",)):
        other = guard(*words, "--config", str(path))
        assert other.status == 0
        assert f"warning: at boot {path} would not be used: " in other.stderr
    assert who(guard) == [ONE]


def test_a_program_that_others_can_change_puts_the_emergency_lock_on(guard: Guard, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir(mode=0o777)
    package.chmod(0o777)
    before = f"from imds_guard.commands import own_files; own_files.PACKAGE = {str(package)!r}"
    done = boot(guard, tmp_path, 'on_error = "open"\n' + GOOD, before=before)
    assert done.status == 77
    assert f"starting at boot: {package} (owner 0, group 0, mode 0777) can be changed by others" in done.stderr
    assert who(guard) == [0]


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
    done = boot(guard, tmp_path, 'on_error = "open"\n' + UNUSABLE["no ID"])
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
    done = boot(guard, tmp_path, UNUSABLE["no ID"])
    assert (done.status, done.stdout) == (78, "")
    assert done.stderr.rstrip().endswith("what was in force stays so")
    assert who(guard) == before == ([ONE] if start == "a usable one" else [0])


def test_the_emergency_lock_can_be_changed_but_not_saved(guard: Guard, tmp_path: Path) -> None:
    """A user can be let in until the configuration is right. The emergency lock never gets into the file."""
    boot(guard, tmp_path, UNUSABLE["no ID"])
    path = tmp_path / "config.toml"
    assert guard("allow", "--user", str(ONE)).status == 0
    assert (who(guard), status_line(guard)) == ([0, ONE], "imds-guard: degraded: emergency lock (ebpf)")
    refused = guard("allow", "--user", str(TWO), "--save", "--config", str(path))
    assert refused.status == 78
    assert "it is the emergency lock; correct the configuration instead" in refused.sentence
    assert (who(guard), path.read_text(encoding="utf-8")) == ([0, ONE], UNUSABLE["no ID"])


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
    path.write_text(UNUSABLE["no ID"], encoding="utf-8")
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
    assert "no backend works here" in done.stderr
    assert done.stderr.rstrip().endswith("(emergency lock)")
    assert who(guard) == [0]


def test_no_process_of_ours_runs_after_boot(guard: Guard, tmp_path: Path) -> None:
    """Enforcement does not depend on a process that could be killed."""
    boot(guard, tmp_path, GOOD)
    found = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.stdout == ""
