# SPDX-License-Identifier: Apache-2.0
"""Drop-ins of the configuration through the commands: they lock, a bad one changes nothing, --save finds its file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import command
from tests.command import NEIGHBOUR, ONE, SERVICE, STRANGER, TWO, Guard, Result

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

MAIN = f'[lock.web]\nendpoints = ["{SERVICE}"]\nusers = [{ONE}]\n'
TEAM = f'# theirs\n[lock.team]\nendpoints = ["{NEIGHBOUR}"]\nusers = [{TWO}]\n'


class Configured:
    """A guard, and the configuration of its commands."""

    def __init__(self, guard: Guard, folder: Path) -> None:
        self.guard = guard
        self.file = folder / "config.toml"
        self.file.write_text(MAIN, encoding="utf-8")
        self.drop_in = folder / "config.d" / "team.toml"
        self.drop_in.parent.mkdir()
        self.drop_in.write_text(TEAM, encoding="utf-8")

    def __call__(self, *words: str) -> Result:
        """Runs a command for which this is the machine's configuration."""
        known = f"source.DROP_INS[{str(self.file)!r}] = {str(self.drop_in.parent)!r}"
        arguments = [*self.guard.arguments(*words), "--config", str(self.file)]
        return command.run(command.argv(arguments, before=f"from imds_guard.config import source; {known}"))

    def who(self, address: str) -> list[int]:
        """Who reaches the address."""
        return [uid for uid in (ONE, TWO, STRANGER) if self.guard.reach(uid, address) == "connected"]


@pytest.fixture
def configured() -> Iterator[Configured]:
    folder = Path(tempfile.mkdtemp(dir="/run", prefix="imds-guard-test-"))
    try:
        with command.guard() as guard:
            yield Configured(guard, folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("words", [("start",), ("start", "--boot")])
def test_a_drop_in_locks(configured: Configured, words: tuple[str, ...]) -> None:
    assert configured(*words).status == 0
    assert (configured.who(SERVICE), configured.who(NEIGHBOUR)) == ([ONE], [TWO])


def test_a_bad_drop_in_changes_nothing(configured: Configured) -> None:
    configured("start")
    configured.drop_in.write_text(TEAM + "user = [1]\n", encoding="utf-8")
    for words in (("start",), ("start", "--boot")):
        done = configured(*words)
        assert (done.status, f"{configured.drop_in}:5: unknown key 'user'" in done.stderr) == (78, True)
    assert (configured.who(SERVICE), configured.who(NEIGHBOUR)) == ([ONE], [TWO])


def test_check_names_the_file_and_the_line(configured: Configured) -> None:
    configured.drop_in.write_text(TEAM + "user = [1]\n", encoding="utf-8")
    done = configured("check")
    assert (done.status, f"{configured.drop_in}:5: unknown key 'user'" in done.stderr) == (78, True)


def test_one_of_others_is_not_used_at_boot(configured: Configured) -> None:
    """Then everything is locked for all but root, since nobody can tell what was meant."""
    os.chown(configured.drop_in, TWO, TWO)
    done = configured("start", "--boot")
    assert (done.status, "can be changed by others than root" in done.stderr) == (78, True)
    assert configured.guard.status()["emergency"]
    assert f"at boot {configured.drop_in} would not be used" in configured("start").stderr


def test_save_changes_the_file_in_which_the_lock_stands(configured: Configured) -> None:
    pytest.importorskip("tomlkit")
    configured("start")
    saving = ("--save", "--without-root")
    allowed = configured("allow", "--user", str(STRANGER), "--ip", NEIGHBOUR, *saving)
    assert allowed.status == 0
    # The first save also writes the cgroup of the guard, a key of the file itself.
    said = " ".join(allowed.answer.split())
    assert f"saved the policy to {configured.file} and {configured.drop_in}" in said
    assert configured.file.read_text(encoding="utf-8").endswith(MAIN), "only the cgroup is new"
    assert "# theirs" in configured.drop_in.read_text(encoding="utf-8")
    configured.guard("stop")
    configured("start")
    assert (configured.who(SERVICE), configured.who(NEIGHBOUR)) == ([ONE], [TWO, STRANGER])
