# SPDX-License-Identifier: Apache-2.0
"""The commands' lock stays exclusive when its file is removed at the wrong moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imds_guard.commands import guard
from imds_guard.commands.stale_files import remove_stale_files
from imds_guard.kernel import lockfile
from imds_guard.kernel.sandbox import Sandbox

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the folder of the lock must belong to root")


def test_a_lock_on_a_file_that_is_no_longer_there_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command before removes its file after this one has opened it. The next command must find this one's lock."""
    monkeypatch.setattr(lockfile, "FOLDER", str(tmp_path))
    take = lockfile._take
    removed: list[str] = []

    def take_late(fd: int, name: str) -> bool:
        if not removed:
            lockfile.forget(name)
            removed.append(name)
        return take(fd, name)

    monkeypatch.setattr(lockfile, "_take", take_late)
    with lockfile.exclusive("command-1"):
        assert removed == ["command-1"]
        assert lockfile.attempt("command-1") is None
    fd = lockfile.attempt("command-1")
    assert fd is not None
    os.close(fd)


def test_a_step_for_another_guard_takes_the_lock_of_that_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verify of a cgroup's guard takes the emergency lock off the machine: another command may be changing that."""
    monkeypatch.setattr(lockfile, "FOLDER", str(tmp_path))
    held: list[bool] = []

    def stop_locked(_: str | None) -> list[str]:
        fd = lockfile.attempt("command")
        held.append(fd is None)
        if fd is not None:
            os.close(fd)
        return []

    monkeypatch.setattr(guard, "stop_locked", stop_locked)
    cgroup = str(tmp_path)
    with guard.one_at_a_time(cgroup):
        steps = guard.holding_the_lock(cgroup)
        steps.stop(None)
        steps.stop(cgroup)
    assert held == [True, False]


_OF_A_GUARD = ("command-{}.lock", "command-{}.last", "imds-guard-{}.lock", "watch-imds-guard-{}.sock")


def test_files_of_guards_whose_cgroup_is_gone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a cgroup that is there stay, and so do those whose lock somebody holds."""
    monkeypatch.setattr(lockfile, "FOLDER", str(tmp_path))
    with Sandbox() as there:
        stays = os.stat(there.cgroup).st_ino
        with Sandbox() as gone:
            goes = os.stat(gone.cgroup).st_ino
        for name in _OF_A_GUARD:
            (tmp_path / name.format(stays)).touch()
            (tmp_path / name.format(goes)).touch()
        others = {"command.lock", "command.last", "iptables-netns-4026531840"}
        for name in others:
            (tmp_path / name).touch()
        with lockfile.exclusive(f"watch-imds-guard-{goes}"):
            remove_stale_files()
        left = {one.name for one in tmp_path.iterdir()} - others
    held = {f"watch-imds-guard-{goes}.{end}" for end in ("lock", "sock")}
    assert left == {one.replace("{}", str(stays)) for one in _OF_A_GUARD} | held
