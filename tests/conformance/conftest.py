# SPDX-License-Identifier: Apache-2.0
"""Every row meets every backend; what a backend can't do is skipped, unless it is expected to."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from imds_guard.kernel.sandbox import Sandbox
from tests.conformance.enforcers import ENFORCERS, Enforcer
from tests.conformance.probes import PROBES


@pytest.fixture(scope="session")
def as_root() -> None:
    """Skips unless namespaces and cgroups can be made."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces and cgroups needs root")


@pytest.fixture(scope="session", params=sorted(ENFORCERS))
def backend_name(request: pytest.FixtureRequest, as_root: None) -> str:
    """Each backend by its name."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def enforcer(backend_name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Enforcer]:
    """One backend for all rows; removed after the last one."""
    with ENFORCERS[backend_name](tmp_path_factory.mktemp(backend_name)) as one:
        yield one


@pytest.fixture(scope="session")
def lacking(as_root: None) -> dict[str, str | None]:
    """For each thing that a row may require: None, or the sentence that says why this kernel does not have it."""
    with Sandbox() as fresh:
        return {name: fresh.call(probe) for name, probe in PROBES.items()}
