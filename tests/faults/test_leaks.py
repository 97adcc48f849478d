# SPDX-License-Identifier: Apache-2.0
"""Starts and stops leave nothing. ``python -m bench.leaks`` does the same thousands of times."""

from __future__ import annotations

import os

import pytest

from bench.leaks import measure
from imds_guard.kernel.children import run_in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and attaching programs needs root")

ROUNDS = {"ebpf": [5, 30], "iptables": [2, 6]}


@pytest.mark.parametrize("name", sorted(ROUNDS))
def test_nothing_is_left(name: str) -> None:
    """No map, program, link, pin, rule or file is left, and no more descriptors are open than before."""
    early, late = run_in_child(lambda: measure(name, ROUNDS[name]), timeout_s=600)
    assert late["descriptors"] == early["descriptors"]
    counted = ("maps", "programs", "links", "pins", "lock files", "rules", "records")
    assert {what: late[what] for what in counted if what in late} == {what: 0 for what in counted if what in late}
    assert any(what in late for what in counted)
