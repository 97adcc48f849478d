# SPDX-License-Identifier: Apache-2.0
"""Which part may import which; imports go one way."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import imds_guard
from imds_guard.cli.group import MODULES, cli
from tests.tree import every_command

ROOT = Path(imds_guard.__file__).parent


def module_name(path: Path) -> str:
    parts = ("imds_guard", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES: dict[str, ast.Module] = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))
}
"""Module name -> its syntax tree."""


def imports_of(name: str) -> frozenset[str]:
    """Every module that a module imports, also inside functions, but not for types alone."""
    found: set[str] = set()
    for node in _nodes(SOURCES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            base = str(node.module)
            inner = {f"{base}.{alias.name}" for alias in node.names} & set(SOURCES)
            # "from imds_guard.kernel import bpf" means the module bpf, unless the package has more to give.
            found |= inner | ({base} if len(inner) < len(node.names) else set())
    return frozenset(found)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not _is_for_types(child):
            yield child
            yield from _nodes(child)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def ours(name: str) -> list[str]:
    return sorted(other for other in imports_of(name) if other.split(".")[0] == "imds_guard")


def below(package: str) -> list[str]:
    """A package's modules, itself included."""
    return [name for name in SOURCES if name == package or name.startswith(package + ".")]


def importers_of(package: str) -> list[str]:
    """The modules that import a package or something in it."""
    return [
        name
        for name in SOURCES
        if any(other == package or other.startswith(package + ".") for other in imports_of(name))
    ]


def layer(name: str) -> str:
    """The part that a module belongs to: ``kernel``, ``backends``, ``policy``, ``cli``, ..."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def layers_below(package: str) -> set[str]:
    """The other parts that a package knows."""
    known = {layer(other) for name in below(package) for other in ours(name)}
    return known - {layer(package)}


def test_modules_were_found() -> None:
    assert {"imds_guard.cli", "imds_guard.policy.model", "imds_guard.kernel.bpf"} <= set(SOURCES)


LAYERS: dict[str, str] = {
    "errors": "",
    "text": "",
    "policy": "errors text",
    "kernel": "errors text",
    "identity": "errors text kernel policy",
    "backends": "errors text policy kernel",
    "config": "errors text policy kernel identity",
    "export": "errors text policy kernel identity backends",
    "connections": "errors text policy kernel identity",
    "filter": "errors text policy kernel",
    "watch": "errors text policy kernel identity backends filter",
    "commands": "errors text policy kernel identity backends config export connections filter watch",
    "present": "errors text policy kernel identity backends config connections watch commands",
    "cli": "errors text policy kernel identity backends config export connections filter watch commands present",
}
"""Folder or module -> what it may import. The package itself is free: its version, the path of the configuration."""


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_imports_go_one_way(name: str) -> None:
    """A folder imports only from what its line names, and a line names only what stands above it."""
    allowed = LAYERS[name].split()
    assert layers_below(f"imds_guard.{name}") - {""} <= set(allowed)
    assert set(allowed) <= set(list(LAYERS)[: list(LAYERS).index(name)])


def test_every_folder_and_module_has_a_line() -> None:
    assert {layer(name) for name in SOURCES} - {"", "__main__"} == set(LAYERS)


@pytest.mark.parametrize(("one", "other"), [("ebpf", "iptables"), ("iptables", "ebpf")])
def test_a_backend_does_not_import_the_other(one: str, other: str) -> None:
    known = {name for module in below(f"imds_guard.backends.{one}") for name in ours(module)}
    assert known.isdisjoint(below(f"imds_guard.backends.{other}"))


def test_only_the_entry_point_imports_cli() -> None:
    outside = [name for name in importers_of("imds_guard.cli") if layer(name) != "cli"]
    assert outside == ["imds_guard.__main__"]


@pytest.mark.parametrize(
    ("package", "importers"),
    [
        ("click", [name for name in importers_of("click") if layer(name) == "cli"]),
        ("bcc", ["imds_guard.kernel.compiler"]),
        # Elsewhere it may read all that a process says of itself, whatever its length, and follow links.
        ("psutil", ["imds_guard.kernel.processes"]),
        ("prometheus_client", ["imds_guard.commands.metrics"]),
        ("subprocess", ["imds_guard.kernel.run"]),
        ("ctypes", [name for name in importers_of("ctypes") if layer(name) == "kernel"]),
        ("logging", []),
        ("h11", ["imds_guard.filter.upstream"]),
        ("asyncio", [name for name in importers_of("asyncio") if layer(name) == "filter"]),
    ],
)
def test_a_package_has_one_door(package: str, importers: list[str]) -> None:
    assert importers_of(package) == importers


STARTS_PROGRAMS = frozenset(
    f"os.{name}"
    for name in (
        *("system", "popen", "startfile", "posix_spawn", "posix_spawnp"),
        *(f"exec{ending}" for ending in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
        *(f"spawn{ending}" for ending in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
    )
)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"imds_guard.kernel.run"}))
def test_nothing_else_starts_programs(name: str) -> None:
    called = {ast.unparse(node.func) for node in ast.walk(SOURCES[name]) if isinstance(node, ast.Call)}
    assert called.isdisjoint(STARTS_PROGRAMS)


SHELLS = frozenset(("sh", "bash", "dash", "ash", "env", "xargs", "eval"))


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_nothing_is_run_through_a_shell(name: str) -> None:
    """Neither by subprocess's option, nor as the first word of a list of words."""
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Call):
            assert "shell" not in {keyword.arg for keyword in node.keywords}
        if isinstance(node, ast.List) and node.elts and isinstance(node.elts[0], ast.Constant):
            assert str(node.elts[0].value).rpartition("/")[2] not in SHELLS


