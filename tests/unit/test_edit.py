# SPDX-License-Identifier: Apache-2.0
"""The allowlists of a policy, changed by allow and revoke."""

from __future__ import annotations

from typing import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from imds_guard.config.options import policy_from_options
from imds_guard.errors import GuardError, UsageError
from imds_guard.policy import edit
from imds_guard.policy.decide import UNBOUND, Caller, Destination, Reason, decide, resolve_unspecified
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.ports import has_port
from tests.strategies import callers, destinations, identities, patient, policies

Edit = Callable[..., Policy]

FOO, BAR = Identities(frozenset([1001])), Identities(frozenset([1002]))
ROOT = Identities(frozenset([0]))
STAFF = Identities(groups=frozenset([2001]))


def lock(name: str, *endpoints: str, allow: Identities = FOO, **more: object) -> Lock:
    return Lock(name, tuple(map(parse_endpoint, endpoints)), allow, **more)  # type: ignore[arg-type]


def both(one: Identities, other: Identities) -> Identities:
    return Identities(one.users | other.users, one.groups | other.groups)


WEB = make_policy([lock("web", "10.0.0.1", "10.0.0.2")])


def test_allow_adds_to_every_lock() -> None:
    policy = make_policy([lock("a", "10.0.0.1"), lock("b", "10.0.0.2")], Mode.AUDIT, Verdict.ALLOW)
    wanted = make_policy(
        [lock("a", "10.0.0.1", allow=both(FOO, STAFF)), lock("b", "10.0.0.2", allow=both(FOO, STAFF))],
        Mode.AUDIT,
        Verdict.ALLOW,
    )
    assert edit.allow(policy, STAFF) == wanted
    assert edit.revoke(wanted, STAFF) == policy


def test_a_group_is_not_the_user_of_that_number() -> None:
    policy = make_policy([lock("web", "10.0.0.1", allow=Identities(frozenset([7]), frozenset([7])))])
    assert edit.revoke(policy, Identities(groups=frozenset([7]))).locks[0].allow == Identities(frozenset([7]))
    assert edit.revoke(policy, Identities(frozenset([7]))).locks[0].allow == Identities(groups=frozenset([7]))


def test_allowing_again_and_revoking_a_stranger_change_nothing() -> None:
    assert edit.allow(WEB, FOO) == WEB
    assert edit.revoke(WEB, BAR) == WEB


def test_an_allowlist_without_its_last_user_allows_nobody() -> None:
    """An empty allowlist does not mean everybody."""
    (empty,) = edit.revoke(WEB, FOO).locks
    assert (empty.allow, empty.default) == (Identities(), Verdict.DENY)


@pytest.mark.parametrize("change", [edit.allow, edit.revoke])
def test_different_allowlists_are_refused_with_an_endpoint_of_each_lock(change: Edit) -> None:
    policy = make_policy([lock("a", "10.0.0.1:80"), lock("b c", "fd00::1", allow=BAR)])
    with pytest.raises(UsageError, match=r"\('a': --ip 10\.0\.0\.1:80; 'b c': --ip fd00::1\)$"):
        change(policy, STAFF)


# --- at one endpoint ------------------------------------------------------------------------------------------------


def test_a_whole_lock_keeps_its_name() -> None:
    policy = make_policy([lock("a", "10.0.0.1"), lock("b", "10.0.0.2", allow=BAR)])
    changed = edit.allow(policy, STAFF, parse_endpoint("10.0.0.2"))
    assert changed == make_policy([lock("a", "10.0.0.1"), lock("b", "10.0.0.2", allow=both(BAR, STAFF))])


def test_an_endpoint_among_others_gets_a_lock_of_its_own() -> None:
    changed = edit.allow(WEB, BAR, parse_endpoint("10.0.0.2"))
    assert changed == make_policy([lock("web", "10.0.0.1"), lock("10.0.0.2", "10.0.0.2", allow=both(FOO, BAR))])


def test_some_ports_get_a_lock_of_their_own() -> None:
    changed = edit.revoke(WEB, FOO, parse_endpoint("10.0.0.2:80,tcp"))
    assert changed == make_policy(
        [
            lock("web", "10.0.0.1", "10.0.0.2:!80,tcp", "10.0.0.2,udp"),
            lock("10.0.0.2", "10.0.0.2:80,tcp", allow=Identities()),
        ]
    )


