# SPDX-License-Identifier: Apache-2.0
"""Fixtures: filters in force by eBPF, and by each kind of iptables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, TypeVar

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.backends.iptables import IptablesBackend
from imds_guard.backends.iptables.form import Form
from imds_guard.kernel import accounts, lockfile
from imds_guard.kernel.sandbox import Sandbox
from tests.filter.scene import ACCOUNT, METADATA, POLICY, FallbackScene, Scene
from tests.kernel import guards
from tests.kernel.rules_in_a_sandbox import KINDS, V6, Machine, one_legacy_at_a_time
from tests.tools import need

AnyScene = TypeVar("AnyScene", bound=Scene)
Fallback = tuple[str, Optional[Form]]
FALLBACKS: tuple[Fallback, ...] = (*((kind, None) for kind in sorted(KINDS)), ("nf_tables", Form.MANGLE))
"""Kinds of iptables, and the form of the rules; None: the best one."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /run/imds-guard. The account of the filters is there."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setattr(lockfile, "FOLDER", str(path))
    monkeypatch.setattr(accounts, "user_in_files", lambda name: ACCOUNT)
    return path


@contextmanager
def _ebpf() -> Iterator[Scene]:
    with Sandbox((METADATA,)) as sandbox:
        backend = EbpfBackend(sandbox.cgroup, guards.FAST)
        try:
            yield Scene(sandbox, sandbox.cgroup, "EPERM", backend.apply)
        finally:
            backend.remove()


@contextmanager
def _machine(one: Fallback, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The commands use the same kind of iptables, and the same folder."""
    kind, form = one
    need(KINDS[kind][0])
    monkeypatch.setattr(IptablesBackend.__init__, "__defaults__", (KINDS[kind],))
    monkeypatch.setitem(IptablesBackend.__init__.__kwdefaults__ or {}, "state_folder", str(folder))
    with one_legacy_at_a_time(kind), Sandbox((METADATA, V6)) as sandbox:
        yield Machine(sandbox, kind, str(folder), form)


def _in_force(one: AnyScene) -> AnyScene:
    one.change(POLICY)
    one.serve_metadata()
    return one


@pytest.fixture(params=FALLBACKS, ids=str)
def machine(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Each kind of iptables."""
    with _machine(request.param, folder, monkeypatch) as one:
        yield one


@pytest.fixture
def by_ebpf(folder: Path) -> Iterator[Scene]:
    """POLICY in force, a metadata service, and no service of the filters yet."""
    with _ebpf() as one:
        yield _in_force(one)


@pytest.fixture
def by_iptables(machine: Machine) -> FallbackScene:
    """The same."""
    return _in_force(FallbackScene(machine))


@pytest.fixture(params=["ebpf", *FALLBACKS], ids=str)
def unguarded(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """For each backend: nothing is in force yet, and no metadata service is there."""
    if request.param == "ebpf":
        with _ebpf() as one:
            yield one
        return
    with _machine(request.param, folder, monkeypatch) as machine:
        yield FallbackScene(machine)


@pytest.fixture
def by_each(unguarded: Scene) -> Scene:
    """As by_ebpf, by each backend."""
    return _in_force(unguarded)
