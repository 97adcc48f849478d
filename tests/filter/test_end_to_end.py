# SPDX-License-Identifier: Apache-2.0
"""A guard, the service, and callers of each kind, in a namespace with a metadata service: who gets what."""

from __future__ import annotations

import os

import pytest

from imds_guard.policy.model import make_policy
from tests.filter.scene import (
    ACCOUNT,
    ALLOWED,
    BY_USER,
    GROUP,
    POLICY,
    REGION,
    SECRET,
    STRANGER,
    Scene,
    policy_of,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="attaches programs to a cgroup of its own")

DENIED = "EPERM"


@pytest.fixture
def scene(by_ebpf: Scene) -> Scene:
    return by_ebpf


def test_who_gets_what(scene: Scene) -> None:
    """The allowed user is not filtered, and nobody else gets anything."""
    assert scene.ask(BY_USER, REGION) == DENIED, "without the service"
    scene.start()
    rows = {
        "allowed": [scene.ask(ALLOWED, path) for path in (REGION, SECRET)],
        "by user": [scene.ask(BY_USER, path) for path in (REGION, SECRET)],
        "by supplementary group": [scene.ask(STRANGER, path, GROUP) for path in (REGION, SECRET)],
        "stranger": [scene.ask(STRANGER, path) for path in (REGION, SECRET)],
        "the filter's user": [scene.ask(ACCOUNT.uid, path) for path in (REGION, SECRET)],
    }
    assert rows == {
        "allowed": ["200", "200"],
        "by user": ["200", "403"],
        "by supplementary group": ["200", "403"],
        "stranger": [DENIED, DENIED],
        "the filter's user": ["200", "200"],
    }


def test_a_changed_rule_has_a_new_listener(scene: Scene) -> None:
    """Until a command has made it, the caller is denied: the old listener has other rules."""
    scene.start()
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET)) == ("200", "403")
    scene.change(policy_of("GET /**", deny=("/*/meta-data/placement/**",)))
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET)) == (DENIED, DENIED)
    assert "the filter does not serve 'region'" in scene.faults()[0]
    assert scene.reload() == []
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET), scene.faults()) == ("403", "200", [])


def test_other_callers_change_no_listener(scene: Scene) -> None:
    scene.start()
    scene.change(policy_of("GET /*/meta-data/placement/**", users=(STRANGER,)))
    assert (scene.ask(STRANGER, REGION), scene.ask(BY_USER, REGION), scene.faults()) == ("200", DENIED, [])


def test_a_policy_without_filters_closes_the_listeners(scene: Scene) -> None:
    scene.start()
    scene.change(make_policy(POLICY.locks))
    assert scene.reload() == []
    assert (scene.ask(BY_USER, REGION), scene.faults()) == (DENIED, [])


def test_kill_9_never_gives_direct_access(scene: Scene) -> None:
    """The caller is denied at once, status says so, and a new service takes over."""
    scene.start()
    scene.kill(scene.service)
    assert (scene.ask(BY_USER, SECRET), scene.ask(BY_USER, REGION)) == (DENIED, DENIED)
    assert "the filter does not serve 'region', so its callers are denied" in scene.faults()[0]
    scene.start()
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET)) == ("200", "403")
