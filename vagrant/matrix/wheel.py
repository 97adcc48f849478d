# SPDX-License-Identifier: Apache-2.0
"""Builds the wheel under test from a tree, and fetches the test tools for guests, which have no network."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from vagrant.matrix import cache
from vagrant.matrix.process import run

_PARTS = ("pyproject.toml", "README.md", "src", "bpf")
"""The files and folders that the wheel is built from."""


def build(tree: Path) -> Path:
    """The wheel of a tree. It is built in a copy of the tree, unless the cache has one of the same content."""
    recipe = {"content": _content_hash(tree), "python": sys.version_info[:2]}
    folder = cache.entry("wheels", "imds-guard", recipe, lambda draft: _build(tree, draft))
    (wheel,) = folder.glob("*.whl")
    return wheel


def _build(tree: Path, draft: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for part in _PARTS:
            source = tree / part
            if source.is_dir():
                shutil.copytree(source, Path(scratch, part), ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy2(source, scratch)
        run(_pip("wheel", "--no-deps", "--wheel-dir", str(draft), scratch))


def test_tools(requirements: Sequence[str], python: str) -> Path:
    """A folder for PYTHONPATH with pytest and its dependencies, for the given version of Python.

    Even with --python-version pip evaluates environment markers for its own Python, so kernels.toml lists all
    dependencies and pip resolves none (--no-deps).
    """
    recipe = {"requirements": list(requirements), "python": python}
    return cache.entry("tools", f"python-{python}", recipe, lambda draft: _fetch(requirements, python, draft))


def _fetch(requirements: Sequence[str], python: str, draft: Path) -> None:
    wanted = ["--only-binary=:all:", "--no-deps", "--no-compile", "--python-version", python, "--target", str(draft)]
    run(_pip("install", *wanted, *requirements))


def _pip(*arguments: str) -> Sequence[str]:
    return [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]


def _content_hash(tree: Path) -> str:
    content = hashlib.sha256()
    for part in _PARTS:
        for path in _files(tree / part):
            content.update(f"{path.relative_to(tree)}\0{path.stat().st_size}\0".encode())
            content.update(path.read_bytes())
    return content.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
