# SPDX-License-Identifier: Apache-2.0
"""Programs that tests use and that not every machine has."""

from __future__ import annotations

import os
import shutil

import pytest

EXPECTED = "tools" in os.environ.get("IMDS_GUARD_EXPECT", "").split(",")
"""Whether all of them must be installed, as in the gate (.ci/run), which installs them."""


def missing(reason: str) -> None:
    """Skips the test because something is missing. Fails it where everything must be installed."""
    assert not EXPECTED, f"{reason}, and IMDS_GUARD_EXPECT has tools"
    pytest.skip(reason)


def need(*programs: str) -> None:
    """Calls missing() for the first of these programs that is not installed. /usr/sbin and /sbin are searched, too."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    for program in programs:
        if shutil.which(program, path=path) is None:
            missing(f"{program} is not installed")
