# SPDX-License-Identifier: Apache-2.0
"""What a change of policy changes, in words, and that the words agree with decide()."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.policy import edit
from imds_guard.policy.decide import Caller, decide
from imds_guard.policy.difference import Difference, difference
from imds_guard.policy.difference_text import MAX_LINES, Names, difference_lines
from imds_guard.policy.emergency import emergency_policy
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.filters import Filter, FilterRules
from imds_guard.policy.lockdown import lockdown
from imds_guard.policy.model import Identities, Lock, Mode, Policy, Verdict, make_policy
from tests import strategies

NAMES = Names(lambda uid: f"u{uid}", lambda gid: f"g{gid}")
IMDS, OTHER = "169.254.169.254", "10.0.0.1"


def lock(name: str, *endpoints: str, users: tuple[int, ...] = (), groups: tuple[int, ...] = ()) -> Lock:
    return Lock(name, tuple(map(parse_endpoint, endpoints)), Identities(frozenset(users), frozenset(groups)))


def policy(*locks: Lock) -> Policy:
    return make_policy(locks)


def lines(before: Policy | None, after: Policy | None) -> list[str]:
    return difference_lines(difference(before, after), NAMES)


NEW_ENDPOINT = ["now locked: 10.0.0.2", "+ user u1 at 10.0.0.2", "+ group g9 at 10.0.0.2"]
BOTH = policy(lock("a", OTHER, IMDS, users=(1,), groups=(9,)))


def test_the_same_policy_does_not_differ() -> None:
    assert not difference(BOTH, BOTH)
    assert difference(BOTH, BOTH) == Difference()


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (policy(lock("a", OTHER, IMDS, users=(1, 2), groups=(9,))), ["+ user u2"]),
        (policy(lock("a", OTHER, IMDS, users=(1,), groups=(1, 9))), ["+ group g1"]),
        (policy(lock("a", OTHER, IMDS, users=(2,), groups=(9,))), ["+ user u2", "- user u1"]),
        (policy(lock("a", OTHER, users=(1,), groups=(9,))), [f"no longer locked: {IMDS}"]),
        (policy(lock("a", OTHER, IMDS, "10.0.0.2", users=(1,), groups=(9,))), NEW_ENDPOINT),
        (BOTH._replace(mode=Mode.AUDIT), ["mode: enforce -> audit"]),
        (BOTH._replace(containers=Verdict.ALLOW), ["containers: deny -> allow"]),
        (BOTH._replace(strict=True), ["strict: off -> on"]),
        (policy(BOTH.locks[0]._replace(name="z")), []),
        (policy(BOTH.locks[0]._replace(default=Verdict.ALLOW)), [f"everyone else is allowed now at {IMDS} and 1 more"]),
        (policy(BOTH.locks[0]._replace(deny=Identities(frozenset((3,))))), ["+ denied user u3"]),
    ],
)
def test_a_change_is_a_line(after: Policy, expected: list[str]) -> None:
    assert lines(BOTH, after) == expected


def test_a_lock_that_is_split_differs_only_where_somebody_has_another_right() -> None:
    after = edit.allow(BOTH, Identities(frozenset((5,))), parse_endpoint(IMDS))
    assert len(after.locks) == 2
    assert lines(BOTH, after) == [f"+ user u5 at {IMDS}"]
    assert lines(after, BOTH) == ["- user u5"]  # nowhere any more
    assert lines(after, edit.allow(BOTH, Identities(frozenset((5,))))) == [f"+ user u5 at {OTHER}"]


def test_an_endpoint_inside_a_prefix_differs_from_the_prefix() -> None:
    wide = policy(lock("a", "10.0.0.0/8", users=(1,)))
    assert lines(wide, lockdown(wide, OTHER, [2])) == [f"+ user u2 at {OTHER}"]
    narrow = policy(lock("a", "10.0.0.0/8", users=(1,)), lock("b", OTHER, users=(2,)))
    assert lines(wide, narrow) == [f"+ user u2 at {OTHER}", f"- user u1 at {OTHER}"]


def test_ports_and_protocols_are_compared_on_their_own() -> None:
    before, after = policy(lock("a", f"{OTHER}:80+443")), policy(lock("a", f"{OTHER}:443+8080,tcp"))
    assert lines(before, after) == [f"no longer locked: {OTHER}:80,tcp and 1 more", f"now locked: {OTHER}:8080,tcp"]


def test_a_first_policy_and_none_any_more() -> None:
    assert lines(None, BOTH) == [f"now locked: {IMDS} and 1 more", "+ user u1", "+ group g9"]
    assert lines(BOTH, None) == [f"no longer locked: {IMDS} and 1 more"]


def test_forwarded_packets_are_a_setting() -> None:
    found = difference(BOTH, BOTH, ("drop", "leave"))
    assert difference_lines(found, NAMES) == ["forwarded: drop -> leave"]
    assert found.opening == found


def test_filters_are_compared_by_what_they_do() -> None:
    one = Filter("f", ("a",), Identities(frozenset((7,))), rules=FilterRules(allow=("GET /**",)))
    before = make_policy(BOTH.locks, filters=(one,), filter_uid=99)
    changed = make_policy(BOTH.locks, filters=(one._replace(rules=FilterRules(allow=("GET /a",))),), filter_uid=99)
    assert lines(BOTH, before) == ["+ filter f"]
    assert lines(before, BOTH) == ["- filter f"]
    assert lines(before, changed) == ["filter f: changed"]
    split = edit.allow(before, Identities(frozenset((5,))), parse_endpoint(IMDS))
    assert lines(before, split) == [f"+ user u5 at {IMDS}"]


STRONG = FilterRules(
    ("GET /**",), ("GET /a",), "ec2-metadata-filter", ("aws-cli/",), require_imdsv2=True, sets=("no-credentials",)
)


@pytest.mark.parametrize(
    "less",
    [
        {"audit": True},
        {"deny": ()},
        {"sets": ()},
        {"require_imdsv2": False},
        {"headers": None, "user_agents": ()},
        {"user_agents": ("aws-cli/", "x")},
    ],
)
def test_a_filter_that_loses_a_restriction_opens(less: dict[str, Any]) -> None:
    one = Filter("f", ("a",), Identities(frozenset((7,))), rules=STRONG)
    weak = one._replace(rules=STRONG._replace(**less))
    strong, weaker = (make_policy(BOTH.locks, filters=(each,), filter_uid=99) for each in (one, weak))
    assert difference_lines(difference(strong, weaker).opening, NAMES) == ["filter f: changed"]
    assert not difference(strong, strong).opening
    if "user_agents" not in less:
        assert not difference(weaker, strong).opening


def test_a_filter_that_is_for_everyone_now_opens() -> None:
    one = Filter("f", ("a",), Identities(frozenset((7,))), rules=STRONG)
    before, after = (
        make_policy(BOTH.locks, filters=(each,), filter_uid=99)
        for each in (one, one._replace(who=Identities(), everyone=True))
    )
    assert (bool(difference(before, after).opening), bool(difference(after, before).opening)) == (True, False)


def test_what_opens_and_what_takes_away() -> None:
    gained = difference(BOTH, edit.allow(BOTH, Identities(frozenset((5,)))))
    assert (bool(gained.opening), bool(gained.taking)) == (False, False)
    lost = difference(BOTH, edit.revoke(BOTH, Identities(frozenset((1,)))))
    assert (bool(lost.opening), bool(lost.taking)) == (False, True)
    audit = difference(BOTH, BOTH._replace(mode=Mode.AUDIT))
    assert (bool(audit.opening), bool(audit.taking)) == (True, False)
    unlocked = difference(BOTH, policy(lock("a", OTHER, users=(1,), groups=(9,))))
    assert (bool(unlocked.opening), bool(unlocked.taking)) == (True, False)
    locked = difference(None, BOTH)
    assert (bool(locked.opening), bool(locked.taking)) == (False, False)


def test_the_end_of_the_emergency_lock_is_known() -> None:
    assert difference(emergency_policy(""), BOTH).emergency_ends
    assert not difference(emergency_policy(""), emergency_policy("")).emergency_ends


def test_many_entries_are_few_lines() -> None:
    """Quadratic work would take minutes here."""
    found = difference(BOTH, edit.allow(BOTH, Identities(frozenset(range(100_000)))))
    said = difference_lines(found, NAMES)
    assert len(said) == MAX_LINES + 1
    assert "99999 entries" in said[-1]


@given(st.data(), strategies.policies(), strategies.policies(), strategies.callers())
def test_no_decision_changes_without_a_difference(data: st.DataObject, one: Policy, other: Policy, who: Caller) -> None:
    """Whatever decide() judges otherwise under the other policy, the difference names something.

    Who newly passes does so by what opens, or by an entry that was added.
    """
    to = data.draw(strategies.destinations(data.draw(st.sampled_from([one, other]))))
    before, after = decide(one, who, to).allowed, decide(other, who, to).allowed
    found = difference(one, other)
    if before != after:
        assert found
    if after and not before:
        assert found.opening or found.filters_added or any(c.kind == "allow" and c.added for c in found.lists)


def test_another_account_of_the_filters_is_a_setting() -> None:
    """That user may connect to what the filters serve."""
    one = Filter("f", ("a",), Identities(frozenset((7,))), rules=FilterRules(allow=("GET /**",)))
    before, after = (make_policy(BOTH.locks, filters=(one,), filter_uid=uid) for uid in (99, 98))
    assert lines(before, after) == ["filter account: 99 -> 98"]
    assert lines(BOTH, before) == ["+ filter f"]
