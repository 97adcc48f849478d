# SPDX-License-Identifier: Apache-2.0
"""Settings and checks for every run of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Hypothesis tries few examples by default, and five times as many where CI is set (as most CI services do) or with
# IMDS_GUARD_HYPOTHESIS=full. How long an example takes says nothing on a busy machine, so none has a deadline.
settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("full", max_examples=100, deadline=None)
settings.load_profile(os.environ.get("IMDS_GUARD_HYPOTHESIS") or ("full" if os.environ.get("CI") else "quick"))


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


@pytest.fixture(autouse=True, scope="session")
def _nothing_stays_on_the_machine() -> Iterator[None]:
    """At the end no cgroup of a sandbox of this run is left: a test that leaves one leaves its guard, too."""
    yield
    own_prefix = f"imds-guard-sandbox-{os.getpid()}-"
    left = [path for path, _, _ in os.walk("/sys/fs/cgroup") if os.path.basename(path).startswith(own_prefix)]
    assert not left, f"sandboxes that the tests left behind: {left}"
