# SPDX-License-Identifier: Apache-2.0
"""The policy after ``ip-lockdown IP [USER...]``."""

from __future__ import annotations

import ipaddress

import pytest

from imds_guard.errors import BadPolicy
from imds_guard.policy import edit
from imds_guard.policy.decide import Caller, Destination, decide
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.lockdown import lockdown
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Protocol, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS

IMDS, ECS = "169.254.169.254", "169.254.170.2"
FOO, BAR, BAZ, ROOT = 1_001, 1_002, 1_003, 0


def allows(policy: Policy, uid: int, to: str, port: int = 80, protocol: Protocol = Protocol.TCP, gid: int = 9) -> bool:
    return decide(policy, Caller(uid, gid), Destination(ipaddress.ip_address(to), port, protocol)).allowed


def test_the_first_call_makes_a_lock() -> None:
    """Everyone but the listed users is denied, root included. DNS at the address stays open."""
    policy = lockdown(None, IMDS, [FOO])
    assert [allows(policy, uid, IMDS) for uid in (FOO, BAR, ROOT)] == [True, False, False]
    assert allows(policy, BAR, IMDS, 53)
    assert allows(policy, BAR, "169.254.169.253")


def test_an_address_that_is_not_built_in_is_locked_on_all_ports() -> None:
    """TCP and UDP."""
    policy = lockdown(None, "10.1.2.3", [FOO])
    for port, protocol in ((53, Protocol.TCP), (53, Protocol.UDP), (8080, Protocol.TCP)):
        assert [allows(policy, uid, "10.1.2.3", port, protocol) for uid in (FOO, BAR)] == [True, False]


def test_without_users_nobody_gets_through() -> None:
    """No users means nobody, not everybody."""
    assert not allows(lockdown(None, IMDS), ROOT, IMDS)


def test_more_users_are_added_and_none_taken_away() -> None:
    """A second call adds its users. A call without users changes nothing."""
    policy = lockdown(lockdown(None, IMDS, [FOO]), IMDS, [BAR])
    assert [allows(policy, uid, IMDS) for uid in (FOO, BAR, ROOT)] == [True, True, False]
    assert lockdown(policy, IMDS) == policy


def test_another_address_makes_another_lock() -> None:
    """Each address has its own users, and the first lock does not change."""
    first = lockdown(None, IMDS, [FOO])
    both = lockdown(first, ECS, [BAR])
    assert first.locks[0] in both.locks
    assert [allows(both, uid, ip) for uid in (FOO, BAR) for ip in (IMDS, ECS)] == [True, False, False, True]


@pytest.mark.parametrize("ip", [IMDS, ECS, "10.1.2.3", "10.0.0.0/8", "fd00:ec2::254", "[fd00:ec2::254]:80,tcp"])
def test_the_same_again_changes_nothing(ip: str) -> None:
    """The second call returns the same policy, whether or not there were other locks."""
    for start in (None, lockdown(None, IMDS, [FOO]), _mixed()):
        once = lockdown(start, ip, [FOO, ROOT])
        assert lockdown(once, ip, [FOO, ROOT]) == once


def _mixed() -> Policy:
    """A lock of two addresses for a group, and a lock with only a deny list."""
    network = ipaddress.ip_network
    group = Identities(groups=frozenset({77}))
    shared = Lock("default", (Endpoint(network(IMDS), tcp=ALL_PORTS), Endpoint(network(ECS), tcp=ALL_PORTS)), group)
    open_ = Lock(
        "open",
        (Endpoint(network("10.1.2.3"), ((80, 443),)),),
        deny=Identities(frozenset({BAR})),
        default=Verdict.ALLOW,
    )
    return make_policy([shared, open_], Mode.AUDIT, Verdict.ALLOW)


def test_a_lock_of_several_addresses_is_split() -> None:
    """The user is added for that address only. The group still reaches both."""
    policy = lockdown(_mixed(), ECS, [FOO])._replace(mode=Mode.ENFORCE)
    assert [allows(policy, FOO, ip) for ip in (IMDS, ECS)] == [False, True]
    assert [allows(policy, BAR, ip, gid=77) for ip in (IMDS, ECS)] == [True, True]


