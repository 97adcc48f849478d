# SPDX-License-Identifier: Apache-2.0
"""What the README says exists, and what exists is in the README."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from tests.tree import every_command

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
EXAMPLES = [line for block in BLOCKS for line in block.splitlines() if line.startswith("sudo ./run ")]
SYNOPSIS = next(block for block in BLOCKS if block.startswith("imds-guard start"))
OF_RUN = ("test", "matrix")
"""Words that ./run keeps for itself."""


def words(line: str) -> list[str]:
    """An example's words after ./run, its comment left out."""
    return shlex.split(line, comments=True)[2:]


def synopsis() -> dict[str, set[str]]:
    """Command -> the options that the synopsis gives it."""
    found: dict[str, set[str]] = {}
    current: list[str] = []
    for line in SYNOPSIS.splitlines():
        begins = re.match(r"imds-guard ([a-z|-]+)", line)
        if begins:
            current = begins[1].split("|")
        elif not line.startswith(" "):
            current = []
        for name in current:
            found.setdefault(name, set()).update(re.findall(r"--[a-z][a-z-]*", line))
    return found


def options_of(command: str) -> set[str]:
    """The options that a command really has."""
    parameters = every_command()[command].params
    return {name for parameter in parameters if isinstance(parameter, click.Option) for name in parameter.opts}


def test_the_synopsis_has_every_command_and_no_other() -> None:
    assert set(synopsis()) == set(every_command())


def test_the_synopsis_has_every_option_of_start() -> None:
    assert synopsis()["start"] == options_of("start") - {"--json"}


@pytest.mark.parametrize("command", sorted(synopsis()))
def test_a_command_has_the_options_that_the_synopsis_gives_it(command: str) -> None:
    assert synopsis()[command] - options_of(command) == set()


@pytest.mark.parametrize("command", sorted(synopsis()))
def test_the_commands_that_print_json_are_those_that_it_names(command: str) -> None:
    without = re.search(r"All but ([^;]+)\stake `--json`", README)
    assert without is not None
    assert (command in without[1]) == ("--json" not in options_of(command))


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_a_command_with_options_that_it_takes(line: str) -> None:
    command, *arguments = words(line)
    if command in OF_RUN:
        return
    every_command()[command].make_context(command, list(arguments))


def test_there_are_examples() -> None:
    assert {"demo", "start", "status", "allow", "explain"} <= {words(line)[0] for line in EXAMPLES}


def test_endpoints_in_the_examples_are_endpoints() -> None:
    from imds_guard.policy.endpoint_syntax import parse_endpoint

    given = [words(line) for line in EXAMPLES]
    found = [after for line in given for option, after in zip(line, line[1:]) if option == "--ip"]
    assert [parse_endpoint(word).network.version for word in found] == [4, 4, 6]


def test_every_file_that_it_points_to_is_there() -> None:
    linked = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    listed = re.findall(r"^\| (`[^|]+) \|", README, re.MULTILINE)
    paths = linked + [path for cell in listed for path in re.findall(r"`([^`]+)`", cell) if "/" in path]
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []
    assert len(paths) > 10


def test_the_support_table_has_a_place() -> None:
    assert README.index("<!-- support-table -->") < README.index("<!-- /support-table -->")


def test_its_lines_are_short() -> None:
    assert [line for line in README.splitlines() if len(line) > 130 and not line.startswith("|")] == []
