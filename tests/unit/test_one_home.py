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
    r"/dev/log'|journal/socket'": "kernel/journal",
    r"SOCK_DESTROY": "kernel/sock_diag",
    r"diag\.destroy\(|\.tcp_info\(": "kernel/sock_destroy",
    r"/proc/\{[^}]*\}/stat\b": "kernel/processes",
    r"/proc/\{[^}]*\}/status\b": "kernel/processes",
}
"""What stands for it in the code -> the module."""


@pytest.mark.parametrize("sign", HOMES)
def test_it_is_in_one_module(sign: str) -> None:
    assert [name for name, code in CODE.items() if re.search(sign, code)] == [HOMES[sign]]


SAID_BY_A_PROCESS = (
    *("cmdline", "environ", "comm", "exe", "cwd", "root", "fd", "fdinfo", "task", "auxv", "mem", "pagemap"),
    *("maps", "map_files", "smaps", "smaps_rollup", "numa_maps"),
)
"""Files of /proc/PID that can hang their reader, or whose contents or number the process chooses."""


def reads_what_processes_say(code: str) -> bool:
    """By a path below /proc/PID, this process's own left out, or by a name in a directory that is opened there."""
    names = "|".join(SAID_BY_A_PROCESS)
    by_path = re.search(rf"/proc/\{{(?!os\.getpid\(\))[^}}]*\}}/({names})\b", code)
    by_name = "/proc/{" in code and re.search(rf"'({names})'", code)
    return bool(by_path or by_name)


def test_one_module_reads_what_processes_say_of_themselves() -> None:
    """The others go through the root of PID 1, or of a process that has started this one."""
    assert {name for name, code in CODE.items() if reads_what_processes_say(code)} == {
        "kernel/untrusted",
        "kernel/bpffs",
        "kernel/cgroup",
        "kernel/ownership",
    }


@pytest.mark.parametrize(
    "code",
    [
        "open(f'/proc/{pid}/cmdline')",
        "os.readlink(f'/proc/{one.pid}/fd/{number}')",
        "folder = os.open(f'/proc/{pid}', 0); os.readlink('exe', dir_fd=folder)",
    ],
)
def test_reading_what_processes_say_is_recognised(code: str) -> None:
    assert reads_what_processes_say(code)


def test_only_the_wrappers_and_bpf_know_c_types() -> None:
    """bpf(2) takes structs with pointers in them."""
    users = {name for name, code in CODE.items() if re.search(r"^(import|from) ctypes", code, re.MULTILINE)}
    assert {name for name in users if not name.startswith("kernel/bpf/")} == {"kernel/syscalls"}
