# SPDX-License-Identifier: Apache-2.0
"""The way back: ``start`` of a release over the guard of this tree, as after a downgrade of the package."""

from __future__ import annotations

import pytest

from imds_guard.backends.ebpf import abi
from tests.release.callers import BOTH
from tests.release.conftest import PairOf
from tests.release.releases import RELEASES, Pair, Release, Variant
from tests.release.scene import FIRST_USERS, NO_TRACES, SECOND_USERS, Load, Scene, users_of


def _expect_a_whole_guard(pair: Pair, scene: Scene, *, strict: bool) -> None:
    """``status`` of the release finds no fault, callers get the second policy, and its ``stop`` removes the guard."""
    status = scene.status(pair.old)
    assert (status["state"], status["faults"]) == ("active", [])
    assert (users_of(status), status["policy"]["strict"]) == (set(SECOND_USERS), strict)
    assert scene.passing() == set(SECOND_USERS)
    scene.run(pair.old, "stop")
    assert scene.traces() == NO_TRACES


def test_each_connect_is_judged_by_one_of_the_policies(pair: Pair, scene: Scene) -> None:
    """The release takes over under load: no verdict is of neither policy, and its guard is whole."""
    scene.start(pair.new, FIRST_USERS)
    load = Load(scene.sandbox)
    scene.start(pair.old, SECOND_USERS)
    load.expect_each_judged_by_one_of_the_policies()
    _expect_a_whole_guard(pair, scene, strict=False)


def test_strict_is_taken_over_whole(pair: Pair, scene: Scene) -> None:
    """The release leaves a whole strict guard, whatever the maps of this tree are like."""
    scene.start(pair.new, FIRST_USERS, strict=True)
    scene.start(pair.old, SECOND_USERS, strict=True)
    _expect_a_whole_guard(pair, scene, strict=True)


@pytest.mark.parametrize("same", [row for row in RELEASES if row.abi == abi.ABI], ids=lambda row: row.version)
def test_strict_lets_approved_connections_go_on(same: Release, pair_of: PairOf, scene: Scene) -> None:
    """A release with the ABI of this tree reads its marks: a caller that both policies allow loses no datagram."""
    pair = pair_of(same, Variant.AS_RELEASED)
    scene.start(pair.new, FIRST_USERS, strict=True)
    connections, load = scene.connections(BOTH), Load(scene.sandbox)
    scene.start(pair.old, SECOND_USERS, strict=True)
    load.expect_each_judged_by_one_of_the_policies()
    for connection in connections:
        connection.expect_to_go_on()
