# SPDX-License-Identifier: Apache-2.0
"""Every row meets every backend; what a backend can't do is skipped, unless it is expected to."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from imds_guard.errors import NotPermitted, Unsupported
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Policy
from tests.conformance import witness
from tests.conformance.enforcers import ENFORCERS, Enforcer
from tests.conformance.families import ADDRESSES
from tests.conformance.perform import allow_fastopen
from tests.conformance.probes import PROBES

EXPECTED_BACKENDS = frozenset(filter(None, os.environ.get("IMDS_GUARD_EXPECT", "").split(",")))
"""Backends that must be able to do every row here: for them, a skip is a failure."""


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
    """One backend for all rows; it goes when they are through."""
    with ENFORCERS[backend_name](tmp_path_factory.mktemp(backend_name)) as one:
        yield one


@pytest.fixture
def sandbox(enforcer: Enforcer) -> Iterator[Sandbox]:
    """A fresh namespace and cgroup under the backend, with listeners on every address and port of the table."""
    with enforcer.sandbox() as fresh:
        yield ready(fresh)


@pytest.fixture
def open_sandbox(as_root: None) -> Iterator[Sandbox]:
    """The same, where nothing enforces anything."""
    with Sandbox(ADDRESSES) as fresh:
        yield ready(fresh)


def ready(sandbox: Sandbox) -> Sandbox:
    """The sandbox, with its listeners."""
    sandbox.call(allow_fastopen)
    sandbox.serve_with(witness.listen, witness.testify_forever)
    return sandbox


@pytest.fixture(scope="session")
def lacking(as_root: None) -> dict[str, str | None]:
    """For each thing that a row may require: None, or the sentence that says why this kernel has it not."""
    with Sandbox() as fresh:
        return {name: fresh.call(probe) for name, probe in PROBES.items()}


def apply_or_skip(enforcer: Enforcer, sandbox: Sandbox, policy: Policy, backend_name: str) -> None:
    """Applies the policy; a backend that can't is a skip, unless IMDS_GUARD_EXPECT names it."""
    try:
        enforcer.apply(sandbox, policy)
    except (Unsupported, NotPermitted) as error:
        if backend_name in EXPECTED_BACKENDS:
            raise
        pytest.skip(str(error))
