# SPDX-License-Identifier: Apache-2.0
"""The other commands of this tree over the guard that a release left in the kernel."""

from __future__ import annotations

import json

import pytest

from tests.release.callers import BOTH, NEW, OLD, STRANGER, WAYS
from tests.release.releases import Pair
from tests.release.scene import FIRST_USERS, NO_TRACES, SECOND_USERS, Scene, users_of


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
def test_status_shows_the_policy_of_the_release(readable: Pair, scene: Scene, strict: bool) -> None:
    """``status`` finds the guard active and whole, with the policy that the release put in force."""
    scene.start(readable.old, FIRST_USERS, strict=strict)
    status = scene.status(readable.new)
    assert (status["state"], status["faults"]) == ("active", [])
    assert (users_of(status), status["policy"]["strict"]) == (set(FIRST_USERS), strict)


def test_allow_and_revoke_change_the_policy_of_the_release(readable: Pair, scene: Scene) -> None:
    """Each changes the policy in force for one user, and leaves the programs of the release in place."""
    scene.start(readable.old, FIRST_USERS)
    versions = scene.status(readable.new)["ebpf"]["versions"]
    scene.run(readable.new, "allow", "--user", str(NEW))
    assert scene.passing() == {OLD, NEW, BOTH}
    scene.run(readable.new, "revoke", "--user", str(OLD))
    assert scene.passing() == set(SECOND_USERS)
    assert scene.status(readable.new)["ebpf"]["versions"] == versions


def test_report_and_watch_read_the_denials_of_the_release(readable: Pair, scene: Scene) -> None:
    """Both name the denied callers that the programs of the release recorded; ``watch`` names the hook of each."""
    scene.start(readable.old, FIRST_USERS)
    assert scene.passing() == set(FIRST_USERS)
    rows = scene.run(readable.new, "report", "--json").values["rows"]
    assert {(row["uid"], row["count"]) for row in rows} == {(NEW, len(WAYS)), (STRANGER, len(WAYS))}
    printed = scene.run(readable.new, "watch", "--once", "--json").stdout
    events = [event for event in map(json.loads, printed.splitlines()) if event["event"] == "denied"]
    hooks = {(event["uid"], event["hook"]) for event in events}
    assert hooks == {
        (user, f"{call}{n}") for user in (NEW, STRANGER) for call in ("connect", "sendmsg") for n in (4, 6)
    }


def test_stop_removes_the_guard_of_the_release(pair: Pair, scene: Scene) -> None:
    """Every program and every pin is gone, that of the packets' hook, too, and everybody gets through."""
    scene.start(pair.old, FIRST_USERS, strict=True)
    scene.run(pair.new, "stop")
    assert scene.traces() == NO_TRACES
    assert scene.passing() == {OLD, NEW, BOTH, STRANGER}


def test_what_this_tree_can_not_read_stays_as_it_is(foreign: Pair, scene: Scene) -> None:
    """``status`` names the cause and the remedy, ``allow`` and ``revoke`` refuse, and the release's policy stays."""
    scene.start(foreign.old, FIRST_USERS)
    looked = scene.attempt(foreign.new, "status", "--json")
    assert (looked.status, looked.values["state"]) == (1, "degraded")
    (fault,) = looked.values["faults"]
    assert "of another version" in fault
    assert "imds-guard start" in fault
    for verb, user in (("allow", STRANGER), ("revoke", OLD)):
        refused = scene.attempt(foreign.new, verb, "--user", str(user))
        assert (refused.status, "imds-guard start" in refused.sentence) == (1, True)
    assert scene.passing() == set(FIRST_USERS)
