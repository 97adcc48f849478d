# SPDX-License-Identifier: Apache-2.0
"""Where a process is, for explain: with real namespaces, cgroups and rules."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from imds_guard.backends.forwarded import Forwarded
from imds_guard.commands.place import REJECTED, Place, place_of
from imds_guard.kernel.sandbox import Sandbox
from tests.kernel.rules_in_a_sandbox import FOO, policy_for
from tests.tools import need

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")


def test_a_process_of_another_network_namespace_is_rejected_where_rules_are(tmp_path: Path) -> None:
    """Not before, not for a process of the same namespace, and not where the guard rejects no forwarded packets."""
    need("iptables")
    with Sandbox() as router, Sandbox() as elsewhere:
        here, there = router.spawn(signal.pause), elsewhere.spawn(signal.pause)

        def before_and_after() -> list[str | None]:
            before = place_of(there, rejecting=True)
            Forwarded(state_folder=str(tmp_path)).apply(policy_for([FOO]))
            after = [place_of(pid, rejecting=True) for pid in (here, there)]
            return [one.forwarded for one in (before, *after, place_of(there, rejecting=False))]

        assert router.call(before_and_after, timeout_s=60) == [None, None, REJECTED, None]


def test_the_container_of_a_process_is_that_of_its_cgroup() -> None:
    with Sandbox() as outer:
        name = "docker-" + "0123456789abcdef" * 4 + ".scope"
        inner = Path(outer.cgroup, name)
        inner.mkdir()
        pid = outer.spawn(signal.pause)
        assert place_of(pid, rejecting=False) == Place()
        (inner / "cgroup.procs").write_text(str(pid), encoding="ascii")
        assert place_of(pid, rejecting=False) == Place("docker:0123456789ab")
        Path(outer.cgroup, "cgroup.procs").write_text(str(pid), encoding="ascii")
        inner.rmdir()


def test_a_process_that_has_ended_is_nowhere() -> None:
    assert place_of(2**22 - 1, rejecting=True) == Place()
