# SPDX-License-Identifier: Apache-2.0
"""System call numbers by architecture, for 64-bit and 32-bit programs."""

from __future__ import annotations

import ast
import ctypes
import errno
import os
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from imds_guard.backends.ebpf import hooks, probe
from imds_guard.errors import Unsupported
from imds_guard.kernel import syscall_numbers
from imds_guard.kernel.cgroup import Cgroup
from imds_guard.kernel.syscall_numbers import INTERFACES, syscall_number
from tests.tools import missing

ROOT = Path(__file__).resolve().parents[2]
NAMES = (*syscall_numbers._NAMES, *syscall_numbers._EVERYWHERE)
MACHINES_64 = ("x86_64", "aarch64", "loongarch64", "riscv64", "s390x", "ppc64", "ppc64le")
MACHINES_32 = ("x86_64", "i386", "i686", "aarch64", "armv7l", "armv8l")
"""What uname(2) says to a 32-bit program. A 64-bit kernel says its own name, unless the personality is linux32."""
HEADERS = {"x86_64": "asm/unistd_64.h", "i386": "asm/unistd_32.h"}
"""The numbers of the machine that the tests run on, from linux-libc-dev."""


def on(machine: str, monkeypatch: pytest.MonkeyPatch, pointer_bytes: int = 8) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    monkeypatch.setattr(struct, "calcsize", lambda _: pointer_bytes)


def test_this_machine_has_the_number_of_bpf() -> None:
    """BPF_MAP_CREATE with an attribute of no size is EINVAL for root and EPERM for others; ENOSYS would be a gap."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(ctypes.c_long(syscall_number("bpf")), 0, None, 0) == -1
    assert ctypes.get_errno() in (1, 22)


@pytest.mark.parametrize(
    ("machine", "pointer_bytes"), [*((name, 8) for name in MACHINES_64), *((name, 4) for name in MACHINES_32)]
)
def test_every_architecture_has_every_number(machine: str, pointer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on(machine, monkeypatch, pointer_bytes)
    numbers = [syscall_number(name) for name in NAMES]
    assert len(set(numbers)) == len(NAMES)


def test_every_interface_is_one_of_a_machine() -> None:
    assert set(INTERFACES) == {*MACHINES_64, "i386", "arm"}


@pytest.mark.parametrize(
    ("machine", "pointer_bytes", "name", "number"),
    [
        ("x86_64", 8, "bpf", 321),
        ("x86_64", 4, "bpf", 357),
        ("aarch64", 8, "bpf", 280),
        ("aarch64", 4, "bpf", 386),
        ("s390x", 8, "bpf", 351),
        ("ppc64le", 8, "bpf", 361),
        ("s390x", 8, "setresuid", 208),
        ("ppc64le", 8, "setgroups", 81),
        ("riscv64", 8, "membarrier", 283),
        ("loongarch64", 8, "setfsgid", 152),
        ("ppc64le", 8, "fsopen", 430),
        ("armv7l", 4, "setfsuid", 215),
    ],
)
def test_numbers_are_those_of_the_kernel(
    machine: str, pointer_bytes: int, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(machine, monkeypatch, pointer_bytes)
    assert syscall_number(name) == number


@pytest.mark.parametrize("interface", HEADERS)
def test_the_table_agrees_with_the_kernels_header(interface: str) -> None:
    """i386 has calls for 16-bit IDs, too; ours are those with 32."""
    found = [path for path in Path("/usr/include").glob(f"*/{HEADERS[interface]}") if "x86" in str(path)]
    if not found:
        missing(f"{HEADERS[interface]} is not installed (linux-libc-dev on x86_64)")
    defined = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", found[0].read_text())}
    ours = dict(zip(syscall_numbers._NAMES, syscall_numbers._BY_INTERFACE[interface]))
    assert {**ours, **syscall_numbers._EVERYWHERE} == {
        name: defined.get(f"{name}32", defined.get(name)) for name in (*ours, *syscall_numbers._EVERYWHERE)
    }


@pytest.mark.parametrize(("machine", "pointer_bytes"), [("sparc64", 8), ("mips", 4), ("riscv64", 4)])
def test_without_a_number_ebpf_is_unsupported(
    machine: str, pointer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So iptables takes over there, as on a kernel without bpf(2). Any other error would end every command."""
    on(machine, monkeypatch, pointer_bytes)
    expected = (
        rf"number of bpf\(2\) for a {pointer_bytes * 8}-bit program on {machine} is not known, but those for aarch64,"
    )
    with pytest.raises(OSError, match=expected) as caught:
        syscall_number("bpf")
    assert caught.value.errno == errno.ENOSYS
    with pytest.raises(Unsupported, match=r"ENOSYS \(the number of bpf"):
        hooks.inspect(Cgroup(0, 1, "/sys/fs/cgroup"), None)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "i686", "armv7l"])
def test_a_32_bit_python_is_refused_with_a_sentence(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/system/test_32_bit.py does it with a real one."""
    on(machine, monkeypatch, pointer_bytes=4)
    with pytest.raises(Unsupported, match=rf"32-bit program \(on {machine}\)") as caught:
        probe.require_64_bit()
    assert caught.value.exit_status == 69
    assert "run it with a 64-bit Python; the iptables backend can serve instead" in str(caught.value)


def test_no_call_is_made_by_a_number_that_stands_elsewhere() -> None:
    """syscall() of the C library is given numbers by syscall_number(), in tests and in guests, too."""
    elsewhere = []
    for path in (*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("vagrant/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "syscall":
                first = ast.unparse(node.args[0]) if node.args else ""
                if "syscall_number(" not in first:
                    elsewhere.append(f"{path.relative_to(ROOT)}:{node.lineno}: {first}")
    assert elsewhere == []
