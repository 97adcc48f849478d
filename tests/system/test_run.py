# SPDX-License-Identifier: Apache-2.0
"""./run, which installs what is missing: what it says, and how it ends."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from imds_guard import __version__

ROOT = Path(__file__).resolve().parents[2]


def run(words: Sequence[str], cwd: Path, script: Path = ROOT / "run", **more: str) -> subprocess.CompletedProcess[str]:
    """Runs it without what this machine's pip is told by the environment."""
    environment: dict[str, str] = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment.update(more)
    return subprocess.run([str(script), *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_it_finds_its_tree_from_anywhere(tmp_path: Path) -> None:
    """Also behind a symbolic link, and where the folder has modules that are named as ours are."""
    (tmp_path / "imds_guard.py").write_text("raise SystemExit('somebody else')")
    (tmp_path / "guard").symlink_to(ROOT / "run")
    done = run(["--version"], tmp_path, tmp_path / "guard")
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout


def test_packages_that_pip_can_not_have_are_told(tmp_path: Path) -> None:
    """With what pip says of it, and a sentence; the next run does not take what is there for an environment."""
    venv = tmp_path / "venv"
    done = run(["test"], tmp_path, IMDS_GUARD_VENV=str(venv), PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert (done.returncode, done.stdout) == (69, "")
    said = done.stderr.splitlines()
    assert said[0] == f"run: making the tests' environment in {venv} (packages from PyPI)"
    assert "No matching distribution found" in done.stderr
    assert said[-1].startswith("run: pip could not install ")
    assert not (venv / ".stamp").exists()


def test_fast_is_the_unit_tests(tmp_path: Path) -> None:
    """``test --fast`` runs tests/unit; what follows goes to pytest."""
    assert pytest_arguments(tmp_path, "--fast", "-k", "gate") == ["-m", "pytest", "tests/unit", "-k", "gate"]
    assert pytest_arguments(tmp_path, "-k", "gate") == ["-m", "pytest", "-k", "gate"]


def pytest_arguments(folder: Path, *words: str) -> list[str]:
    """The arguments that ``./run test`` starts Python with, from an environment that is up to date and prints them."""
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n", encoding="utf-8")
    python.chmod(0o755)
    version = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    (folder / ".stamp").write_text(f"{ROOT}\n{version}{digest}  -\n", encoding="utf-8")
    done = run(["test", *words], folder, IMDS_GUARD_VENV=str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()
