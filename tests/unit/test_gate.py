# SPDX-License-Identifier: Apache-2.0
"""Linters and type checkers as tests, so that one command is the gate."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clang import BPF, INCLUDES, clang
from tests.tools import missing, need

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "run",
    ".ci/run",
    "packaging/build-deb",
    "packaging/build-image",
    "packaging/build-rpm",
    "packaging/completions",
    "packaging/image/node",
)

HOOKS = "".join(path.read_text(encoding="utf-8") for path in BPF.glob("*.[ch]"))
OFFSETS = sorted(set(re.findall(r"\bIG_OFF_\w+", HOOKS)))
"""What the loader takes from BTF: any number will do for a compiler."""


def passes(*command: str) -> None:
    """Runs a command at the root of the tree; it must end with 0."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout


def python_tool(*command: str) -> None:
    """Runs a module of the environment that the tests run in."""
    if importlib.util.find_spec(command[0]) is None:
        missing(f"{command[0]} is not installed beside pytest (pip install -e '.[test]')")
    passes(sys.executable, "-m", *command)


def test_ruff_finds_nothing() -> None:
    python_tool("ruff", "check", "--no-cache", ".")


def test_the_python_is_formatted() -> None:
    python_tool("ruff", "format", "--no-cache", "--check", "--diff", ".")


def test_the_types_are_right() -> None:
    # Folders that hold no Python yet are an error to mypy.
    folders = [
        name for name in ("src", "tests", "bench", "vagrant", "packaging/image") if any((ROOT / name).rglob("*.py"))
    ]
    python_tool("mypy", "--cache-dir=/dev/null", *folders)


def test_the_offsets_are_the_ones_that_the_loader_gives() -> None:
    from imds_guard.backends.ebpf import program

    given = {f"IG_OFF_{struct}_{member}".upper() for struct, member in program.OFFSETS}
    assert set(OFFSETS) <= given


@pytest.mark.parametrize(
    "more",
    [[], ["-DIG_DIRECT_READS"], ["-DIG_BPF_LOOP"], ["-DIG_TEST_DELAY=4096"], ["-DIG_WITHOUT_EGRESS"], ["-D__KERNEL__"]],
    ids=" ".join,
)
def test_clang_warns_of_nothing_in_the_hooks(more: list[str], tmp_path: Path) -> None:
    clang(
        *("-target", "bpf", "-O2", "-g", "-Wall", "-Wextra", "-Werror"),
        *INCLUDES,
        *(f"-D{name}=8" for name in OFFSETS),
        *more,
        *("-c", str(BPF / "imds_guard.bpf.c"), "-o", str(tmp_path / "hooks.o")),
    )


@pytest.mark.parametrize("name", sorted(path.name for path in BPF.glob("*.h")))
def test_a_header_can_be_included_alone_and_twice(name: str, tmp_path: Path) -> None:
    source = tmp_path / "twice.c"
    source.write_text(f'#include "{name}"\n#include "{name}"\n', encoding="utf-8")
    offsets = [f"-D{name}=8" for name in OFFSETS]
    clang("-target", "bpf", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *INCLUDES, *offsets, str(source))


def test_the_main_file_has_the_hooks_alone() -> None:
    """Everything else is in headers, each of which compiles without the others."""
    from imds_guard.backends.ebpf import abi

    text = (BPF / "imds_guard.bpf.c").read_text(encoding="utf-8")
    assert set(re.findall(r"^\w.*?\b(\w+)\([^;]*\)\n\{", text, re.MULTILINE)) == {
        hook.function for hook in abi.HOOKS.values()
    }


def test_the_c_is_formatted() -> None:
    """By clang-format 14 or later; bpf/include/ stands in for the kernel's headers and looks like them."""
    need("clang-format")
    ours = [str(path) for folder in (BPF, ROOT / "tests") for path in sorted(folder.rglob("*.[ch]"))]
    passes("clang-format", "--dry-run", "--Werror", *(path for path in ours if "/bpf/include/" not in path))


def test_the_hooks_of_pre_commit_are_steps_of_this_gate() -> None:
    """Who commits with pre-commit has passed the linters."""
    entries = re.findall(r"^ +entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert entries == ["ruff check", "ruff format --check --diff", "clang-format --dry-run --Werror", "shellcheck"]
    need("yamllint")
    passes("yamllint", "--strict", ".pre-commit-config.yaml")


EDITED = re.compile(r"(\.(py|c|h|toml|yaml|yml|md|service|timer)|/run|/\.editorconfig)$")


def test_files_are_as_the_editor_writes_them() -> None:
    """.editorconfig: the last line ends, no line has a space at its end, and C is indented by tabs."""
    folders = [
        ROOT / name
        for name in ("src", "tests", "bpf", "bench", "vagrant", "docs", "examples", "packaging", "deploy", ".ci")
    ]
    paths = [*ROOT.glob("*"), *ROOT.glob(".*"), *(path for folder in folders for path in folder.rglob("*"))]
    wrong = []
    for path in (path for path in paths if path.is_file() and EDITED.search(str(path))):
        text = path.read_text(encoding="utf-8")
        spaces = re.search(r"^    (?!.*\\$)", text, re.MULTILINE) if path.suffix in {".c", ".h"} else None
        if (text and not text.endswith("\n")) or re.search(r"[ \t\r]$", text, re.MULTILINE) or spaces:
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    need("shellcheck")
    passes("shellcheck", script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_run(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111 == 0o111


def sources() -> list[Path]:
    """Every file that is ours to license, outside folders that tools make."""
    folders = ("src", "tests", "bpf", "vagrant", "bench")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".c", ".h"}]
    return [path for path in found if "include" not in path.relative_to(ROOT).parts[:2]]


def test_every_source_names_its_licence_in_its_first_two_lines() -> None:
    unnamed = [
        str(path.relative_to(ROOT))
        for path in sources()
        if not any("SPDX-License-Identifier: " in line for line in path.read_text(encoding="utf-8").splitlines()[:2])
    ]
    assert unnamed == []