def test_both_parts_keep_the_deny_list_and_the_default() -> None:
    policy = make_policy([lock("web", "10.0.0.1", "10.0.0.2", deny=BAR, default=Verdict.ALLOW)])
    changed = edit.allow(policy, STAFF, parse_endpoint("10.0.0.2"))
    assert [(one.deny, one.default) for one in changed.locks] == [(BAR, Verdict.ALLOW)] * 2


def test_a_lock_is_not_split_when_nothing_changes() -> None:
    assert edit.allow(WEB, FOO, parse_endpoint("10.0.0.2")) == WEB
    assert edit.revoke(WEB, BAR, parse_endpoint("10.0.0.2:80")) == WEB


def test_a_new_lock_gets_a_name_that_is_free() -> None:
    policy = make_policy([lock("10.0.0.2", "10.0.0.1", "10.0.0.2")])
    changed = edit.allow(policy, BAR, parse_endpoint("10.0.0.2"))
    assert [one.name for one in changed.locks] == ["10.0.0.2", "10.0.0.2 (2)"]


def test_an_endpoint_in_two_locks_changes_both() -> None:
    """Each lock has some ports of the endpoint."""
    policy = make_policy([lock("a", "10.0.0.1:80"), lock("b", "10.0.0.1:443", allow=BAR)])
    changed = edit.allow(policy, STAFF, parse_endpoint("10.0.0.1"))
    assert [one.allow for one in changed.locks] == [both(FOO, STAFF), both(BAR, STAFF)]


@pytest.mark.parametrize("endpoint", ["10.0.0.3", "fd00::1", "10.0.0.0/30"])
@pytest.mark.parametrize("change", [edit.allow, edit.revoke])
def test_an_endpoint_in_no_lock_is_refused(change: Edit, endpoint: str) -> None:
    with pytest.raises(UsageError, match=r"^no lock contains .*: imds-guard status lists the endpoints$"):
        change(WEB, BAR, parse_endpoint(endpoint))


# --- particular locks -----------------------------------------------------------------------------------------------


def test_the_wireserver_keeps_root() -> None:
    """Azure's agent runs as root. Root on the WireServer's list is not a difference from the other lists."""
    policy = policy_from_options(users=["0", "1001"], ips=["10.0.0.1", "168.63.129.16"])
    revoked = edit.revoke(policy, Identities(frozenset([0, 1001])))
    assert {one.name: one.allow for one in revoked.locks} == {
        "default": Identities(),
        "wireserver": ROOT,
    }
    assert edit.allow(revoked, FOO).locks[0].allow == FOO
    alone = policy_from_options(users=["1001"], presets=["wireserver"])
    assert [one.allow for one in edit.revoke(alone, Identities(frozenset([0, 1001]))).locks] == [ROOT]
    split = edit.allow(policy, BAR, parse_endpoint("168.63.129.16:80,tcp"))
    assert {one.name for one in split.locks} == {"default", "wireserver", "168.63.129.16"}
    revoked = edit.revoke(split, ROOT, parse_endpoint("168.63.129.16"))
    assert all(0 in one.allow.users for one in revoked.locks)


def test_root_on_another_list_is_a_difference() -> None:
    policy = make_policy(
        [lock("a", "10.0.0.1", allow=both(FOO, ROOT)), lock("b", "10.0.0.2"), lock("c", "168.63.129.16:80,tcp")]
    )
    with pytest.raises(UsageError, match="the locks have different allowlists"):
        edit.allow(policy, BAR)


def test_a_lock_that_allows_by_default_can_not_revoke() -> None:
    policy = make_policy([lock("a", "10.0.0.1", allow=Identities(), deny=BAR, default=Verdict.ALLOW)])
    for endpoint in (None, parse_endpoint("10.0.0.1")):
        with pytest.raises(UsageError, match=r"^revoking under lock 'a': .*--deny-user"):
            edit.revoke(policy, FOO, endpoint)


# --- for any policy -------------------------------------------------------------------------------------------------


@st.composite
def changes(draw: st.DrawFn) -> tuple[Policy, Identities, Endpoint]:
    """A policy, users and groups, and an endpoint of one of its locks, or some ports of it."""
    policy = draw(policies())
    assume(policy.locks)
    whole = draw(st.sampled_from([one for each in policy.locks for one in each.endpoints]))
    ports = draw(st.sampled_from([((0, 65535),), ((80, 80),), ((0, 79), (81, 65535))]))
    return policy, draw(identities()), draw(st.sampled_from([whole, Endpoint(whole.network, ports, ports)]))


