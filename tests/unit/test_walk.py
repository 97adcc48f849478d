# SPDX-License-Identifier: Apache-2.0
"""Every command of README.md and docs/operations.md is run in a guest, or vagrant/guest/walk.py says why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vagrant.guest import walk

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = r"(?:\./run|imds-guard|ip-lockdown|systemctl|journalctl|apt|packaging/|rm -r)"
_IN_BLOCK = re.compile(rf"(?:sudo )?({_PROGRAM}.*)")
_IN_TEXT = re.compile(rf"`(?:sudo )?({_PROGRAM}[^`]*[ /][^`]+)`")
_SYNOPSIS = re.compile(r"^## Commands\n\n```\n.*?^```\n", re.MULTILINE | re.DOTALL)


def commands_of(page: str) -> set[str]:
    """The commands in the blocks and in the text of a page; the synopsis of all commands is none."""
    text, found = _SYNOPSIS.sub("", (ROOT / page).read_text(encoding="utf-8")), set()
    for number, part in enumerate(re.split(r"^```\w*$", text, flags=re.MULTILINE)):
        if number % 2:
            found |= {match[1] for match in map(_IN_BLOCK.match, part.splitlines()) if match}
        else:
            found |= set(_IN_TEXT.findall(" ".join(part.split())))
    return {re.sub(r" +#.*", "", re.sub(r"^\./run", "imds-guard", one)) for one in found}


COMMANDS = {page: commands_of(page) for page in ("README.md", "docs/operations.md")}


def test_the_pages_have_commands() -> None:
    """So that an expression that finds nothing is noticed."""
    assert "imds-guard start --group canAccessIP --create-group" in COMMANDS["README.md"]
    assert {"systemctl reload imds-guard", "imds-guard verify --repair"} <= COMMANDS["docs/operations.md"]


@pytest.mark.parametrize(("page", "command"), [(page, one) for page in COMMANDS for one in sorted(COMMANDS[page])])
def test_each_command_is_walked(page: str, command: str) -> None:
    assert command in walk.NOT_WALKED or command in {line.written for line in walk.WALKED}


def test_what_is_not_walked_is_in_a_page() -> None:
    every = set().union(*COMMANDS.values())
    assert walk.NOT_WALKED.keys() <= every
    assert walk.NOT_WALKED.keys().isdisjoint(line.written for line in walk.WALKED)


def test_each_test_that_is_named_exists() -> None:
    for reason in walk.NOT_WALKED.values():
        for name in re.findall(r"(?:tests|vagrant)/[\w/.]+\w", reason):
            assert (ROOT / name).exists(), name
