# SPDX-License-Identifier: Apache-2.0
"""The releases whose guards this tree must take over from the kernel, and the source trees of both."""

from __future__ import annotations

import enum
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests import command, tools

ROOT = Path(__file__).resolve().parents[2]
_ABI_IN_C, _ABI_IN_PYTHON = "bpf/imds_guard.h", "src/imds_guard/backends/ebpf/abi.py"


class Release(NamedTuple):
    """One commit whose guards may be in the kernel when this tree is installed."""

    version: str
    commit: str
    """All 40 hexadecimal digits."""
    abi: int
    """IG_ABI in its bpf/imds_guard.h."""
    change: str
    """What its ABI changed since the row before."""


# A row for every release, and one for every ABI: who raises IG_ABI adds the last commit that had the old one.
# fmt: off
RELEASES = (
    Release("0.1.0", "ba54dad432bd684abb18e1c05ff89fcf2b9962a5", abi=2, change="the first release"),
    Release("last-of-abi-2", "8abe781f29c9eda66b6030d479b13a47a27c4ab2", abi=2, change="none: the commit before ABI 3"),
)
# fmt: on


class Variant(enum.Enum):
    """A release and this tree as they are, or with a change that makes the two differ on purpose."""

    AS_RELEASED = "as released"
    OTHER_MAP_SIZE = "other map size"
    """A map of the release's tree has another size."""
    NEXT_ABI = "next ABI"
    """This tree has the next ABI number: the maps have the same sizes, and their records may mean something else."""


class Tree:
    """A source tree whose command is run as a process of its own: two versions never meet in one interpreter."""

    def __init__(self, sources: str) -> None:
        self._sources = sources

    def __call__(self, *arguments: str) -> command.Result:
        """Runs ``imds-guard`` of this tree with these arguments to its end."""
        check = f"import imds_guard; assert imds_guard.__file__.startswith({self._sources!r}), imds_guard.__file__"
        return command.run(command.argv(arguments, path=(self._sources,), before=check))


class Pair(NamedTuple):
    """The trees of a test."""

    old: Tree
    """The release."""
    new: Tree
    """This tree, or a changed copy of it."""


def pair(release: Release, variant: Variant, folder: Path) -> Pair:
    """Both trees, with copies in an empty folder. Skips the test where the release's commit is not to be had."""
    old = folder / "old"
    old.mkdir()
    extract(release, old)
    if variant is Variant.OTHER_MAP_SIZE:
        _replace(old / _ABI_IN_PYTHON, r"MEMBERS = \d+", "MEMBERS = 131072")
    new = Tree(command.SOURCES)
    if variant is Variant.NEXT_ABI:
        new = _with_next_abi(folder / "new")
    return Pair(Tree(str(old / "src")), new)


def extract(release: Release, folder: Path) -> None:
    """The programs and the package of a release, in a folder that is there."""
    _require(release)
    archive = folder / "tree.tar"
    _run(*_git(), "archive", f"--output={archive}", release.commit, "bpf", "src")
    _run("tar", "-xf", str(archive), "-C", str(folder))
    archive.unlink()


def abi_of(tree: Path) -> int:
    """IG_ABI of a tree."""
    found = re.findall(r"(?m)^#define IG_ABI (\d+)$", (tree / _ABI_IN_C).read_text(encoding="utf-8"))
    assert len(found) == 1, found
    return int(found[0])


def _git() -> tuple[str, ...]:
    """Root may read a clone that somebody else owns: it runs that clone's tests, too."""
    return ("git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT))


def _require(release: Release) -> None:
    tools.need("git", "tar")
    asked = subprocess.run(
        (*_git(), "cat-file", "-e", f"{release.commit}^{{commit}}"), capture_output=True, check=False
    )
    if asked.returncode:
        tools.missing(
            f"commit {release.commit} (release {release.version}) is not in a git repository at {ROOT}: "
            "this is a shallow clone, a source archive or an installed package"
        )


def _with_next_abi(folder: Path) -> Tree:
    for name in ("bpf", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    number = abi_of(folder) + 1
    _replace(folder / _ABI_IN_PYTHON, r"ABI = \d+", f"ABI = {number}")
    _replace(folder / _ABI_IN_C, r"#define IG_ABI \d+", f"#define IG_ABI {number}")
    return Tree(str(folder / "src"))


def _replace(path: Path, line: str, by: str) -> None:
    """Replaces the one whole line that matches; the text must differ afterwards."""
    before = path.read_text(encoding="utf-8")
    after, times = re.subn(f"(?m)^{line}$", by, before)
    assert times == 1, f"{times} lines of {path} match {line!r}"
    assert after != before, f"{path} has {by!r} already"
    path.write_text(after, encoding="utf-8")


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, check=False, text=True)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
