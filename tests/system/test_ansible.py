# SPDX-License-Identifier: Apache-2.0
"""The play of examples/ansible, run for real in a root of its own: an overlay over this machine's, and no network.

No systemd runs there, so Ansible only enables the units. In the guests of the matrix the service itself is tested.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.system.test_packages import ROOT, deb, source
from tests.tools import need

__all__ = ["deb", "source"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes a root of its own")

_TIMEOUT_S = 300
_ENTER = """
set -e
mount -t tmpfs tmpfs {at}
mkdir {at}/upper {at}/work {at}/root
mount -t overlay -o lowerdir=/,upperdir={at}/upper,workdir={at}/work overlay {at}/root
mount -t proc proc {at}/root/proc
mount --rbind /dev {at}/root/dev
mount -t tmpfs tmpfs {at}/root/run
mount -t tmpfs tmpfs {at}/root/tmp
cp -r {play} {at}/root/tmp/play
exec sleep infinity
"""


class Root(NamedTuple):
    """Namespaces with a root of its own. ``play``: the folder of the play in it, seen from here."""

    pid: int
    path: str

    @property
    def seen(self) -> Path:
        return Path(f"/proc/{self.pid}/root{self.path}")

    def run(self, *command: str, status: int = 0) -> str:
        """What a command in it prints."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "chroot", self.path]
        done = subprocess.run(
            [*enter, "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def play(self, *options: str, status: int = 0, more: str = "") -> dict[str, int]:
        """The counts of the recap: ok, changed, failed, ... No machine but the first may have been touched."""
        command = ("ansible-playbook", "-i", f"localhost,{more}", "-c", "local", "/tmp/play/playbook.yml", *options)
        _, recap = self.run(*command, status=status).split("PLAY RECAP")
        ((machine, counts),) = re.findall(r"^(\S+) +: (ok=.*)$", recap, re.MULTILINE)
        assert machine == "localhost"
        return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", counts)}


@pytest.fixture(scope="module")
def root(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    need("ansible-playbook", "unshare", "nsenter")
    play = tmp_path_factory.mktemp("play") / "play"
    shutil.copytree(ROOT / "examples" / "ansible", play)
    shutil.copy(deb, play / "imds-guard_0.1.0_all.deb")
    # The machine's package lists are as old as they are: without a network there are no newer ones.
    text = (play / "playbook.yml").read_text(encoding="utf-8")
    (play / "playbook.yml").write_text(text.replace("update_cache: true", "update_cache: false"), encoding="utf-8")
    at = tmp_path_factory.mktemp("root")
    script = _ENTER.format(at=at, play=play)
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-c", script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as outside:
        try:
            yield Root(_inside(outside), f"{at}/root")
        finally:
            outside.kill()


def _inside(outside: subprocess.Popen[str]) -> int:
    """The process that sleeps in the namespaces."""
    children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children")
    while outside.poll() is None:
        for pid in children.read_text(encoding="ascii").split():
            if Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip() == "sleep":
                return int(pid)
    assert outside.stderr is not None
    raise AssertionError(outside.stderr.read())


def test_the_play_from_nothing_to_enforce(root: Root) -> None:
    """One after the other, as a roll-out goes: audit, the same once more, enforce, a file that can't be used.

    The failure on the first of three machines leaves the other two alone.
    """
    configuration = root.seen / "etc/imds-guard/config.toml"
    assert not configuration.exists()

    first = root.play("-e", "imds_guard_mode=audit")
    assert first["changed"] >= 4
    assert 'mode = "audit"' in configuration.read_text(encoding="utf-8")
    assert "canAccessIP" in root.run("getent", "group", "canAccessIP")
    enabled = root.seen / "etc/systemd/system/sysinit.target.wants/imds-guard.service"
    assert enabled.is_symlink()

    again = root.play("-e", "imds_guard_mode=audit")
    assert (again["changed"], again["failed"]) == (0, 0)

    enforced = root.play()
    assert (enforced["changed"], enforced["failed"]) == (1, 0)
    text = configuration.read_text(encoding="utf-8")
    assert "mode" not in text

    bad = root.play("-e", "imds_guard_mode=enfroce", status=2, more="second,third")
    assert (bad["changed"], bad["failed"]) == (0, 1)
    assert configuration.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(("machines", "batches"), [(1, 1), (2, 2), (20, 3)])
def test_one_machine_then_a_tenth_then_the_rest(machines: int, batches: int) -> None:
    """Each batch begins the play again. No task runs here: none has the tag."""
    need("ansible-playbook")
    inventory = "".join(f"m{number}," for number in range(machines))
    play = ROOT / "examples" / "ansible" / "playbook.yml"
    done = subprocess.run(
        ["ansible-playbook", "-i", inventory, "-c", "local", "--tags", "nothing", str(play)],
        env={**os.environ, "ANSIBLE_GATHERING": "explicit"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
    )
    assert done.stdout.count("\nPLAY [") == batches