def test_mode_and_containers_stay() -> None:
    """An audit policy stays an audit policy."""
    policy = lockdown(_mixed(), IMDS, [FOO])
    assert (policy.mode, policy.containers) == (Mode.AUDIT, Verdict.ALLOW)


def test_a_lock_that_allows_by_default_denies_there_afterwards() -> None:
    """Callers on no list are denied on the ports that allowed by default, and on the ports that were not locked."""
    policy = lockdown(_mixed(), "10.1.2.3", [FOO])._replace(mode=Mode.ENFORCE)
    assert [allows(policy, uid, "10.1.2.3", port) for uid in (FOO, ROOT) for port in (80, 90)] == [True] * 2 + [
        False
    ] * 2


def test_a_denied_user_is_refused() -> None:
    """Deny lists win, so the user would still be denied."""
    with pytest.raises(BadPolicy, match="user 1002 is on the deny list of lock 'open'"):
        lockdown(_mixed(), "10.1.2.3", [FOO, BAR])


def test_ports_of_one_lock_and_the_rest_of_another() -> None:
    """Users are added on the ports that are locked already. The other ports get a lock of their own."""
    policy = lockdown(lockdown(None, f"{IMDS}:80,tcp", [FOO]), IMDS, [BAR])
    assert [allows(policy, uid, IMDS, port) for uid in (FOO, BAR) for port in (80, 8080)] == [True, False, True, True]


def test_a_prefix_that_contains_the_address_is_not_changed() -> None:
    """The address gets a lock of its own, with the lists of the prefix: nobody loses a right, and none is gained."""
    (wide,) = lockdown(None, "169.254.0.0/16", [FOO]).locks
    prefix = make_policy([wide._replace(deny=Identities(frozenset((BAZ,))))])
    policy = lockdown(prefix, IMDS, [BAR])
    assert prefix.locks[0] in policy.locks
    assert [allows(policy, uid, IMDS) for uid in (FOO, BAR, BAZ)] == [True, True, False]
    (inner,) = [lock for lock in policy.locks if lock not in prefix.locks]
    assert inner.deny == Identities(frozenset((BAZ,)))
    assert lockdown(policy, IMDS, [BAR]) == policy


def test_it_means_what_allow_means_at_an_endpoint_inside_a_prefix() -> None:
    prefix = lockdown(None, "169.254.0.0/16", [FOO])
    allowed = edit.allow(prefix, Identities(frozenset((BAR,))), parse_endpoint(IMDS))
    assert lockdown(prefix, IMDS, [BAR]) == allowed


def test_ports_that_only_a_shorter_prefix_locks_have_its_lists() -> None:
    """10.0.0.0/16 locks port 80 alone: at 443 the /8 decides, as it did before."""
    policy = make_policy(
        [
            Lock("wide", (parse_endpoint("10.0.0.0/8"),), Identities(frozenset((FOO,)))),
            Lock("near", (parse_endpoint("10.0.0.0/16:80"),), Identities(frozenset((BAR,)))),
        ]
    )
    changed = lockdown(policy, "10.0.0.1", [BAZ])
    assert [allows(changed, uid, "10.0.0.1", 80) for uid in (FOO, BAR, BAZ)] == [False, True, True]
    assert [allows(changed, uid, "10.0.0.1", 443) for uid in (FOO, BAR, BAZ)] == [True, False, True]
    assert changed == edit.allow(policy, Identities(frozenset((BAZ,))), parse_endpoint("10.0.0.1:*"))
    assert allows(policy, FOO, "169.254.1.1")


def test_wireserver_allows_root() -> None:
    """Azure's agent runs as root and needs the WireServer."""
    policy = lockdown(None, "168.63.129.16", [FOO])
    assert [allows(policy, uid, "168.63.129.16") for uid in (FOO, BAR, ROOT)] == [True, False, True]


def test_a_bad_address_is_refused() -> None:
    """The message quotes it."""
    with pytest.raises(BadPolicy, match=r"metadata\.example"):
        lockdown(None, "metadata.example", [FOO])
