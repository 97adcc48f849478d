# SPDX-License-Identifier: Apache-2.0
"""Changes of policy and of program under a storm of connects.

A denied caller never gets through, an allowed one always does: outcomes are counted. The delayed hook waits between
reading the generation and using it, so that changes fall into that gap all the time. A mutant that does not wait for
the grace period must then be caught.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.backends.ebpf.store import MapStore
from imds_guard.errors import GuardError
from imds_guard.kernel import children, grace
from imds_guard.kernel.sandbox import Sandbox
from tests.kernel import guards
from tests.kernel.guards import BOTH, IPV4, MAPPED, NEW, NEW_POLICY, OLD, OLD_POLICY, STRANGER, Storm

CHANGES, UPDATES = 200, 20
DELAYED = (("IG_TEST_DELAY", 3000),)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    if os.geteuid() != 0:
        pytest.skip("attaching programs needs root")
    with guards.guarded_sandbox() as (one, _):
        yield one


def _change_often(backend: EbpfBackend, times: int) -> None:
    for n in range(times):
        backend.change(NEW_POLICY if n % 2 == 0 else OLD_POLICY)


def _begin(sandbox: Sandbox) -> tuple[Storm, Storm]:
    """A caller that both policies deny, and one that both allow."""
    return Storm(sandbox, STRANGER), Storm(sandbox, BOTH, MAPPED)


def _expect_no_mistake(denied: Storm, allowed: Storm) -> None:
    for storm in (denied, allowed):
        storm.wait_for(100)
    connected, refused, other = denied.counts()
    assert (connected, other) == (0, 0), f"the denied caller got through {connected} times of {refused + connected}"
    connected, refused, other = allowed.counts()
    assert (refused, other) == (0, 0), f"the allowed caller was denied {refused} times of {connected + refused}"


def test_changes_of_policy(sandbox: Sandbox) -> None:
    """200 flips of the generation."""
    backend = EbpfBackend(sandbox.cgroup)
    backend.apply(OLD_POLICY)
    denied, allowed = _begin(sandbox)
    _change_often(backend, CHANGES)
    _expect_no_mistake(denied, allowed)


@pytest.mark.parametrize("processors", [2, 1])
def test_changes_of_policy_with_a_delayed_hook(
    sandbox: Sandbox, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 flips while hooks have read the old generation and not yet used it.

    There are two ways to wait for them. The first does not wait where there is one processor.
    """
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: processors if name == "SC_NPROCESSORS_ONLN" else real(name))
    backend = EbpfBackend(sandbox.cgroup, DELAYED)
    backend.apply(OLD_POLICY)
    denied, allowed = _begin(sandbox)
    _change_often(backend, CHANGES)
    _expect_no_mistake(denied, allowed)


def test_a_change_without_the_grace_period_is_caught(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that deletes the old generation at once: the denied caller gets through."""
    backend = EbpfBackend(sandbox.cgroup, DELAYED)
    backend.apply(OLD_POLICY)
    denied, _ = _begin(sandbox)
    monkeypatch.setattr(grace, "wait_for_running_programs", lambda: None)
    monkeypatch.setattr(MapStore, "_carry_report", lambda *_: None)  # it takes as long as many a hook
    for _ in range(50):
        _change_often(backend, CHANGES)
        if denied.counts()[0]:
            return
    pytest.fail("10,000 changes without a grace period, and nobody got through: the test above proves nothing")


def test_updates_of_the_program(sandbox: Sandbox) -> None:
    """20 times another version by LINK_UPDATE, with another policy each time."""
    versions = [EbpfBackend(sandbox.cgroup, (("IG_ANOTHER_VERSION", n),)) for n in (1, 2)]
    versions[0].apply(OLD_POLICY)
    versions[1].apply(OLD_POLICY)
    denied, allowed = _begin(sandbox)
    for n in range(UPDATES):
        versions[n % 2].apply(NEW_POLICY if n % 2 else OLD_POLICY)
    _expect_no_mistake(denied, allowed)
    assert versions[1].faults() == []


def test_replacements_of_the_maps(sandbox: Sandbox) -> None:
    """Ten times a pin is missing: apply() makes new maps and moves the hooks over to them."""
    backend = EbpfBackend(sandbox.cgroup)
    backend.apply(OLD_POLICY)
    denied, allowed = _begin(sandbox)
    for n in range(10):
        os.unlink(os.path.join(guards.folder_of(sandbox.cgroup).path, "locks"))
        backend.apply(NEW_POLICY if n % 2 == 0 else OLD_POLICY)
    _expect_no_mistake(denied, allowed)


def test_callers_on_one_list_alone_are_allowed_and_denied_in_turn(sandbox: Sandbox) -> None:
    """Each of the two callers that one policy allows sees both answers as the policies change."""
    backend = EbpfBackend(sandbox.cgroup)
    backend.apply(OLD_POLICY)
    storms = [Storm(sandbox, OLD, IPV4), Storm(sandbox, NEW, IPV4)]
    for n in range(20):
        backend.change(NEW_POLICY if n % 2 == 0 else OLD_POLICY)
        for storm in storms:
            storm.wait_for(5)
    for storm in storms:
        connected, refused, other = storm.counts()
        assert connected
        assert refused
        assert not other


def test_two_starts_at_once(sandbox: Sandbox) -> None:
    """They run one after the other. One of the two policies is in force, whole."""
    backend = EbpfBackend(sandbox.cgroup)
    backend.apply(OLD_POLICY)
    backend.remove()
    outcomes: list[str] = []
    for _ in range(5):
        pids = [children.fork(lambda p=wanted: backend.apply(p)) for wanted in (OLD_POLICY, NEW_POLICY)]  # type: ignore[misc]
        outcomes += [str(os.waitpid(pid, 0)[1]) for pid in pids]
        assert backend.read() in (OLD_POLICY, NEW_POLICY)
        assert backend.faults() == []
        backend.remove()
    assert set(outcomes) == {"0"}


def test_one_that_waits_too_long_says_so(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command holds the lock: the error is one sentence, and nothing is changed."""
    from imds_guard.kernel import lockfile

    backend = EbpfBackend(sandbox.cgroup)
    name = guards.folder_of(sandbox.cgroup).name
    monkeypatch.setattr(lockfile, "WAIT_S", 0.2)
    with lockfile.exclusive(name, 1), pytest.raises(GuardError, match="another imds-guard has been running"):
        backend.apply(OLD_POLICY)
    assert backend.read() is None
