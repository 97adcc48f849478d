# SPDX-License-Identifier: Apache-2.0
"""What ``ip-lockdown IP [USER...]`` makes of a policy."""

from __future__ import annotations

import ipaddress

import pytest

from imds_guard.errors import BadPolicy
from imds_guard.policy.decide import Caller, Destination, decide
from imds_guard.policy.lockdown import lockdown
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Protocol, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS

IMDS, ECS = "169.254.169.254", "169.254.170.2"
FOO, BAR, ROOT = 1_001, 1_002, 0


def allows(policy: Policy, uid: int, to: str, port: int = 80, protocol: Protocol = Protocol.TCP, gid: int = 9) -> bool:
    return decide(policy, Caller(uid, gid), Destination(ipaddress.ip_address(to), port, protocol)).allowed


def test_the_first_call_makes_a_lock() -> None:
    """Everyone but the users named is denied, root included; DNS at the address lives."""
    policy = lockdown(None, IMDS, [FOO])
    assert [allows(policy, uid, IMDS) for uid in (FOO, BAR, ROOT)] == [True, False, False]
    assert allows(policy, BAR, IMDS, 53)
    assert allows(policy, BAR, "169.254.169.253")


def test_an_address_without_an_entry_is_locked_whole() -> None:
    """An address that is in no table of ours is locked on all ports, TCP and UDP."""
    policy = lockdown(None, "10.1.2.3", [FOO])
    for port, protocol in ((53, Protocol.TCP), (53, Protocol.UDP), (8080, Protocol.TCP)):
        assert [allows(policy, uid, "10.1.2.3", port, protocol) for uid in (FOO, BAR)] == [True, False]


def test_without_users_nobody_gets_through() -> None:
    """No users named means nobody, not everybody."""
    assert not allows(lockdown(None, IMDS), ROOT, IMDS)


def test_more_users_are_added_and_none_taken_away() -> None:
    """Again with other users both get through; again without users nothing changes."""
    policy = lockdown(lockdown(None, IMDS, [FOO]), IMDS, [BAR])
    assert [allows(policy, uid, IMDS) for uid in (FOO, BAR, ROOT)] == [True, True, False]
    assert lockdown(policy, IMDS) == policy


def test_another_address_makes_another_lock() -> None:
    """Different addresses have different users, and the first lock is what it was."""
    first = lockdown(None, IMDS, [FOO])
    both = lockdown(first, ECS, [BAR])
    assert first.locks[0] in both.locks
    assert [allows(both, uid, ip) for uid in (FOO, BAR) for ip in (IMDS, ECS)] == [True, False, False, True]


@pytest.mark.parametrize("ip", [IMDS, ECS, "10.1.2.3", "10.0.0.0/8", "fd00:ec2::254", "[fd00:ec2::254]:80,tcp"])
def test_the_same_again_changes_nothing(ip: str) -> None:
    """Twice is once, on an empty policy and on one with locks."""
    for start in (None, lockdown(None, IMDS, [FOO]), _mixed()):
        once = lockdown(start, ip, [FOO, ROOT])
        assert lockdown(once, ip, [FOO, ROOT]) == once


def _mixed() -> Policy:
    """One lock over two addresses for a group, another with a deny list alone."""
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


def test_a_lock_over_several_addresses_is_split() -> None:
    """The user is added for that address alone, and the group goes on reaching both."""
    policy = lockdown(_mixed(), ECS, [FOO])._replace(mode=Mode.ENFORCE)
    assert [allows(policy, FOO, ip) for ip in (IMDS, ECS)] == [False, True]
    assert [allows(policy, BAR, ip, gid=77) for ip in (IMDS, ECS)] == [True, True]


def test_mode_and_containers_stay() -> None:
    """An audit policy stays one."""
    policy = lockdown(_mixed(), IMDS, [FOO])
    assert (policy.mode, policy.containers) == (Mode.AUDIT, Verdict.ALLOW)


def test_a_lock_that_allows_by_default_denies_there_afterwards() -> None:
    """Locked down is locked down: who is on no list is denied on the ports that were open to all, and on the rest."""
    policy = lockdown(_mixed(), "10.1.2.3", [FOO])._replace(mode=Mode.ENFORCE)
    assert [allows(policy, uid, "10.1.2.3", port) for uid in (FOO, ROOT) for port in (80, 90)] == [True] * 2 + [
        False
    ] * 2


def test_a_denied_user_is_refused() -> None:
    """A deny list wins, so adding one of its users would be a lie."""
    with pytest.raises(BadPolicy, match="user 1002 is on the deny list of lock 'open'"):
        lockdown(_mixed(), "10.1.2.3", [FOO, BAR])


def test_ports_of_one_lock_and_the_rest_of_another() -> None:
    """Users are added on the ports that are locked already, and the other ports of the word get a lock of their own."""
    policy = lockdown(lockdown(None, f"{IMDS}:80,tcp", [FOO]), IMDS, [BAR])
    assert [allows(policy, uid, IMDS, port) for uid in (FOO, BAR) for port in (80, 8080)] == [True, False, True, True]


def test_a_prefix_that_covers_the_address_is_not_touched() -> None:
    """The address gets a lock of its own beside the prefix, whose users do not reach it."""
    prefix = lockdown(None, "169.254.0.0/16", [FOO])
    policy = lockdown(prefix, IMDS, [BAR])
    assert prefix.locks[0] in policy.locks
    assert [allows(policy, uid, IMDS) for uid in (FOO, BAR)] == [False, True]
    assert allows(policy, FOO, "169.254.1.1")


def test_wireserver_lets_root() -> None:
    """Azure's agent is root and can't do without the WireServer."""
    policy = lockdown(None, "168.63.129.16", [FOO])
    assert [allows(policy, uid, "168.63.129.16") for uid in (FOO, BAR, ROOT)] == [True, False, True]


def test_a_bad_address_is_told() -> None:
    """What is no endpoint changes nothing."""
    with pytest.raises(BadPolicy, match=r"metadata\.example"):
        lockdown(None, "metadata.example", [FOO])
