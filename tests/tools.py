# SPDX-License-Identifier: Apache-2.0
"""Programs that tests judge with, and that not every machine has."""

from __future__ import annotations

import os
import shutil

import pytest

EXPECTED = "tools" in os.environ.get("IMDS_GUARD_EXPECT", "").split(",")
"""Whether all of them must be here, as in the gate (.ci/run), which installs them."""


def missing(reason: str) -> None:
    """Skips the test for what is not here; where everything must be here, fails it."""
    assert not EXPECTED, f"{reason}, and IMDS_GUARD_EXPECT has tools"
    pytest.skip(reason)


def need(*programs: str) -> None:
    """missing() for the first of these programs that is not installed; /usr/sbin counts where PATH leaves it out."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    for program in programs:
        if shutil.which(program, path=path) is None:
            missing(f"{program} is not installed")
