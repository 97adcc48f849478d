# SPDX-License-Identifier: Apache-2.0
"""System call numbers by architecture."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from types import SimpleNamespace

import pytest

from imds_guard.backends.ebpf import hooks
from imds_guard.errors import Unsupported, system_text
from imds_guard.kernel import syscall_numbers
from imds_guard.kernel.cgroup import Cgroup
from imds_guard.kernel.syscall_numbers import ARCHITECTURES, syscall_number

NAMES = (*syscall_numbers._NAMES, *syscall_numbers._EVERYWHERE)


def on(machine: str, monkeypatch: pytest.MonkeyPatch, pointer_bytes: int = 8) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    monkeypatch.setattr(struct, "calcsize", lambda _: pointer_bytes)


def test_this_machine_has_the_number_of_bpf() -> None:
    """BPF_MAP_CREATE with an attribute of no size is EINVAL for root and EPERM for others; ENOSYS would be a gap."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(ctypes.c_long(syscall_number("bpf")), 0, None, 0) == -1
    assert ctypes.get_errno() in (1, 22)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64", "s390x", "ppc64le"])
def test_every_architecture_has_every_number(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine in ARCHITECTURES
    on(machine, monkeypatch)
    numbers = [syscall_number(name) for name in NAMES]
    assert len(set(numbers)) == len(NAMES)


@pytest.mark.parametrize(
    ("machine", "name", "number"),
    [
        ("x86_64", "bpf", 321),
        ("aarch64", "bpf", 280),
        ("s390x", "bpf", 351),
        ("ppc64le", "bpf", 361),
        ("s390x", "setresuid", 208),
        ("ppc64le", "setgroups", 81),
        ("riscv64", "membarrier", 283),
        ("ppc64le", "fsopen", 430),
    ],
)
def test_numbers_are_those_of_the_kernel(machine: str, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on(machine, monkeypatch)
    assert syscall_number(name) == number


def test_an_unknown_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on("sparc64", monkeypatch)
    with pytest.raises(OSError, match=r"number of bpf\(2\) on sparc64 is not known; imds-guard runs on aarch64, ppc64"):
        syscall_number("bpf")


@pytest.mark.parametrize(("machine", "pointer_bytes"), [("armv7l", 4), ("x86_64", 4), ("sparc64", 8)])
def test_without_a_number_ebpf_is_unsupported(
    machine: str, pointer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So iptables takes over there, as on a kernel without bpf(2). Any other error would end every command."""
    on(machine, monkeypatch, pointer_bytes)
    with pytest.raises(OSError, match="number of bpf") as caught:
        syscall_number("bpf")
    assert caught.value.errno == errno.ENOSYS
    with pytest.raises(Unsupported, match=r"ENOSYS \((this Python is|the number of bpf)"):
        hooks.inspect(Cgroup(0, 1, "/sys/fs/cgroup"), None)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "i686", "armv7l"])
def test_a_32_bit_python_is_refused_with_a_sentence(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 64-bit kernel calls itself x86_64 or aarch64 there, too, but takes other numbers from a 32-bit process."""
    on(machine, monkeypatch, pointer_bytes=4)
    with pytest.raises(OSError, match="this Python is a 32-bit program") as caught:
        syscall_number("bpf")
    assert system_text(caught.value).endswith("run imds-guard with a 64-bit Python)")
