# SPDX-License-Identifier: Apache-2.0
"""Runs other programs for the matrix. Their output is shown when they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vagrant.matrix.errors import MatrixError

PACKAGES: dict[str, str] = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-aarch64": "qemu-system-arm",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "depmod": "kmod",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "newuidmap": "uidmap",
}
"""Program -> the Debian package that contains it."""


def find(name: str) -> str:
    """The absolute path of a program in PATH or in /usr/sbin, where mke2fs and depmod are."""
    path = shutil.which(name, path=_search_path())
    if path is None:
        raise MatrixError(f"{name} is not installed: apt-get install {PACKAGES.get(name, name)}")
    return path


def dies_with_us(argv: Sequence[str]) -> list[str]:
    """``argv`` with a prefix: the kernel kills the program when this process ends (PR_SET_PDEATHSIG in prctl(2))."""
    return [find("setpriv"), "--pdeathsig", "KILL", *argv]


def _search_path() -> str:
    return (os.environ.get("PATH") or "/usr/bin") + ":/usr/sbin:/usr/bin:/sbin:/bin"


def run(
    argv: Sequence[str], env: dict[str, str] | None = None, cwd: Path | None = None, deadline_s: float = 900
) -> str:
    """Runs a program to its end and returns its stdout. Raises MatrixError with its stderr when it fails."""
    merged = {**os.environ, "PATH": _search_path(), "LC_ALL": "C", **(env or {})}
    try:
        done = subprocess.run(
            [find(argv[0]), *argv[1:]],
            env=merged,
            cwd=cwd,
            timeout=deadline_s,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MatrixError(f"{' '.join(argv[:3])} did not end within {deadline_s:g} s and was killed") from error
    if done.returncode != 0:
        said = "; ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise MatrixError(f"{' '.join(argv[:3])} exited with {done.returncode}: {said or 'it printed nothing'}")
    return done.stdout
