# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for guests alone: the conformance table's eBPF backend is attached at the root of cgroup2.

A plugin and no environment variable: on a machine that somebody works on, nothing must lead there by mistake.
"""

from __future__ import annotations

import itertools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy import Policy
from tests.conformance import enforcers
from tests.conformance.families import ADDRESSES
from tests.conformance.model import Case


class AtRoot(enforcers.Ebpf):
    """As its parent, above every process of the guest and not above a cgroup of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._backend = EbpfBackend()

    def __enter__(self) -> AtRoot:
        self._stack = ExitStack()
        return self

    def sandbox(self) -> Sandbox:
        """Enforcer.sandbox(): anywhere, for everything is below the root."""
        return Sandbox(ADDRESSES)

    def apply(self, sandbox: Sandbox, policy: Policy) -> None:
        """Enforcer.apply(). Where it raises there is nothing to remove, and bpf(2) may refuse even to look."""
        super().apply(sandbox, policy)
        self._stack.pop_all()
        self._stack.callback(self._backend.remove)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--every N."""
    parser.addoption("--every", type=int, default=1, metavar="N", help="run one of N cases of a conformance test")


def pytest_configure(config: pytest.Config) -> None:
    """Takes the place of the backend that is attached to a child cgroup of the test's own."""
    if "IMDS_GUARD_ROW" not in os.environ:
        raise pytest.UsageError("at_root attaches to the whole machine: it is for the guests of vagrant/run.py")
    enforcers.ENFORCERS["ebpf"] = AtRoot


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """Of the cases of a conformance test one of N stays, the same ones for every backend."""
    every: int = config.getoption("--every")
    cases: Dict[str, Dict[str, None]] = {}
    for item in items:
        test, case = _case(item)
        cases.setdefault(test, {})[case] = None
    kept = {(test, case) for test in cases for case in itertools.islice(cases[test], 0, None, every)}
    left_out = [item for item in items if all(_case(item)) and _case(item) not in kept]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _case(item: pytest.Item) -> Tuple[str, str]:
    """The names of a test and of its case; the second is empty for a test that has none."""
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return item.nodeid.partition("[")[0], case.id if isinstance(case, Case) else ""
