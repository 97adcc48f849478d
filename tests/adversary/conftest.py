# SPDX-License-Identifier: Apache-2.0
"""Fixtures: attacks under the same guard share it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Callable

import pytest

from tests.adversary import needs
from tests.adversary.model import Guard
from tests.adversary.scene import Scene, Stage
from tests.conformance.enforcers import ENFORCERS, Enforcer


class Stages:
    """Keeps one stage at a time, and a scene for all attacks that don't change their network."""

    def __init__(self, folder: Path, enforcer: Callable[[Path], Enforcer] = ENFORCERS["ebpf"]) -> None:
        self._make_enforcer = enforcer
        self.secret = secrets.token_hex(16).encode()
        self._folder = folder
        self._stack = ExitStack()
        self._now: Stage | None = None
        self._scene: Scene | None = None
        self._lacking: dict[str, str | None] = {}

    def enter(self, guard: Guard) -> Stage:
        """The stage with this guard. Another stage is closed first."""
        if self._now is None or self._now.guard is not guard:
            self.close()
            enforcer = self._stack.enter_context(self._make_enforcer(self._folder))
            self._now = Stage(guard, enforcer, self.secret)
            self._scene = self._stack.enter_context(self._now.scene())
        return self._now

    @property
    def scene(self) -> Scene:
        """The shared scene of the current stage."""
        if self._scene is None:
            raise AssertionError("no stage was entered")
        return self._scene

    def lacks(self, need: str) -> str | None:
        """Why this machine lacks something that an attack needs, or None."""
        if need not in self._lacking:
            self._lacking[need] = needs.PROBES[need](self.scene)
        return self._lacking[need]

    def close(self) -> None:
        """Closes the current stage."""
        self._now = self._scene = None
        self._stack.close()


@pytest.fixture(scope="session")
def as_root() -> None:
    """Skips unless namespaces and cgroups can be made."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces and cgroups needs root")


@pytest.fixture(scope="session")
def stages(as_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """The stages for all attacks of the session."""
    kept = Stages(tmp_path_factory.mktemp("state"))
    try:
        yield kept
    finally:
        kept.close()