def test_no_module_knows_itself_by_way_of_others() -> None:
    remaining = {name: {other for other in ours(name) if other in SOURCES and other != name} for name in SOURCES}
    while True:
        free = [name for name, known in remaining.items() if not known & set(remaining)]
        if not free:
            break
        for name in free:
            del remaining[name]
    assert remaining == {}


def imported_by(statement: str, after: str = "") -> set[str]:
    """Our modules, and the top-level ones of others, that a fresh interpreter gets by a statement ``after`` another."""
    added = "{n if n.startswith('imds_guard') else n.split('.')[0] for n in set(sys.modules) - before}"
    program = f"import sys\n{after}\nbefore = set(sys.modules)\n{statement}\nadded = {added}\nimport json\n"
    program += "print(json.dumps(sorted(added)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "module",
    ["imds_guard.backends.ebpf", "imds_guard.backends.choose", "imds_guard.commands.guard", "imds_guard.config.read"],
)
def test_changing_a_policy_does_not_pay_for_the_compiler_or_for_looking_at_processes(module: str) -> None:
    assert imported_by(f"import {module}").isdisjoint({"bcc", "psutil", "click"})


SLOW = frozenset(
    ("bcc", "dataclasses", "psutil", "prometheus_client", "tomllib", "tomlkit", "json", "subprocess", "shutil")
)
"""What a command that does not need it must not wait for."""


def run_by(*words: str) -> set[str]:
    """As imported_by(), of a call of the command line, however it ends, beside what click itself takes."""
    quietly = "contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())"
    call = f"with contextlib.suppress(SystemExit), {quietly}: imds_guard.cli.main({list(words)!r})"
    return imported_by(f"import imds_guard.cli\n{call}", "import click, contextlib, io")


def test_the_command_line_imports_no_command_that_is_not_called() -> None:
    imported = run_by("--version")
    assert {name.partition(".")[2] for name in imported if name.startswith("imds_guard.")} == {
        *("cli", "cli.group", "cli.output", "cli.streams", "errors"),
    }
    assert imported.isdisjoint(SLOW | {"ctypes", "hashlib", "socket", "tempfile"})


def test_every_module_of_commands_is_known_by_their_names() -> None:
    modules = {f"imds_guard.cli.{name}" for name in MODULES.values()}
    assert modules == {name for name in SOURCES if "imds_guard.cli.group" in imports_of(name)} - {
        "imds_guard.cli",
        "imds_guard.cli.output",
    }
    assert set(every_command()) == set(MODULES) == set(cli.commands)


def test_a_look_at_the_guard_imports_neither_what_changes_it_nor_a_configuration() -> None:
    imported = run_by("status", "--cgroup", "/nowhere")
    assert "imds_guard.backends.ebpf" in imported or os.geteuid() != 0
    ours = ("backends.iptables", "config.read", "connections.cut", "kernel.compiler", "kernel.sandbox")
    more = ("backends.ebpf.program", "commands.demo", "commands.guard", "commands.preflight")
    assert imported.isdisjoint(SLOW | {f"imds_guard.{name}" for name in (*ours, *more)})


def test_the_policy_imports_nothing_but_the_standard_library_and_errors() -> None:
    imported = imported_by("import imds_guard.policy.decide")
    found = {name.partition(".")[2] for name in imported if name.startswith("imds_guard.")}
    filters = {"policy.filter_address", "policy.filters"}
    assert found == {"errors", "policy", "policy.decide", "policy.model", "policy.ports"} | filters
    assert imported.isdisjoint({"ctypes", "subprocess", "bcc", "psutil", "click"})


class _ValuesOnly(ast.NodeTransformer):
    """Removes annotations, which ``from __future__ import annotations`` keeps from being evaluated."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return ast.Expr(node.value) if node.value is not None else None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        self.generic_visit(node)
        return node


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_no_type_is_joined_with_none_at_run_time(name: str) -> None:
    """``str | None`` is a TypeError before Python 3.10, unless it is an annotation."""
    values = _ValuesOnly().visit(ast.parse(ast.unparse(SOURCES[name])))
    joined = [node for node in ast.walk(values) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)]
    nones = [node for node in joined if isinstance(node.right, ast.Constant) and node.right.value is None]
    assert [ast.unparse(node) for node in nones] == []
