# SPDX-License-Identifier: Apache-2.0
"""Fetches the clients into the matrix's cache: from PyPI by pip, from npm by npm, cloud-init from Debian's archive.

``python -m tests.clients.environment`` fetches them ahead, and says in one sentence what can't be had (status 69).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, NamedTuple

from vagrant.matrix import cache, table
from vagrant.matrix.archive import Suite
from vagrant.matrix.errors import MatrixError

HERE = Path(__file__).parent
UNAVAILABLE = 69
CLOUD_INIT_SUITE = "trixie"


class Unavailable(Exception):
    """A client that can't be had: one sentence."""


class Clients(NamedTuple):
    """Folders with the libraries of the clients."""

    python: Path
    node: Path
    cloud_init: Path


def fetch() -> Clients:
    """All clients. Raises Unavailable."""
    for program in ("curl", "node", "npm", "setpriv", "unshare"):
        if shutil.which(program) is None:
            package = {"node": "nodejs", "setpriv": "util-linux", "unshare": "util-linux"}.get(program, program)
            raise Unavailable(f"{program} is not installed: apt-get install {package}")
    python = _entry("python", {"requirements": _hash("requirements.txt"), "python": sys.version_info[:2]}, _pip)
    node = _entry("node", {"lock": _hash("package-lock.json")}, _npm)
    return Clients(python, node, _cloud_init())


def _hash(name: str) -> str:
    return hashlib.sha256((HERE / name).read_bytes()).hexdigest()


def _entry(name: str, recipe: dict[str, object], build: Callable[[Path], None]) -> Path:
    return cache.entry("clients", name, recipe, build)


def _pip(draft: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    wanted = ["--require-hashes", "--no-deps", "--only-binary=:all:", "--requirement", str(HERE / "requirements.txt")]
    _run("PyPI", [*command, *wanted, "--target", str(draft)])


def _npm(draft: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, draft)
    # A Node that is too old is an error here: a client would fail by it in the middle of a test.
    _run("npm", ["npm", "ci", "--engine-strict", "--ignore-scripts", "--no-audit", "--no-fund"], draft)


def _cloud_init() -> Path:
    try:
        suite = Suite(table.load().archive, CLOUD_INIT_SUITE, "amd64")
        recipe: dict[str, object] = {"cloud-init": suite.version("cloud-init")}
        return _entry("cloud-init", recipe, lambda draft: suite.unpack(_packages(suite), draft))
    except MatrixError as error:
        raise Unavailable(f"cloud-init could not be fetched from Debian's archive: {_complaint(str(error))}") from error


def _packages(suite: Suite) -> list[str]:
    """Since Debian 13 its Python code is in a package of its own for systems without a network manager."""
    return sorted({"cloud-init", *suite.names("cloud-init-base")})


def _run(registry: str, command: list[str], folder: Path | None = None) -> None:
    done = subprocess.run(
        command, cwd=folder, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise Unavailable(f"the clients could not be fetched from {registry}: {_complaint(done.stdout)}")


def _complaint(text: str) -> str:
    """Of what a program said: what npm asks of Node, else the first error of pip or npm, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    unfit = [line.removeprefix("npm error notsup ") for line in lines if line.startswith("npm error notsup ")]
    errors = [line for line in lines if line.startswith(("ERROR:", "npm error")) and "npm error code" not in line]
    return " ".join(unfit) or (errors[:1] or lines[-1:] or ["it said nothing"])[0]


def main() -> int:
    """The command."""
    try:
        fetch()
    except Unavailable as error:
        print(f"clients: {error}", file=sys.stderr)  # noqa: T201
        return UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
