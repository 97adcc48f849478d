# SPDX-License-Identifier: Apache-2.0
"""Runs imds-guard as a process, as users do, and checks its exit status, its output and its effect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import imds_guard
from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.kernel.sandbox import Sandbox
from tests import schemas
from tests.kernel.rules_in_a_sandbox import NO_GROUP, connect

SOURCES = str(Path(imds_guard.__file__).resolve().parents[1])
"""The folder that the tests import imds_guard from. The command runs from there, too."""

TIMEOUT_S = 120

ONE, TWO, STRANGER = 41_001, 41_002, 41_003
"""User IDs without an account."""
STAFF = 51_001

SERVICE, NEIGHBOUR, SERVICE_V6 = "192.0.2.1", "192.0.2.2", "2001:db8::1"
"""Documentation addresses (RFC 5737, RFC 3849), so that no real one is locked or reached by mistake."""
MAPPED = f"::ffff:{SERVICE}"
PORTS = (80, 443)


@dataclass(frozen=True)
class Result:
    """The exit status and output of a command."""

    status: int
    stdout: str
    stderr: str
    command: str = field(default="", compare=False)
    """The command of this tree that printed JSON."""

    @property
    def values(self) -> Any:
        """The JSON that the command printed. It must be as the schema of the command says."""
        found = json.loads(self.stdout)
        schemas.check(self.command, found)
        return found

    @property
    def sentence(self) -> str:
        """The error message, without the prefix. It must be the only output: one line on stderr, no traceback.

        Where JSON was asked for, it is an object on stdout.
        """
        if self.stdout.startswith('{"error": '):
            assert self.stderr == "", self
            assert self.values["error"]["status"] == self.status, self
            return str(self.values["error"]["message"])
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("imds-guard: "), self
        assert "Traceback" not in self.stderr, self
        assert self.stdout == "", self
        return lines[0][len("imds-guard: ") :]

    @property
    def answer(self) -> str:
        """The standard output. The exit status must be 0."""
        assert self.status == 0, self
        assert "Traceback" not in self.stderr, self
        return self.stdout


def argv(
    arguments: Sequence[str],
    *,
    entry: str = "main",
    before: str = "",
    interpreter: Sequence[str] = ("-I",),
    path: Sequence[str] = (SOURCES,),
) -> tuple[str, ...]:
    """The argv of a command. ``before`` is Python code to run after the import of the command and before it runs."""
    code = f"import sys; sys.path[:0] = {list(path)!r}\nfrom imds_guard.cli import {entry}\n{before}\n{entry}()"
    return (sys.executable, *interpreter, "-c", code, *arguments)


def run(argv: Sequence[str], environment: dict[str, str] | None = None) -> Result:
    """Runs a program and waits for its end."""
    done = subprocess.run(
        argv,
        capture_output=True,
        check=False,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        env=None if environment is None else {**os.environ, **environment},
        encoding="utf-8",
        errors="surrogateescape",
    )
    ours = any(repr(SOURCES) in word for word in argv)  # tests of upgrades run older versions, too
    return Result(done.returncode, done.stdout, done.stderr, schemas.command_of(argv) if ours else "")


def imds_guard_command(*arguments: str) -> Result:
    """Runs ``imds-guard`` with these arguments."""
    return run(argv(arguments))


_MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.waitstatus_to_exitcode(status)} {used.ru_maxrss * 1024}")
"""


def run_measured(argv: Sequence[str], output: IO[bytes]) -> tuple[int, int]:
    """The exit status, and the largest RSS of the program and its children. ``output`` gets what it prints.

    A small process starts it: what this one has when it forks counts for the program, too (getrusage(2)).
    """
    with tempfile.NamedTemporaryFile("r") as result:
        subprocess.run(
            [sys.executable, "-I", "-c", _MEASURE, result.name, *argv], stdout=output, stderr=output, check=True
        )
        status, rss = result.read().split()
    return int(status), int(rss)


class Guard:
    """Runs imds-guard for one sandbox, and callers in that sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.backend = EbpfBackend(sandbox.cgroup)

    def arguments(self, command: str, *more: str) -> tuple[str, ...]:
        """The arguments of a command, with ``--cgroup``."""
        return (command, "--cgroup", self.sandbox.cgroup, *more)

    def __call__(self, command: str, *more: str) -> Result:
        """Runs the command."""
        return imds_guard_command(*self.arguments(command, *more))

    def start(self, *more: str) -> Result:
        """Starts with these arguments; default: lock the service for user ONE and group STAFF. Must succeed."""
        started = self("start", *(more or ("--user", str(ONE), "--group", str(STAFF), "--ip", SERVICE)))
        assert started.status == 0, started
        return started

    def status(self) -> Any:
        """What ``status --json`` says of this guard: not which others there are, nor, to the millisecond, since when.

        Other tests have guards on this machine. A time is counted back from now, by two clocks.
        """
        found = self("status", "--json").values
        return {key: value for key, value in found.items() if key not in ("guards", "since")}

    def reach(
        self, uid: int, to: str = SERVICE, port: int = 80, *, gid: int = NO_GROUP, groups: Sequence[int] = ()
    ) -> str:
        """``connected``, or the name of the errno that a new process with these IDs gets."""
        return self.sandbox.call(lambda: connect(uid, to, port, gid=gid, groups=groups), timeout_s=TIMEOUT_S)


@contextmanager
def guard(*, addresses: Sequence[str] = (SERVICE, NEIGHBOUR, SERVICE_V6)) -> Iterator[Guard]:
    """A sandbox with listeners at the addresses and no guard. A guard that is started there is removed at the end."""
    with Sandbox(addresses) as sandbox:
        sandbox.serve(addresses, PORTS)
        one = Guard(sandbox)
        try:
            yield one
        finally:
            one.backend.remove()
