# SPDX-License-Identifier: Apache-2.0
"""Makes the n-th call of a command to the system fail, at the one door that each kind of call has.

Doors: ``bpf.syscall.invoke`` for bpf(2); Python's audit events for files that are written, renamed, made and removed,
and for flock(2); ``subprocess.Popen``, which kernel/run.py calls; membarrier(2) and renameat2(2) in
kernel/syscalls.py. Every call but the failing one is real. Audit hooks can't be taken off again (sys.addaudithook), so
there is one for all tests, which does nothing unless a fault is planted in this very process.
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
"""What can happen to a program beside not being started: it fails and does nothing; it is killed when it is done."""

CODES: dict[str, tuple[int, ...]] = {
    BPF: (errno.EPERM, errno.ENOMEM, errno.ENOSPC, errno.E2BIG, errno.EINTR),
    FILE: (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO),
    PROGRAM: (errno.ENOMEM, REFUSES, IS_KILLED),
    SYSCALL: (errno.EPERM, errno.EINVAL, errno.ENOSYS),
}
"""What each kind of call is made to say, beside what it may really say."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FILE_EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "fcntl.flock"})
_COMMANDS = {command.value: f"BPF_{command.name}" for command in bpf.Command}
_ASK = frozenset({"BPF_PROG_LOAD", "BPF_BTF_LOAD"})
"""With these a command finds out, too, what the kernel can; it goes on without what it can't."""


@dataclass(frozen=True)
class Call:
    """One call to the system: its kind, and what it was about."""

    kind: str
    what: str


@dataclass
class Fault:
    """The calls that a command has made, and which of them fail: from ``first`` to ``last``, or that one alone."""

    first: int = 0
    last: int | None = None
    code: int = 0
    instead: Callable[[], object] | None = None
    """What happens in front of the call, which is then made: in place of its failing."""
    calls: list[Call] = field(default_factory=list)
    owner: int = field(default_factory=os.getpid)

    def meets(self, kind: str, what: str) -> bool:
        """Counts a call; True when it is to fail."""
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
        """What a failing call raises; a fault of another kind of call counts as EIO."""
        code = self.code if self.code > 0 and self.code in CODES[kind] else CODES[kind][0]
        return OSError(code, os.strerror(code))

    @property
    def hit(self) -> Call | None:
        """The call that failed first; None when the command came to its end before."""
        return self.calls[self.first - 1] if 0 < self.first <= len(self.calls) else None

    @property
    def causes(self) -> list[Call]:
        """The calls that the command may give as its reason: the first that failed.

        Where that one may have asked what the kernel can, it is survived: then also the first that did more than ask.
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
    if "/__pycache__" in what or "/tmp/tmp" in what:  # what Python and the compiler keep for themselves
        return
    if _planted[-1].meets(FILE, what):
        raise _planted[-1].error(FILE)


sys.addaudithook(_audit)


def _failing_bpf(fault: Fault, door: Callable[[int, bytes], tuple[int, int, bytes]]) -> Any:
    def invoke(command: int, attr: bytes) -> tuple[int, int, bytes]:
        if fault.meets(BPF, _COMMANDS.get(command, str(command))):
            return -1, fault.error(BPF).errno or 0, attr
        return door(command, attr)

    return invoke


def _failing_program(fault: Fault, door: Any) -> Any:
    def popen(argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        started: subprocess.Popen[str]
        if not fault.meets(PROGRAM, " ".join(argv)):
            started = door(argv, **options)
        elif fault.code == REFUSES:
            started = door(["/bin/sh", "-c", "cat >/dev/null; echo refused by a fault >&2; exit 4"], **options)
        elif fault.code == IS_KILLED:
            started = door(["/bin/sh", "-c", '"$@"; kill -KILL $$', "sh", *argv], **options)
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
    """Counts the calls of the block, and has the chosen ones fail."""
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
    """What the call of that number is made to say: one thing, another for each call, or everything that fits."""
    fitting = CODES[kind]
    return fitting if every else (fitting[number % len(fitting)],)
