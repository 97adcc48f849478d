# SPDX-License-Identifier: Apache-2.0
"""Makes the n-th system call of a command fail, at the one place in the code that makes each kind of call.

These places are: ``bpf.syscall.invoke`` for bpf(2); Python's audit events for files that are written, renamed, made and
removed, and for flock(2); ``subprocess.Popen``, which kernel/run.py calls; membarrier(2) and renameat2(2) in
kernel/syscalls.py. All other calls are real. Audit hooks can't be removed (sys.addaudithook), so one hook serves all
tests. It does nothing unless a fault is planted in this process.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable

from imds_guard.kernel import bpf, syscalls
from imds_guard.kernel.bpf import syscall as bpf_syscall

BPF, FILE, PROGRAM, SYSCALL = "bpf", "file", "program", "syscall"

REFUSES, IS_KILLED = -1, -2
"""Faults of a program that was started: it fails and does nothing; it is killed after it has done its work."""

CODES: dict[str, tuple[int, ...]] = {
    BPF: (errno.EPERM, errno.ENOMEM, errno.ENOSPC, errno.E2BIG, errno.EINTR),
    FILE: (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO),
    PROGRAM: (errno.ENOMEM, REFUSES, IS_KILLED),
    SYSCALL: (errno.EPERM, errno.EINVAL, errno.ENOSYS),
}
"""The errors that each kind of call is made to return."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FILE_EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "fcntl.flock"})
_COMMANDS = {command.value: f"BPF_{command.name}" for command in bpf.Command}
_ASK = frozenset({"BPF_PROG_LOAD", "BPF_BTF_LOAD"})
"""Commands also probe with these. A command goes on when a probe fails."""


@dataclass(frozen=True)
class Call:
    """One call: its kind, and its object."""

    kind: str
    what: str


@dataclass
class Fault:
    """The calls of a command, and which of them fail: those from ``first`` to ``last``, or ``first`` alone."""

    first: int = 0
    last: int | None = None
    code: int = 0
    instead: Callable[[], object] | None = None
    """Called before the call ``first``, which is then made and does not fail."""
    calls: list[Call] = field(default_factory=list)
    owner: int = field(default_factory=os.getpid)

    def meets(self, kind: str, what: str) -> bool:
        """Counts a call. True when it has to fail."""
        if os.getpid() != self.owner:
            return False
        self.calls.append(Call(kind, what))
        number = len(self.calls)
        if self.instead is not None:
            if number == self.first:
                self.instead()
            return False
        return self.first != 0 and self.first <= number <= (self.first if self.last is None else self.last)

    def error(self, kind: str) -> OSError:
        """The error of a failing call. A code that its kind can't return is replaced by the kind's first code."""
        code = self.code if self.code > 0 and self.code in CODES[kind] else CODES[kind][0]
        return OSError(code, os.strerror(code))

    @property
    def hit(self) -> Call | None:
        """The call that failed first; None when the command ended before it."""
        return self.calls[self.first - 1] if 0 < self.first <= len(self.calls) else None

    @property
    def causes(self) -> list[Call]:
        """The calls that the command's error may name: the first that failed.

        If that one may have been a probe, the command goes on, and may name the first failed call that was no probe.
        """
        failed = self.calls[self.first - 1 : self.last or self.first] if self.hit else []
        more = [call for call in failed if call.what not in _ASK]
        return failed[:1] + more[:1]


_planted: list[Fault] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _planted:
        return
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, (str, bytes)) or not flags & _WRITES:
            return
        what = f"open {os.fsdecode(path)}"
    elif event in _FILE_EVENTS:
        what = f"{event} {arguments[0]}"
    else:
        return
    if "/__pycache__" in what or "/tmp/tmp" in what:  # files of Python and of the compiler
        return
    if _planted[-1].meets(FILE, what):
        raise _planted[-1].error(FILE)


sys.addaudithook(_audit)


def _failing_bpf(fault: Fault, real: Callable[[int, bytes], tuple[int, int, bytes]]) -> Any:
    def invoke(command: int, attr: bytes) -> tuple[int, int, bytes]:
        if fault.meets(BPF, _COMMANDS.get(command, str(command))):
            return -1, fault.error(BPF).errno or 0, attr
        return real(command, attr)

    return invoke


def _failing_program(fault: Fault, real: Any) -> Any:
    def popen(argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        started: subprocess.Popen[str]
        if not fault.meets(PROGRAM, " ".join(argv)):
            started = real(argv, **options)
        elif fault.code == REFUSES:
            started = real(["/bin/sh", "-c", "cat >/dev/null; echo refused by a fault >&2; exit 4"], **options)
        elif fault.code == IS_KILLED:
            started = real(["/bin/sh", "-c", '"$@"; kill -KILL $$', "sh", *argv], **options)
        else:
            raise fault.error(PROGRAM)
        return started

    return popen


def _failing_call(fault: Fault, name: str, call: Callable[..., None]) -> Callable[..., None]:
    def failing(*arguments: Any) -> None:
        if fault.meets(SYSCALL, name):
            raise fault.error(SYSCALL)
        call(*arguments)

    return failing


@contextmanager
def planted(fault: Fault) -> Iterator[Fault]:
    """Counts the calls in the block and makes the chosen ones fail."""
    before = bpf_syscall.invoke, subprocess.Popen, syscalls.membarrier, syscalls.exchange
    bpf_syscall.invoke = _failing_bpf(fault, bpf_syscall.invoke)
    subprocess.Popen = _failing_program(fault, subprocess.Popen)  # type: ignore[misc]
    syscalls.membarrier = _failing_call(fault, "membarrier", syscalls.membarrier)
    syscalls.exchange = _failing_call(fault, "renameat2", syscalls.exchange)
    _planted.append(fault)
    try:
        yield fault
    finally:
        _planted.pop()
        bpf_syscall.invoke, subprocess.Popen, syscalls.membarrier, syscalls.exchange = before  # type: ignore[misc]


def codes_for(kind: str, number: int, every: bool) -> Sequence[int]:
    """The errors to try at the call with this number: all errors of its kind, or one of them in turn."""
    fitting = CODES[kind]
    return fitting if every else (fitting[number % len(fitting)],)
