# SPDX-License-Identifier: Apache-2.0
"""Every row meets every backend; what a backend can't do is skipped, unless it is expected to."""

from __future__ import annotations

import os
from typing import Dict, Iterator, Optional

import pytest

from imds_guard.kernel.sandbox import Sandbox
from tests.conformance.enforcers import ENFORCERS
from tests.conformance.families import ADDRESSES, LOOPBACK, PORTS
from tests.conformance.perform import allow_fastopen
from tests.conformance.probes import PROBES

EXPECTED_BACKENDS = frozenset(filter(None, os.environ.get("IMDS_GUARD_EXPECT", "").split(",")))
"""Backends that must be able to do every row here: for them, a skip is a failure."""


@pytest.fixture(params=sorted(ENFORCERS))
def backend_name(request: pytest.FixtureRequest) -> str:
    """Each backend by its name."""
    name: str = request.param
    return name


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A fresh namespace and cgroup, with listeners on every address and port of the table."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces and cgroups needs root")
    with Sandbox(ADDRESSES) as fresh:
        fresh.call(allow_fastopen)
        fresh.serve((*ADDRESSES, *LOOPBACK), PORTS)
        yield fresh


@pytest.fixture(scope="session")
def lacking() -> Dict[str, Optional[str]]:
    """For each thing that a row may require: None, or the sentence that says why this kernel has it not."""
    with Sandbox() as fresh:
        return {name: fresh.call(probe) for name, probe in PROBES.items()}
