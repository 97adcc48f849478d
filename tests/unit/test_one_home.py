# SPDX-License-Identifier: Apache-2.0
"""What the boundary to the kernel has once is in one module, and nowhere else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import imds_guard

ROOT = Path(imds_guard.__file__).parent
SOURCES = {
    path.relative_to(ROOT).with_suffix("").as_posix(): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")
}


def code_of(text: str) -> str:
    """The module without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_docstring(one)] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


CODE = {name: code_of(text) for name, text in SOURCES.items()}

HOMES = {
    r"\bCDLL\b": "kernel/syscalls",
    r"\bget_errno\b": "kernel/syscalls",
    r"\bos\.fork(pty)?\b|from os import .*\bfork": "kernel/children",
    r"'x86_64'": "kernel/syscall_numbers",
    str(0xEFFFFFFC): "kernel/namespaces",
    str(0xEFFFFFFD): "kernel/namespaces",
    r"open\(.*/mountinfo": "kernel/mounts",
    r"'=IHHII'": "kernel/netlink",
    r"\bstat\.S_IW": "kernel/ownership",
    r"st_uid [!=]= 0": "kernel/ownership",
}
"""What stands for it in the code -> the module."""


@pytest.mark.parametrize("sign", HOMES)
def test_it_is_in_one_module(sign: str) -> None:
    assert [name for name, code in CODE.items() if re.search(sign, code)] == [HOMES[sign]]


def test_only_the_wrappers_and_bpf_know_c_types() -> None:
    """bpf(2) takes structs with pointers in them."""
    users = {name for name, code in CODE.items() if re.search(r"^(import|from) ctypes", code, re.MULTILINE)}
    assert {name for name in users if not name.startswith("kernel/bpf/")} == {"kernel/syscalls"}
