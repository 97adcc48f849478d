# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for guests alone: the conformance table's eBPF backend is attached at the root of cgroup2.

A plugin and no environment variable: on a machine that somebody works on, nothing must lead there by mistake.
"""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Takes the place of the backend that is attached to a child cgroup of the test's own."""
    from imds_guard.backends.ebpf import EbpfBackend
    from imds_guard.kernel.sandbox import Sandbox
    from tests.conformance import enforcers

    def at_root(sandbox: Sandbox, folder: str) -> enforcers.Enforcer:
        return enforcers.Enforcer(EbpfBackend(), sandbox, inside=False, refusals=frozenset({"EPERM"}))

    enforcers.ENFORCERS["ebpf"] = at_root
