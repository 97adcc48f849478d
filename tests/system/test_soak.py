# SPDX-License-Identifier: Apache-2.0
"""Half a minute of soak.py."""

from __future__ import annotations

import os

import pytest

from imds_guard.kernel.namespaces import INITIAL_PID_NAMESPACE, namespace_inode
from tests.system import soak

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root"),
    pytest.mark.skipif(namespace_inode("pid") != INITIAL_PID_NAMESPACE, reason="in a container every caller is denied"),
]


def test_nobody_without_privilege_hinders_the_commands() -> None:
    done = soak.soak(30.0)
    assert done.problems == []
    assert len(done.ran) >= len(soak.CYCLE)
    assert done.denied > 100, "the storms did not blow"
    said = "".join(one.output for one in done.ran)
    assert "has locked the socket" in said, "no connection was held"
    assert "could not be read in time" in said, "no command line was held"
