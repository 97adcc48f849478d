# SPDX-License-Identifier: Apache-2.0
"""Filters in a policy: what they serve, their limits, and the digest of what a listener serves."""

from __future__ import annotations

import ipaddress

import pytest

from imds_guard.errors import BadPolicy
from imds_guard.policy import edit
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.filter_text import digest, parse_rules, rules_text
from imds_guard.policy.filters import MAX_FILTERS, Filter, FilterRules, Target, targets
from imds_guard.policy.lockdown import lockdown
from imds_guard.policy.model import Identities, Lock, Policy, make_policy

WHO = Identities(frozenset((1001,)), frozenset((2001,)))
RULES = FilterRules(("GET /**",), ("/*/meta-data/iam/**",), "ec2-metadata-filter", ("curl/",), True, True)


def lock(*endpoints: str, name: str = "default", deny: Identities | None = None) -> Lock:
    return Lock(name, tuple(map(parse_endpoint, endpoints)), Identities(frozenset((0,))), deny or Identities())


def policy_of(*filters: Filter, locks: tuple[Lock, ...] = (), uid: int | None = 990) -> Policy:
    return make_policy(locks or (lock("10.0.0.1:80,tcp"),), filters=filters, filter_uid=uid)


def one(name: str = "region", *locks: str, who: Identities = WHO, rules: FilterRules = RULES, port: int = 80) -> Filter:
    return Filter(name, locks or ("default",), who, rules=rules, port=port)


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


def test_targets_are_single_addresses_with_the_port_sorted() -> None:
    """A prefix, another port, UDP, and a link-local address are none."""
    locks = (
        lock(
            "10.0.0.9", "10.0.0.1:1-80,tcp", "[fd00:ec2::254]:80", "10.2.0.0/16", "10.0.0.3:81,tcp", "10.0.0.4:80,udp"
        ),
        lock("[fe80::a9fe:a9fe]:80", "10.0.0.2:80,tcp", name="other"),
        lock("10.0.0.5:80,tcp", name="unfiltered"),
    )
    policy = policy_of(one("a"), one("b", "other"), one("c", "default", port=81), locks=locks)
    assert targets(policy) == (
        Target(address("10.0.0.1"), 80),
        Target(address("10.0.0.2"), 80),
        Target(address("10.0.0.3"), 81),
        Target(address("10.0.0.9"), 80),
        Target(address("10.0.0.9"), 81),
        Target(address("fd00:ec2::254"), 80),
    )


def test_filters_keep_their_order_and_their_rules_have_none() -> None:
    first, second = one("z", rules=FilterRules(("GET /b", "GET /a", "GET /a"))), one("a")
    policy = policy_of(first, second)
    assert [other.name for other in policy.filters] == ["z", "a"]
    assert policy.filters[0].rules.allow == ("GET /a", "GET /b")


def test_without_filters_no_user_runs_them() -> None:
    assert make_policy([lock("10.0.0.1")], filter_uid=990) == make_policy([lock("10.0.0.1")])


@pytest.mark.parametrize(
    ("filters", "locks", "expected"),
    [
        ((one("a"), one("a")), (), "two filters have the name 'a'"),
        ((one(""),), (), "'' is not a filter name"),
        ((one("a", "none"),), (), "filter 'a': there is no lock 'none'"),
        ((one("a", port=81),), (), "filter 'a': its locks have no address of one host with TCP port 81"),
        ((one("a", port=0),), (), "filter 'a': 0 is not a port"),
        ((one("a", who=Identities(frozenset((990,)))),), (), "filter 'a' names user 990, which runs the filters"),
        ((one("a")._replace(everyone=True),), (), "filter 'a' is for everyone, which contradicts"),
        ((one("a", who=Identities(frozenset((2**32,)))),), (), "filter 'a': 4294967296 is not a user or group ID"),
        (
            (one("a", rules=FilterRules(tuple(f"GET /{n:060}" for n in range(1000)))),),
            (),
            "filter 'a': its rules have 66000 bytes, and the maximum is 65536",
        ),
        (
            (one("a"),),
            (lock("10.0.0.1", deny=Identities(frozenset((990,)))),),
            "lock 'default' denies user 990, which runs the filters",
        ),
        *(
            (
                (one("a"),),
                (lock("10.0.0.1"), lock(endpoint, name="own")),
                f"lock 'own': {shown} port 169 is where filters listen",
            )
            for endpoint, shown in (
                ("127.169.1.1", "127.169.1.1/32"),
                ("127.169.0.0/17:160-170,tcp", "127.169.0.0/17"),
                ("127.169.0.0/16", "127.169.0.0/16"),
            )
        ),
        (tuple(one(f"f{n}") for n in range(MAX_FILTERS + 1)), (), "filter 'f24' is one too many: there can be 24"),
        (
            (one("a"),),
            (lock(*(f"10.0.0.{n}:80,tcp" for n in range(255))),),
            "filter 'a': the filters have more than 254",
        ),
    ],
)
def test_a_filter_that_can_not_be_is_refused(
    filters: tuple[Filter, ...], locks: tuple[Lock, ...], expected: str
) -> None:
    with pytest.raises(BadPolicy, match=expected.replace("(", r"\(")):
        policy_of(*filters, locks=locks)


