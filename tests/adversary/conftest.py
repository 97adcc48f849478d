# SPDX-License-Identifier: Apache-2.0
"""One guard for all attacks that meet it."""

from __future__ import annotations

import os
import secrets
from typing import Dict, Iterator, Optional

import pytest

from tests.adversary import needs
from tests.adversary.model import Guard
from tests.adversary.scene import Scene, Stage
from tests.conformance.enforcers import ENFORCERS


@pytest.fixture(scope="session")
def as_root() -> None:
    """Skips unless namespaces and cgroups can be made."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces and cgroups needs root")


@pytest.fixture(scope="session")
def secret() -> bytes:
    """What only the service knows."""
    return secrets.token_hex(16).encode()


@pytest.fixture(scope="session")
def stage(
    request: pytest.FixtureRequest, as_root: None, secret: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """One guard, or none, for as long as attacks on it follow one another."""
    guard: Guard = request.param
    with ENFORCERS["ebpf"](tmp_path_factory.mktemp("state")) as enforcer:
        yield Stage(guard, enforcer, secret)


@pytest.fixture(scope="session")
def scene(stage: Stage) -> Iterator[Scene]:
    """The scene of all attacks that leave the network as it is."""
    with stage.scene() as one:
        yield one


@pytest.fixture(scope="session")
def lacking(scene: Scene) -> Dict[str, Optional[str]]:
    """For each thing that an attack may need: None, or why it is not to be had here."""
    return {name: probe(scene) for name, probe in needs.PROBES.items()}
