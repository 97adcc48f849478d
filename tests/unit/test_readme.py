# SPDX-License-Identifier: Apache-2.0
"""The Markdown pages: what they name exists, and every command is described."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from tests.tree import every_command

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", TEXTS[page], re.MULTILINE | re.DOTALL)


def lines_that_begin_with(*beginnings: str) -> list[str]:
    """Lines of the code blocks of all pages, without duplicates."""
    lines = [line for page in PAGES for block in blocks(page) for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith(beginnings)})


EXAMPLES = lines_that_begin_with("sudo ./run ", "sudo imds-guard ")
SYNOPSIS = next(block for block in blocks(OPERATIONS) if block.startswith("imds-guard start"))
OF_RUN = ("test", "matrix")
"""Arguments that ./run does not pass on to imds-guard."""


def arguments(line: str) -> list[str]:
    """An example's arguments after the program, without its comment."""
    words = shlex.split(line, comments=True)
    return words[words.index("./run" if "./run" in words else "imds-guard") + 1 :]


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


# --- commands -------------------------------------------------------------------------------------------------------


def test_the_synopsis_has_every_command_and_no_other() -> None:
    assert set(synopsis()) == set(every_command())


def test_the_synopsis_has_every_option_of_start() -> None:
    assert synopsis()["start"] == options_of("start") - {"--json"}


@pytest.mark.parametrize("command", sorted(synopsis()))
def test_a_command_has_the_options_that_the_synopsis_gives_it(command: str) -> None:
    assert synopsis()[command] - options_of(command) == set()


@pytest.mark.parametrize("command", sorted(synopsis()))
def test_the_page_names_the_commands_without_json(command: str) -> None:
    without = re.search(r"All but ([^;]+?)\stake\s`--json`", TEXTS[OPERATIONS])
    assert without is not None
    assert (f"`{command}`" in without[1]) == ("--json" not in options_of(command))


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_a_command_with_options_that_it_takes(line: str) -> None:
    command, *rest = arguments(line)
    if command in OF_RUN:
        return
    every_command()[command].make_context(command, list(rest))


def test_there_are_examples() -> None:
    assert {"demo", "start", "status", "allow", "explain", "report", "stop"} <= {arguments(one)[0] for one in EXAMPLES}


def test_endpoints_in_the_examples_are_endpoints() -> None:
    from imds_guard.policy.endpoint_syntax import parse_endpoint

    given = [arguments(line) for line in EXAMPLES]
    found = {after for line in given for option, after in zip(line, line[1:]) if option == "--ip"}
    assert {parse_endpoint(text).network.version for text in found} == {4, 6}


# --- links and paths ------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings have on a web page: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else (page.parent / path).resolve()
        if not there.exists() or (anchor and anchor not in anchors(there.read_text(encoding="utf-8"))):
            wrong.append(target)
    assert wrong == []


def exists(path: str, bases: tuple[Path, ...]) -> bool:
    return any(list(base.glob(path.rstrip("/"))) for base in bases)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_of_the_source_exists(page: Path) -> None:
    """A path is what stands in backticks and begins with a folder of the tree, of the package or of the tests."""
    bases = (ROOT, ROOT / "src" / "imds_guard", ROOT / "tests")
    folders = {path.name for base in bases for path in base.iterdir() if path.is_dir()}
    prose = re.sub(r"^```\n.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    named = {
        text
        for code in re.findall(r"`([^`\n]+)`", prose)
        for text in code.split()
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]*)+", text)
        and text.split("/")[0] in folders
        # The kernel has a folder of this name, too.
        and not re.fullmatch(r"kernel/.*\.[ch]", text)
    }
    assert [path for path in sorted(named) if not exists(path, bases)] == []


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)\)", TEXTS[README])}
    assert [path.name for path in PAGES if path.parent == ROOT / "docs" and path not in linked] == []


def rows_of(page: str, table: str) -> list[list[str]]:
    """The cells of a table between two comments, without its head."""
    text = TEXTS[ROOT / page].split(f"<!-- {table} -->")[1].split(f"<!-- /{table} -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]


def named_in(page: str, table: str) -> list[str]:
    """What stands in backticks in the first column of a table."""
    return [text for row in rows_of(page, table) for text in re.findall(r"`([^`]+)`", row[0])]


def test_the_page_has_every_method_of_a_backend() -> None:
    from imds_guard.backends import Backend

    methods = [name for name, member in vars(Backend).items() if callable(member) and not name.startswith("_")]
    assert named_in("docs/architecture.md", "backend") == methods


def test_the_page_has_every_part_of_the_program() -> None:
    assert set(named_in("docs/architecture.md", "program")) == {path.name for path in (ROOT / "bpf").glob("*.h")}


def test_the_code_names_the_kernel_source_that_the_page_says() -> None:
    rows = rows_of("docs/architecture.md", "kernel")
    assert len(rows) > 5
    for sources, _, code in rows:
        names = re.findall(r"`([^`]+)`", code)
        paths = [ROOT / name if name.startswith("bpf/") else ROOT / "src" / "imds_guard" / name for name in names]
        text = "".join(path.read_text(encoding="utf-8") for path in paths)
        assert [source for source in re.findall(r"`([^`]+)`", sources) if source not in text] == []


# --- the alerts -----------------------------------------------------------------------------------------------------


def source_text() -> str:
    """All string literals of the package's source, with adjacent literals joined."""
    texts = (path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))


def test_every_status_that_the_alerts_explain_is_one_that_status_prints() -> None:
    quoted = named_in("docs/operations.md", "status words")
    source = source_text()
    assert [text for text in quoted if not all(part in source for part in text.split(": "))] == []
    assert len(quoted) > 8


def test_the_page_has_every_reason_of_a_denial() -> None:
    from imds_guard.policy.decide import Reason

    assert sorted(named_in("docs/operations.md", "reasons")) == sorted(
        reason.label for reason in Reason if not reason.permits
    )


# --- form -----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(TEXTS[README].splitlines()) <= 150


def test_the_support_tables_have_a_place() -> None:
    assert "<!-- support-by-kernel -->" in TEXTS[README]
    assert "<!-- support-table -->" in TEXTS[ROOT / "docs" / "platforms.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page: Path) -> None:
    assert [
        line for line in TEXTS[page].splitlines() if len(line) > 130 and not re.match(r"\||!\[|\[[^]]+\]: http", line)
    ] == []