@pytest.mark.parametrize("endpoint", ["127.0.0.0/8", "127.169.1.1:80,tcp", "127.169.1.1:169,udp"])
def test_what_is_not_a_filters_place_may_be_locked(endpoint: str) -> None:
    assert len(policy_of(one("a"), locks=(lock("10.0.0.1"), lock(endpoint, name="own"))).locks) == 2


def test_a_user_on_a_deny_list_is_refused_only_where_there_are_filters() -> None:
    assert make_policy([lock("10.0.0.1", deny=Identities(frozenset((990,))))], filter_uid=990).filters == ()


def test_allow_and_revoke_leave_what_a_filter_serves() -> None:
    """allow at one address splits the lock: the filter serves both parts."""
    before = policy_of(one(), locks=(lock("10.0.0.1:80,tcp", "10.0.0.2:80,tcp"),))
    more = Identities(frozenset((5,)))
    everywhere = edit.allow(before, more)
    assert (everywhere.filters, everywhere.filter_uid) == (before.filters, 990)
    split = edit.allow(before, more, parse_endpoint("10.0.0.2:80,tcp"))
    assert len(split.locks) == 2
    assert split.filters[0].locks == ("10.0.0.2", "default")
    assert targets(split) == targets(before)
    assert targets(edit.revoke(split, more, parse_endpoint("10.0.0.2:80,tcp"))) == targets(before)


def test_lockdown_leaves_what_a_filter_serves() -> None:
    before = policy_of(one(), locks=(lock("10.0.0.1:80,tcp", "10.0.0.2:80,tcp"),))
    after = lockdown(before, "10.0.0.2:80,tcp", [7])
    assert targets(after) == targets(before)
    assert after.filter_uid == 990


def test_rules_are_read_as_they_were_written() -> None:
    assert parse_rules(rules_text(RULES)) == RULES
    assert parse_rules("") == FilterRules()


@pytest.mark.parametrize("text", ["allow", "nonsense GET /", "audit yes", "GET /"])
def test_a_text_that_is_no_rules_is_refused(text: str) -> None:
    with pytest.raises(BadPolicy, match="is not a rule of a filter"):
        parse_rules(text)


def test_the_digest_is_of_everything_that_a_listener_serves() -> None:
    """Equal for equal rules; different for each other target, rule and mode; 64 bits, never 0."""
    target = Target(address("10.0.0.1"), 80)
    same = digest(target, RULES)
    assert same == digest(target, FilterRules(*RULES))
    others = [
        digest(Target(address("10.0.0.2"), 80), RULES),
        digest(Target(address("10.0.0.1"), 81), RULES),
        digest(target, RULES._replace(allow=("GET /",))),
        digest(target, RULES._replace(deny=())),
        digest(target, RULES._replace(headers=None)),
        digest(target, RULES._replace(user_agents=())),
        digest(target, RULES._replace(require_imdsv2=False)),
        digest(target, RULES._replace(audit=False)),
        digest(target, RULES._replace(sets=("no-credentials",))),
    ]
    assert len({same, *others}) == 1 + len(others)
    assert all(0 < number < 2**64 for number in (same, *others))
