# SPDX-License-Identifier: Apache-2.0
"""Everything that the manual describes exists, and everything that exists is described."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from imds_guard import cli
from imds_guard.cli.lockdown import ip_lockdown
from imds_guard.config import read as config_reader
from imds_guard.config.filters import FILTER_KEYS
from imds_guard.config.read import parse_config
from tests.tools import need
from tests.tree import every_command

MAN = Path(cli.__file__).resolve().parents[1] / "data" / "man"
COMMANDS, CONFIG = MAN / "imds-guard.8", MAN / "imds-guard.toml.5"
PAGES = (COMMANDS, CONFIG)
SHOWN = re.compile(r"(?<![\w-])Fl (?:-([a-z][a-z-]*)|([a-z]))\b")
"""The macro Fl of mdoc prints one dash before its argument."""


def parts(page: Path, macro: str) -> dict[str, str]:
    """The text below each heading. Sh is a section, Ss a subsection."""
    found: dict[str, str] = {}
    name = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        heading = re.match(r"\.(Sh|Ss) (.*)", line)
        if heading:
            name = heading[2] if heading[1] == macro else ""
        elif name:
            found[name] = f"{found.get(name, '')}{line}\n"
    return found


def described(text: str) -> set[str]:
    """The options that a list describes."""
    items = [line for line in text.splitlines() if line.startswith(".It Fl ")]
    return {f"--{long}" if long else f"-{short}" for line in items for long, short in SHOWN.findall(line)}


def synopsis(text: str) -> set[str]:
    """The options of the lines before a command's first sentence."""
    return {f"--{long}" if long else f"-{short}" for long, short in SHOWN.findall(text.split(".Pp", maxsplit=1)[0])}


def options_of(command: click.Command) -> set[str]:
    """The options that a command really has."""
    return {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}


def tree() -> dict[str, click.Command]:
    """Every command, ip-lockdown among them."""
    return {**every_command(), "ip-lockdown": ip_lockdown}


SECTIONS = {page: parts(page, "Sh") for page in PAGES}
COMMAND_TEXTS = parts(COMMANDS, "Ss")
SHARED = described(SECTIONS[COMMANDS]["OPTIONS"])


def test_the_manual_has_every_command_and_no_other() -> None:
    assert set(COMMAND_TEXTS) == set(tree())


@pytest.mark.parametrize("name", sorted(tree()))
def test_a_command_has_the_options_that_the_manual_gives_it(name: str) -> None:
    assert synopsis(COMMAND_TEXTS[name]) == options_of(tree()[name])


@pytest.mark.parametrize("name", sorted(tree()))
def test_every_option_of_a_command_is_described_once(name: str) -> None:
    own = described(COMMAND_TEXTS[name])
    options = options_of(tree()[name])
    assert own - options == set()
    assert options - own - SHARED == set()


def test_no_option_is_described_that_no_command_has() -> None:
    group = {name for parameter in cli.cli.params for name in parameter.opts}
    everywhere = {*group, *cli.cli.context_settings["help_option_names"]}
    commands = [options_of(command) - described(COMMAND_TEXTS[name]) for name, command in tree().items()]
    assert everywhere.union(*commands) == SHARED


@pytest.mark.parametrize("name", sorted(tree()))
def test_the_choices_of_an_option_are_those_that_it_takes(name: str) -> None:
    shown = dict(re.findall(r"Fl -([a-z-]+) Ar (\S+\|\S+)", COMMAND_TEXTS[name]))
    options = [parameter for parameter in tree()[name].params if isinstance(parameter, click.Option)]
    taken = {one.opts[0][2:]: "|".join(one.type.choices) for one in options if isinstance(one.type, click.Choice)}
    assert shown == taken


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("GLOBAL KEYS", config_reader.TOP_KEYS),
        ("KEYS OF A LOCK", config_reader.LOCK_KEYS),
        ("KEYS OF A FILTER", FILTER_KEYS),
    ],
)
def test_the_manual_has_every_key_and_no_other(section: str, keys: list[str]) -> None:
    assert sorted(re.findall(r"^\.It Va (\w+)$", SECTIONS[CONFIG][section], re.MULTILINE)) == sorted(keys)


def test_the_examples_of_the_configuration_are_configurations() -> None:
    examples = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$", CONFIG.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    read = [parse_config(re.sub(r'"canAccessIP"|"www-data"', '"root"', text), "example", True, "") for text in examples]
    assert [len(config.policy.locks) for config in read] == [2, 1, 1]


@pytest.mark.parametrize("line", re.findall(r"^\.Dl imds-guard (.*)", COMMANDS.read_text("utf-8"), re.MULTILINE))
def test_an_example_is_a_command_with_options_that_it_takes(line: str) -> None:
    command, *arguments = line.split()
    every_command()[command].make_context(command, arguments)


def test_it_says_what_is_not_prevented_what_it_writes_and_how_it_ends() -> None:
    assert {"FILES", "ENVIRONMENT", "EXIT STATUS", "EXAMPLES", "SECURITY CONSIDERATIONS"} <= set(SECTIONS[COMMANDS])


def test_every_exit_status_is_there() -> None:
    from imds_guard import errors

    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.GuardError)]
    items = re.findall(r"^\.It (\d[\d ,]*)$", SECTIONS[COMMANDS]["EXIT STATUS"], re.MULTILINE)
    listed = {number for item in items for number in re.findall(r"\d+", item)}
    assert {str(kind.exit_status) for kind in kinds} | {"0", "130", "143"} == listed


def test_every_unit_is_there() -> None:
    units = {path.name for path in (MAN.parent / "systemd").iterdir()}
    # The page names the timers, not the units that they run.
    assert units - {"imds-guard-verify.service", "imds-guard-metrics.service"} == set(
        re.findall(r"^\.It Pa (\S+\.(?:service|timer))$", SECTIONS[COMMANDS]["FILES"], re.MULTILINE)
    )


def test_every_variable_that_the_program_reads_is_there() -> None:
    items = re.findall(r"^\.It (Ev .*)$", SECTIONS[COMMANDS]["ENVIRONMENT"], re.MULTILINE)
    named = {name for item in items for name in re.findall(r"Ev (\w+)", item)}
    sources = [path.read_text(encoding="utf-8") for path in MAN.parents[1].rglob("*.py")]
    read = {name for text in sources for name in re.findall(r'environ(?:\.get\(|\[)"(\w+)"', text)}
    assert read <= named
    assert [name for name in named if not any(f'"{name}"' in text for text in sources)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_finds_nothing(page: Path) -> None:
    need("mandoc")
    done = subprocess.run(["mandoc", "-T", "lint", str(page)], stdout=subprocess.PIPE, text=True, check=False)
    # mandoc also reports that pages of other programs are not installed; that is no fault of ours.
    assert [line for line in done.stdout.splitlines() if "mandoc.db" not in line and "Xr" not in line] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_shows_it_without_a_warning(page: Path) -> None:
    need("man", "groff")
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", str(page)],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "NAME" in done.stdout
