# SPDX-License-Identifier: Apache-2.0
"""The files that run as root at boot: the program, its interpreter, the package. Who can change them is root then."""

from __future__ import annotations

import os
from collections.abc import Iterator

from imds_guard.kernel import ownership

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder of the package imds_guard."""

_MAX_FIRST_LINE = 4096


def program_open_to_others(program: str, *, lasting: bool = False) -> str | None:
    """Says where others than root can change ``program`` or its interpreter (ownership.py). Raises OSError."""
    found = (ownership.others_can_change(path, lasting=lasting) for path in _program(program))
    return next((where for where in found if where is not None), None)


def package_open_to_others(*, lasting: bool = False) -> str | None:
    """Says where others than root can change the package, or a file in it (ownership.py). Raises OSError."""
    where = ownership.others_can_change(PACKAGE, lasting=lasting)
    if where is not None:
        return where
    found = (ownership.others_can_change_entry(path, lasting=lasting) for path in _below(PACKAGE))
    return next((where for where in found if where is not None), None)


def _below(folder: str) -> Iterator[str]:
    for entry in os.scandir(folder):
        yield entry.path
        if entry.is_dir(follow_symlinks=False):
            yield from _below(entry.path)


def _program(program: str) -> Iterator[str]:
    """The program, and the interpreter that its first line names (execve(2)). Nothing for ``python3 -c``."""
    if not os.path.isfile(program):
        return
    yield program
    with open(program, "rb") as file:
        first = file.readline(_MAX_FIRST_LINE)
    words = first[2:].split() if first.startswith(b"#!") else []
    if words and os.path.exists(words[0]):
        yield os.fsdecode(words[0])