def touches(endpoint: Endpoint, destination: Destination) -> bool:
    """True when the endpoint contains the destination. Another endpoint may be more specific."""
    address = resolve_unspecified(destination.address, UNBOUND)
    return (
        address is not None
        and endpoint.covers(address)
        and has_port(endpoint.ports(destination.protocol), destination.port)
    )


def is_named(who: Identities, caller: Caller) -> bool:
    return caller.fsuid in who.users or bool(who.groups & (caller.groups | {caller.fsgid}))


@patient
@given(changes(), callers(), st.data())
def test_others_and_other_endpoints_are_not_affected(
    change: tuple[Policy, Identities, Endpoint], caller: Caller, data: st.DataObject
) -> None:
    """A split changes the decision only at its endpoint, and only for who was allowed or revoked."""
    policy, who, endpoint = change
    destination = data.draw(destinations(policy))
    assume(not (touches(endpoint, destination) and is_named(who, caller)))
    for edited in (edit.allow, edit.revoke):
        try:
            changed = edited(policy, who, endpoint)
        except GuardError:
            continue
        before, after = decide(policy, caller, destination), decide(changed, caller, destination)
        assert (after.allowed, after.reason) == (before.allowed, before.reason)
        assert (changed.mode, changed.containers) == (policy.mode, policy.containers)


@patient
@given(changes(), st.data())
def test_allow_allows_and_revoke_revokes(change: tuple[Policy, Identities, Endpoint], data: st.DataObject) -> None:
    """At the most specific endpoint, unless a deny list decides."""
    policy, who, endpoint = change
    assume(endpoint.tcp and who)
    target = Destination(endpoint.network[0], data.draw(st.sampled_from(endpoint.tcp))[0])
    assume(is_decided_at(policy, target, endpoint))
    nobody = 4_000_000_000
    callers = [Caller(uid, nobody) for uid in who.users] + [Caller(nobody, nobody, frozenset([g])) for g in who.groups]
    allowed = edit.allow(policy, who, endpoint)
    for caller in callers:
        assert decide(allowed, caller, target).reason in (
            *(Reason.ALLOWED_USER, Reason.ALLOWED_GROUP),
            *(Reason.DENIED_USER, Reason.DENIED_GROUP),
        )
    try:
        revoked = edit.revoke(policy, who, endpoint)
    except GuardError:
        return
    for caller in callers:
        assert decide(revoked, caller, target).reason not in (Reason.ALLOWED_USER, Reason.ALLOWED_GROUP)


def is_decided_at(policy: Policy, target: Destination, endpoint: Endpoint) -> bool:
    """True when the most specific endpoint that contains the target has the prefix of ``endpoint``."""
    lengths = [one.network.prefixlen for lock in policy.locks for one in lock.endpoints if touches(one, target)]
    return int(target.address) != 0 and max(lengths, default=-1) == endpoint.network.prefixlen


# --- inside a locked prefix -----------------------------------------------------------------------------------------


def test_allow_inside_a_prefix_adds_a_lock_for_the_address() -> None:
    """The new lock allows who the prefix allows, and one more. The lock of the prefix does not change."""
    policy = make_policy([lock("net", "10.0.0.0/8:80,tcp")])
    wanted = make_policy([lock("net", "10.0.0.0/8:80,tcp"), lock("10.1.2.3", "10.1.2.3:80,tcp", allow=both(FOO, BAR))])
    assert edit.allow(policy, BAR, parse_endpoint("10.1.2.3:80,tcp")) == wanted


def test_the_lock_is_made_inside_the_most_specific_prefix() -> None:
    policy = make_policy([lock("wide", "10.0.0.0/8", allow=STAFF), lock("narrow", "10.1.0.0/16")])
    edited = edit.allow(policy, BAR, parse_endpoint("10.1.2.3"))
    (added,) = set(edited.locks) - set(policy.locks)
    assert added.allow == both(FOO, BAR)


def test_only_the_ports_that_the_prefix_locks_are_changed() -> None:
    edited = edit.allow(make_policy([lock("net", "10.0.0.0/8:80,tcp")]), BAR, parse_endpoint("10.1.2.3"))
    assert next(one for one in edited.locks if one.name == "10.1.2.3").endpoints == (parse_endpoint("10.1.2.3:80,tcp"),)


def test_an_address_outside_every_lock_is_refused() -> None:
    with pytest.raises(UsageError, match="no lock contains"):
        edit.allow(make_policy([lock("net", "10.0.0.0/8:80,tcp")]), BAR, parse_endpoint("10.1.2.3:443,tcp"))
