# SPDX-License-Identifier: Apache-2.0
"""Where a process is, for explain: with real namespaces, cgroups and rules."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from imds_guard.backends.forwarded import Forwarded, Forwarding
from imds_guard.commands.place import Place, place_of
from imds_guard.kernel.sandbox import Sandbox
from tests.kernel.rules_in_a_sandbox import FOO, policy_for
from tests.tools import need

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")

POLICY = policy_for([FOO])


def test_the_fate_of_forwarded_packets_is_known_of_another_network_namespace(tmp_path: Path) -> None:
    """Without rules and with them; not for a process of the same namespace, nor under the guard of a cgroup."""
    need("nft")
    rules = Forwarded(state_folder=str(tmp_path))
    with Sandbox() as router, Sandbox() as elsewhere:
        here, there = router.spawn(signal.pause), elsewhere.spawn(signal.pause)

        def before_and_after() -> list[Forwarding | None]:
            before = place_of(there, POLICY, rules)
            rules.apply(POLICY)
            after = [place_of(pid, POLICY, rules) for pid in (here, there)]
            return [one.forwarded for one in (before, *after, place_of(there, POLICY, None))]

        assert router.call(before_and_after, timeout_s=60) == [Forwarding.OPEN, None, Forwarding.REJECTED, None]


def test_the_container_of_a_process_is_that_of_its_cgroup() -> None:
    with Sandbox() as outer:
        inner = Path(outer.cgroup, "docker-" + "0123456789abcdef" * 4 + ".scope")
        inner.mkdir()
        pid = outer.spawn(signal.pause)
        assert place_of(pid, POLICY, None) == Place()
        (inner / "cgroup.procs").write_text(str(pid), encoding="ascii")
        assert place_of(pid, POLICY, None) == Place("docker:0123456789ab")
        Path(outer.cgroup, "cgroup.procs").write_text(str(pid), encoding="ascii")
        inner.rmdir()


def test_a_process_that_has_ended_is_nowhere() -> None:
    assert place_of(2**22 - 1, POLICY, None) == Place()
