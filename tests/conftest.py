# SPDX-License-Identifier: Apache-2.0
"""What holds for every run of tests, whichever were chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _nothing_stays_on_the_machine() -> Iterator[None]:
    """At the end no cgroup of a sandbox of this run is left: a test that leaves one leaves its guard too."""
    yield
    mine = f"imds-guard-sandbox-{os.getpid()}-"
    left = [path for path, _, _ in os.walk("/sys/fs/cgroup") if os.path.basename(path).startswith(mine)]
    assert not left, f"sandboxes that the tests left behind: {left}"
