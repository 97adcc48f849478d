# SPDX-License-Identifier: Apache-2.0
"""imds-guard as people run it: a process of its own, judged by how it ends, what it says and what the world is like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imds_guard
from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.kernel.sandbox import Sandbox
from tests.kernel.rules_in_a_sandbox import NO_GROUP, connect

SOURCES = str(Path(imds_guard.__file__).resolve().parents[1])
"""Where the tests have imds_guard from, installed or not: the command is run from there, too."""

PATIENCE_S = 120

ONE, TWO, STRANGER = 41_001, 41_002, 41_003
"""User IDs without an account."""
STAFF = 51_001

SERVICE, NEIGHBOUR, SERVICE_V6 = "192.0.2.1", "192.0.2.2", "2001:db8::1"
"""Documentation addresses (RFC 5737, RFC 3849): nothing that is real can be locked or reached by mistake."""
MAPPED = f"::ffff:{SERVICE}"
PORTS = (80, 443)


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it said."""

    status: int
    stdout: str
    stderr: str

    @property
    def values(self) -> Any:
        """The JSON that it printed."""
        return json.loads(self.stdout)

    @property
    def sentence(self) -> str:
        """What it complained of, which must be one line without a trace of Python, and all that it said."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("imds-guard: "), self
        assert "Traceback" not in self.stderr, self
        assert self.stdout == "", self
        return lines[0][len("imds-guard: ") :]

    @property
    def answer(self) -> str:
        """What it printed; it must have ended well."""
        assert self.status == 0, self
        assert "Traceback" not in self.stderr, self
        return self.stdout


def argv(
    words: Sequence[str],
    *,
    entry: str = "main",
    before: str = "",
    interpreter: Sequence[str] = ("-I",),
    path: Sequence[str] = (SOURCES,),
) -> tuple[str, ...]:
    """The command line; ``before`` is Python that runs after the import of the command, and before the command."""
    code = f"import sys; sys.path[:0] = {list(path)!r}\nfrom imds_guard.cli import {entry}\n{before}\n{entry}()"
    return (sys.executable, *interpreter, "-c", code, *words)


def run(argv: Sequence[str], environment: dict[str, str] | None = None) -> Result:
    """Runs a program to its end."""
    done = subprocess.run(
        argv,
        capture_output=True,
        check=False,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
        env=None if environment is None else {**os.environ, **environment},
        encoding="utf-8",
        errors="surrogateescape",
    )
    return Result(done.returncode, done.stdout, done.stderr)


def imds_guard_command(*words: str) -> Result:
    """``imds-guard`` with these words."""
    return run(argv(words))


class Guard:
    """The command for one cgroup, and callers in it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.backend = EbpfBackend(sandbox.cgroup)

    def words(self, command: str, *words: str) -> tuple[str, ...]:
        """The command and its words, with ``--cgroup``."""
        return (command, "--cgroup", self.sandbox.cgroup, *words)

    def __call__(self, command: str, *words: str) -> Result:
        """Runs the command."""
        return imds_guard_command(*self.words(command, *words))

    def start(self, *words: str) -> Result:
        """Locks the service for user ONE and group STAFF, or as the words say; it must end well."""
        started = self("start", *(words or ("--user", str(ONE), "--group", str(STAFF), "--ip", SERVICE)))
        assert started.status == 0, started
        return started

    def status(self) -> Any:
        """What ``status --json`` prints."""
        return self("status", "--json").values

    def reach(
        self, uid: int, to: str = SERVICE, port: int = 80, *, gid: int = NO_GROUP, groups: Sequence[int] = ()
    ) -> str:
        """``connected``, or the name of the errno that a fresh process of those ids gets."""
        return self.sandbox.call(lambda: connect(uid, to, port, gid=gid, groups=groups), timeout_s=PATIENCE_S)


@contextmanager
def guard(*, addresses: Sequence[str] = (SERVICE, NEIGHBOUR, SERVICE_V6)) -> Iterator[Guard]:
    """A sandbox that answers at the addresses, with no guard yet; there is none afterwards either."""
    with Sandbox(addresses) as sandbox:
        sandbox.serve(addresses, PORTS)
        one = Guard(sandbox)
        try:
            yield one
        finally:
            one.backend.remove()
