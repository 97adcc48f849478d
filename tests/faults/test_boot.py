# SPDX-License-Identifier: Apache-2.0
"""``start --boot`` while each of its calls fails in turn: it locks, or opens where the configuration says so.

A call is a function of imds_guard, or a function of C that imds_guard calls. It raises one of the errors that nobody
expects there. By default a sample of the places in the code is tried; with ``IMDS_GUARD_FULL=1`` all of them, and with
``IMDS_GUARD_FULL=2`` each with every error.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import imds_guard
from imds_guard.backends import Backend, choose
from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.commands import boot
from imds_guard.commands.options import GuardOptions
from imds_guard.config.boot_file import BootFile
from imds_guard.errors import GuardError
from imds_guard.kernel import lockfile
from imds_guard.kernel.sandbox import Sandbox
from tests.faults.callers import Callers
from tests.faults.trials import FULL
from tests.kernel import guards
from tests.kernel.guards import IPV4, IPV6, OLD, PORT, STRANGER

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and cgroups needs root")

PACKAGE = os.path.dirname(imds_guard.__file__) + os.sep
CONFIG = f'[lock.web]\nendpoints = ["{IPV4}", "{IPV6}"]\nusers = [{OLD}]\n'
PLACES = [(IPV4, PORT), (IPV6, PORT)]
SAMPLE = 40

ERRORS: tuple[Exception, ...] = (
    OSError(errno.EIO, os.strerror(errno.EIO)),
    OSError(errno.EPERM, os.strerror(errno.EPERM)),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ValueError("planted"),
    UnicodeError("planted"),
    RecursionError("planted"),
    MemoryError(),
)

ENTRANCE = {(boot.__file__, name) for name in ("start", "__init__", "run")}
"""Functions that call the code which tries and recovers. They do nothing else."""

Site = tuple[str, int, str]
"""File, line, and name of a call."""


class Calls:
    """Counts calls by the place in the code, or makes the first call at one place fail."""

    def __init__(self, failing: Site | None = None, error: Exception | None = None) -> None:
        self.seen: dict[Site, int] = {}
        self.failed = False
        self._failing = failing
        self._error = error
        self._owner = os.getpid()

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if os.getpid() != self._owner:
            return
        name = frame.f_code.co_name if event == "call" else getattr(argument, "__qualname__", str(argument))
        site = (frame.f_code.co_filename, frame.f_lineno, name)
        self.seen[site] = self.seen.get(site, 0) + 1
        if site == self._failing and not self.failed and self._error is not None:
            self.failed = True
            raise self._error

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Calls in the block are seen, until one fails: then the interpreter stops to call (sys.setprofile)."""
        sys.setprofile(self._look)
        try:
            yield
        finally:
            sys.setprofile(None)


@contextmanager
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Sandbox, Callers]]:
    """A sandbox with two callers, and programs that the verifier checks quickly."""
    make = choose.make

    def made(name: str, cgroup: str | None = None, resolve_groups: bool = False) -> Backend:
        return EbpfBackend(cgroup, guards.FAST) if name == "ebpf" else make(name, cgroup, resolve_groups)

    monkeypatch.setattr(choose, "make", made)
    monkeypatch.setattr(lockfile, "WAIT_S", 0.2)  # where a failed close(2) has left it locked
    with guards.guarded_sandbox(guards.FAST) as (sandbox, _), Callers(sandbox, (OLD, STRANGER), PLACES) as callers:
        yield sandbox, callers


def run(sandbox: Sandbox, file: Path, calls: Calls) -> boot.BootResult | GuardError:
    """One boot. Anything but a GuardError is a failure of the test."""
    one, options = BootFile(str(file)), GuardOptions(cgroup=sandbox.cgroup)
    try:
        with calls.watched():
            return boot.start(one, options, lambda _: None)
    except GuardError as error:
        return error


def descriptors() -> set[int]:
    """The open descriptors of this process."""
    return {int(name) for name in os.listdir("/proc/self/fd")}


def close_all_but(before: set[int]) -> None:
    """Closes what a failed close(2) has left open, as the end of the command would. It may be a lock."""
    for fd in descriptors() - before:
        with suppress(OSError):
            os.close(fd)


def sites(sandbox: Sandbox, file: Path) -> list[Site]:
    """Where a boot calls something, in the order of the first call."""
    calls = Calls()
    assert isinstance(run(sandbox, file, calls), boot.BootResult)
    EbpfBackend(sandbox.cgroup).remove()
    found = [site for site in calls.seen if (site[0], site[2]) not in ENTRANCE]
    assert len(found) > 500, f"only {len(found)} places were seen"
    return found


def plan(found: list[Site]) -> list[tuple[Site, Exception]]:
    """The places to try, each with an error."""
    chosen = found if FULL else found[:: max(1, len(found) // SAMPLE)]
    if FULL == "2":
        return [(site, error) for site in chosen for error in ERRORS]
    return [(site, ERRORS[at % len(ERRORS)]) for at, site in enumerate(chosen)]


@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_whatever_fails_at_boot_the_machine_is_locked_unless_the_file_says_otherwise(
    on_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'on_error = "{on_error}"\n{CONFIG}', encoding="utf-8")
    problems, failed, opened = [], 0, 0
    with stage(monkeypatch) as (sandbox, callers):
        for site, error in plan(sites(sandbox, file)):
            before, calls = descriptors(), Calls(site, error)
            try:
                result = run(sandbox, file, calls)
            except Exception as other:  # noqa: BLE001 - any error that gets out is a failure
                result = GuardError(f"{type(other).__name__} got out: {other}")
                problems.append(f"{error!r} at {site}: {result}")
            strangers = [place for place, users in zip(PLACES, callers.passing()) if STRANGER in users]
            failed += calls.failed
            opened += bool(strangers)
            said = result.error if isinstance(result, boot.BootResult) else result
            if strangers and not (on_error == "open" and 'on_error = "open"' in str(said)):
                problems.append(f"{error!r} at {site}: {strangers} are open, boot says {said}")
            close_all_but(before)
            EbpfBackend(sandbox.cgroup).remove()
    assert not problems, "\n".join(problems)
    assert failed > SAMPLE // 2, "hardly any call failed: they are planted at places that are not reached"
    assert opened > 0 or on_error == "closed", "no error opened the lock, although the file says so"
