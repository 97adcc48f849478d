# SPDX-License-Identifier: Apache-2.0
"""``start`` of this tree over the guard of a release, while callers connect all the time."""

from __future__ import annotations

import pytest

from tests.release.callers import BOTH, OLD
from tests.release.releases import Pair
from tests.release.scene import FIRST_USERS, SECOND_USERS, Load, Scene, users_of


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
def test_each_connect_is_judged_by_the_old_or_the_new_policy(pair: Pair, scene: Scene, strict: bool) -> None:
    """No denied caller gets through, no caller that both policies allow is denied, and a verdict changes only once."""
    scene.start(pair.old, FIRST_USERS, strict=strict)
    load = Load(scene.sandbox)
    scene.start(pair.new, SECOND_USERS, strict=strict)
    load.expect_each_judged_by_one_of_the_policies()
    status = scene.status(pair.new)
    assert (status["state"], status["faults"]) == ("active", [])
    assert (users_of(status), status["policy"]["strict"]) == (set(SECOND_USERS), strict)


def test_strict_lets_approved_connections_go_on(pair: Pair, scene: Scene) -> None:
    """A caller that both policies allow loses not one datagram, and its TCP connections go on."""
    scene.start(pair.old, FIRST_USERS, strict=True)
    connections = scene.connections(BOTH)
    scene.start(pair.new, SECOND_USERS, strict=True)
    for connection in connections:
        connection.expect_to_go_on()


def test_strict_still_knows_who_made_a_connection(pair: Pair, scene: Scene) -> None:
    """A caller that loses access after the upgrade gets no more answers; the other one's connections go on."""
    scene.start(pair.old, FIRST_USERS, strict=True)
    revoked, kept = scene.connections(OLD, patience_s=1.0), scene.connections(BOTH)
    scene.start(pair.new, FIRST_USERS, strict=True)
    scene.run(pair.new, "revoke", "--user", str(OLD), "--keep-existing")
    for connection in revoked:
        connection.expect_no_answer()
    for connection in kept:
        connection.expect_to_go_on()


def test_maps_that_this_tree_can_not_read_are_replaced(foreign: Pair, scene: Scene) -> None:
    """After ``start`` no hook reads the policy from a map that the release made."""
    scene.start(foreign.old, FIRST_USERS)
    before = scene.policy_maps()
    scene.start(foreign.new, FIRST_USERS)
    assert before.isdisjoint(scene.policy_maps())
