# SPDX-License-Identifier: Apache-2.0
"""Settings and checks for every run of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from imds_guard.backends import Change
from imds_guard.policy.model import Policy

# Hypothesis tries few examples by default, and five times as many where CI is set (as most CI services do) or with
# IMDS_GUARD_HYPOTHESIS=full. How long an example takes says nothing on a busy machine, so none has a deadline.
settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("full", max_examples=100, deadline=None)
settings.load_profile(os.environ.get("IMDS_GUARD_HYPOTHESIS") or ("full" if os.environ.get("CI") else "quick"))

collect_ignore = [] if os.environ.get("IMDS_GUARD_CLIENTS") else ["clients"]
"""./run clients sets the variable. Its clients come from PyPI and npm: a user's ./run test does not fetch them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/vm. They are here because pytest asks only the first conftest.py."""
    parser.addoption(
        "--vm-cases",
        type=int,
        default=300_000,
        metavar="N",
        help="runs in test_decisions.py; a third of it in test_egress.py and in test_changes.py",
    )
    parser.addoption("--vm-seed", type=_seed, metavar="SEED[:FIRST]", help="the seed of these, and the first scene")


def _seed(text: str) -> tuple[int, int]:
    seed, _, first = text.partition(":")
    return int(seed), int(first or 0)


_tries: list[str] = []
"""The root of the cgroups, for each time that a test of this process would have locked the machine."""


@pytest.fixture(autouse=True)
def _no_test_locks_the_machine(_nothing_locks_the_machine: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Says so at once, also where the command under test takes the refusal for an error of the kernel."""
    yield
    assert not _tries, f"{request.node.nodeid} would have locked the machine: it lacks a cgroup of its own"


@pytest.fixture(autouse=True, scope="session")
def _nothing_locks_the_machine() -> Iterator[None]:
    """No test of this process attaches to the root of the cgroups: that would lock a machine in use."""
    from imds_guard.backends.ebpf import changes
    from imds_guard.backends.ebpf.changes import Target

    real = changes.install

    def install(target: Target, policy: Policy) -> Change:
        if target.cgroup.is_root:
            _tries.append(target.cgroup.path)
            raise AssertionError("a test would lock the machine")
        return real(target, policy)

    changes.install = install
    yield
    changes.install = real


@pytest.fixture(autouse=True, scope="session")
def _nothing_stays_on_the_machine() -> Iterator[None]:
    """At the end no cgroup of a sandbox of this run is left: a test that leaves one leaves its guard, too."""
    yield
    own_prefix = f"imds-guard-sandbox-{os.getpid()}-"
    left = [path for path, _, _ in os.walk("/sys/fs/cgroup") if os.path.basename(path).startswith(own_prefix)]
    assert not left, f"sandboxes that the tests left behind: {left}"
