# SPDX-License-Identifier: Apache-2.0
"""The same machine after a reboot, until imds-guard is removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vagrant.guest import walk, world
from vagrant.guest.service import UNIT, systemctl
from vagrant.guest.test_5_walk import assert_does, who_passes
from vagrant.guest.walk import Line

CONFIG = Path("/etc/imds-guard/config.toml")
WRONG = "\ngroops = ['canAccessIP']\n"


@pytest.mark.parametrize("line", walk.AFTER_REBOOT, ids=lambda line: line.written)
def test_after_the_reboot(line: Line) -> None:
    """It is locked by the file."""
    assert_does(line)


def test_an_upgrade() -> None:
    """The lock stays as it is."""
    (wheel,) = Path("/job").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall"]
    subprocess.run([*pip, str(wheel)], check=True, env={**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1"})
    systemctl("restart", UNIT)
    assert who_passes() == walk.SAVED


def test_a_word_too_many_in_the_file() -> None:
    """An edit changes nothing by itself."""
    text = CONFIG.read_text(encoding="utf-8")
    CONFIG.write_text(f"{text}{WRONG}", encoding="utf-8")
    assert who_passes() == walk.SAVED


@pytest.mark.parametrize("line", walk.BROKEN_FILE, ids=lambda line: line.written)
def test_a_broken_file(line: Line) -> None:
    """The policy in force stays."""
    assert_does(line)


def test_the_corrected_file() -> None:
    """It is used again."""
    CONFIG.write_text(CONFIG.read_text(encoding="utf-8").replace(WRONG, ""), encoding="utf-8")
    systemctl("restart", UNIT)
    assert who_passes() == walk.SAVED


@pytest.mark.parametrize("line", walk.REMOVAL, ids=lambda line: line.written)
def test_removal(line: Line) -> None:
    """What is locked stays until it is opened."""
    assert_does(line)


def test_nothing_is_left() -> None:
    """No pin, rule or table."""
    assert world.left() == []
