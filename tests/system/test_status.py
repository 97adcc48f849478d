# SPDX-License-Identifier: Apache-2.0
"""Which guard a command is about, and what status shows beside it: all guards, the boot state, the file.

The configuration is a file of the test, in place of /etc/imds-guard/config.toml.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from imds_guard.backends.iptables import IptablesBackend
from imds_guard.kernel import syscalls
from tests import command
from tests.command import ONE, SERVICE, STRANGER, TWO, Guard, Result
from tests.kernel.guards import traces

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

COLUMNS, LINES = 80, 24


@dataclass(frozen=True)
class World:
    """A sandbox, a configuration that names its cgroup, and a BPF filesystem with the guards of this test alone."""

    guard: Guard
    config: Path
    bpffs: Path

    @property
    def before(self) -> str:
        """Python that runs before a command, so that it works in this world."""
        return (
            "import imds_guard\n"
            f"imds_guard.CONFIG_PATH = {str(self.config)!r}\n"
            "from imds_guard.kernel import bpffs\n"
            f"bpffs.find_bpffs = lambda: {str(self.bpffs)!r}"
        )

    def __call__(self, *arguments: str) -> Result:
        """Runs imds-guard with these arguments, without --cgroup."""
        return self.run(command.argv(arguments, before=self.before))

    def run(self, argv: Sequence[str]) -> Result:
        """Runs a program in the network namespace of the sandbox: its rules are the machine's for the command."""
        return self.guard.sandbox.call(lambda: command.run(argv), timeout_s=command.TIMEOUT_S)

    def write(self, text: str) -> None:
        """Writes the configuration."""
        self.config.write_text(text, encoding="utf-8")

    def policy(self, user: int = ONE) -> str:
        """A configuration for the sandbox."""
        return f'cgroup = "{self.guard.sandbox.cgroup}"\n[lock.web]\nendpoints = ["{SERVICE}"]\nusers = [{user}]\n'

    def status(self) -> Any:
        """What ``status --json`` prints."""
        return self("status", "--json").values

    def who(self) -> list[int]:
        """The user IDs that get through."""
        return [uid for uid in (ONE, TWO, STRANGER) if self.guard.reach(uid) == "connected"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    folder = tmp_path / "bpf"
    folder.mkdir()
    syscalls.mount("bpf", str(folder), "bpf", "mode=0700")
    try:
        with command.guard() as guard:
            one = World(guard, tmp_path / "config.toml", folder)
            one.write(one.policy())
            yield one
            one("stop", "--cgroup", guard.sandbox.cgroup)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_every_command_takes_the_cgroup_of_the_configuration(world: World) -> None:
    """Also those whose options describe a policy, which say so: somebody may mean the machine."""
    done = world("start", "--user", str(ONE), "--ip", SERVICE)
    assert f"this is about the processes of {world.guard.sandbox.cgroup} alone" in done.stderr
    assert (done.status, world.who()) == (0, [ONE])
    assert world.status()["ebpf"]["cgroup"] == world.guard.sandbox.cgroup
    assert world("allow", "--user", str(TWO)).status == 0
    assert world.who() == [ONE, TWO]
    assert world("revoke", "--user", str(ONE)).status == 0
    assert world.who() == [TWO]
    assert world("mode", "audit").status == 0
    assert world.who() == [ONE, TWO, STRANGER]
    assert world("mode", "enforce").status == 0
    assert world("explain", "--user", "root", SERVICE).status == 1
    assert world("report", "--json").status == 0
    assert "imds_guard_" in world("metrics").answer
    assert str(TWO) in world("export", "--format", "nftables", "--force").answer
    assert world("watch", "--once").status == 0
    assert world("check", "--user", str(ONE)).status == 0
    done = world.run(command.argv([SERVICE, str(ONE)], entry="ip_lockdown", before=world.before))
    assert (done.status, world.who()) == (0, [ONE, TWO])
    assert world("stop").status == 0
    assert world.who() == [ONE, TWO, STRANGER]


@pytest.mark.parametrize("text", [None, "colour = 1\n", "[lock.web\n", 'cgroup = "/sys/fs/cgroup/not-there"\n'])
def test_status_and_stop_work_whatever_the_configuration_is(world: World, text: str | None) -> None:
    """Without a cgroup in it they are about the machine, and name the guard of a cgroup all the same."""
    assert world("start").status == 0
    if text is None:
        world.config.unlink()
    else:
        world.write(text)
    done = world("status")
    assert (done.status, done.stdout.splitlines()[0]) == (3, "imds-guard: inactive"), done
    assert f"also locked: {world.guard.sandbox.cgroup} (ebpf): 1 endpoint, enforced, since " in unwrapped(done.stdout)
    done = world("stop")
    assert (done.status, done.stdout) == (0, "imds-guard was not active: nothing to remove\n"), done
    assert f"still locked: {world.guard.sandbox.cgroup}; imds-guard stop --all removes every guard" in done.stderr
    assert world.who() == [ONE]
    assert world("stop", "--cgroup", world.guard.sandbox.cgroup).stderr == "", "who names a guard means no other"


def test_stop_of_one_guard_names_another_and_stop_all_opens_it(world: World) -> None:
    assert world("start").status == 0
    with command.guard() as other:
        lock = ("--user", str(ONE), "--ip", SERVICE)
        assert world("start", "--cgroup", other.sandbox.cgroup, *lock).status == 0
        done = world("stop")
        assert f"still locked: {other.sandbox.cgroup}; imds-guard stop --all" in done.stderr
        assert (world.who(), other.reach(STRANGER)) == ([ONE, TWO, STRANGER], "EPERM")
        assert world("stop", "--all").status == 0
        assert other.reach(STRANGER) == "connected"
        assert list(world.bpffs.glob("imds-guard*")) == []


def test_stop_for_the_unit_opens_the_guards_of_cgroups_too(world: World) -> None:
    """``systemctl stop`` leaves nothing locked and no pin. A restart of the unit leaves everything locked."""
    assert world("start").status == 0
    world.config.unlink()
    unit = ("stop", "--service", "imds-guard.service")

    def stopped(job: str) -> Result:
        asked = f"from imds_guard.commands import service\nservice.may_unlock = lambda unit: {job == 'stop'}"
        return world.run(command.argv(unit, before=f"{world.before}\n{asked}"))

    assert stopped("restart").status == 0
    assert world.who() == [ONE]
    assert stopped("stop").status == 0
    assert world.who() == [ONE, TWO, STRANGER]
    assert (traces(world.guard.sandbox.cgroup)["attached"], list(world.bpffs.glob("imds-guard*"))) == (0, [])


def test_stop_all_forgets_the_rights_of_allow_for(world: World) -> None:
    """A guard that is started there later has no right that ends."""
    assert world("start").status == 0
    number = os.stat(world.guard.sandbox.cgroup).st_ino
    assert os.path.exists(f"/run/imds-guard/command-{number}.last")
    assert world("stop", "--all").status == 0
    assert not os.path.exists(f"/run/imds-guard/command-{number}.last")


def test_the_rules_of_the_fallback_are_a_guard_too(world: World) -> None:
    """Those of the machine, beside the configured guard; then rules for forwarded packets that stand there alone."""
    machine = ("--user", str(TWO), "--ip", SERVICE)
    configuration = world.config.read_text(encoding="utf-8")
    world.config.unlink()
    assert world("start", "--backend", "iptables", *machine).status == 0
    world.write(configuration)
    assert world("start").status == 0
    text = unwrapped(world("status").answer)
    assert "also locked: the machine (iptables): 1 endpoint, enforced, since " in text
    world.guard.sandbox.call(lambda: IptablesBackend().remove())
    done = world("stop")
    assert "still locked: the machine; imds-guard stop --all" in done.stderr, done
    assert "rules for forwarded packets are; stop removes them" in unwrapped(world("status").stdout)
    assert world("stop", "--all").status == 0
    assert world.status()["guards"] == []


# --- status ---------------------------------------------------------------------------------------------------------


def test_status_says_since_when_and_whether_the_file_says_that(world: World) -> None:
    before = time.time()
    assert world("start").status == 0
    after = time.time()
    values = world.status()
    since = datetime.strptime(values["since"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc).timestamp()
    assert before - 0.1 <= since <= after + 0.1
    assert values["file"]["in_force"] is True
    assert [(one["cgroup"], one["state"]) for one in values["guards"] if one["cgroup_id"]] == [
        (world.guard.sandbox.cgroup, "in-force")
    ]
    assert f"file: {world.config} says what is in force" in unwrapped(world("status").stdout)
    assert world("allow", "--user", str(TWO)).status == 0
    assert world.status()["file"]["in_force"] is False
    assert "says another policy than the one in force" in unwrapped(world("status").stdout)


def unwrapped(text: str) -> str:
    """The text in one line."""
    return " ".join(text.split())


def test_status_shows_the_line_of_the_file_that_is_wrong(world: World) -> None:
    """Under the emergency lock, too: what locks is then in no file."""
    world.write(f"# locked\ncolour = 1\n{world.policy()}")
    cgroup = world.guard.sandbox.cgroup
    done = world("start", "--boot", "--config", str(world.config), "--cgroup", cgroup)
    assert done.status == 78, done
    done = world("status")
    text = unwrapped(done.stdout)
    assert (done.status, "emergency lock" in done.stdout.splitlines()[0]) == (1, True), done
    assert f"file: unusable: {world.config}:2: unknown key 'colour' at the top" in text
    assert "line 2: colour = 1" in text
    assert world.status()["file"]["line"] == {"file": str(world.config), "number": 2, "text": "colour = 1"}


def test_status_is_one_screen_and_verbose_has_the_hooks(world: World) -> None:
    """Of 80 columns and 24 lines, with many locks."""
    locks = [f'[lock."{n}"]\nendpoints = ["192.0.2.{n}"]\nusers = [{ONE}]\n' for n in range(1, 40)]
    world.write(f'cgroup = "{world.guard.sandbox.cgroup}"\n{"".join(locks)}')
    assert world("start").status == 0
    lines = world("status").answer.splitlines()
    assert len(lines) < LINES
    assert [line for line in lines if len(line) > COLUMNS and str(world.config) not in line] == []
    assert "connect4" not in "".join(lines)
    assert lines[-1].endswith(" more locks (--json has them all)")
    verbose = world("status", "-v").answer
    assert "  connect4: ig_c4" in verbose
    assert verbose.count("\nlock ") == 12
    assert len(world.status()["policy"]["locks"]) == 39
