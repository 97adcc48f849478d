# SPDX-License-Identifier: Apache-2.0
"""Nothing passes under a new policy that did not under the old one, unless the difference says that it opens.

Judged by decide() and by the rules of the filter to which it leads. Policies come from small pools and differ by a few
edits, so that most of what differs is the order of filters, one name, or one rule.

IMDS_GUARD_DIFFERENCES is the number of pairs of policies, IMDS_GUARD_SEED the first seed.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple, TypeVar

import pytest

from imds_guard.policy.decide import MAX_WALKED_GROUPS, Caller, Decision, Destination, Reason, Source, decide
from imds_guard.policy.difference import Difference, difference
from imds_guard.policy.difference_rules import pass_more
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.filters import Filter, FilterRules
from imds_guard.policy.header_rules import EC2_METADATA_FILTER, IMDSV2_TOKEN
from imds_guard.policy.model import Identities, Lock, Mode, Policy, Protocol, Verdict, make_policy
from imds_guard.policy.request_target import parse_target
from imds_guard.policy.requests import Judge, Request
from imds_guard.policy.rule_sets import NO_CREDENTIALS

FIRST_SEED = int(os.environ.get("IMDS_GUARD_SEED", "1"))
PAIRS = int(os.environ.get("IMDS_GUARD_DIFFERENCES", "2500"))
PROBES = 25
"""Of one pair of policies."""

# --- pools ------------------------------------------------------------------------------------------------------------

ACCOUNTS = (98, 99)
"""Of the filters."""
MANY = frozenset(range(1000, 1129))
"""One more than a backend searches for callers with many groups."""
ONE, TWO, PREFIX = map(parse_endpoint, ("10.0.0.1", "10.0.0.2:80+443,tcp", "10.0.0.0/30"))
AGENTS = ("x/", "x", "aws-cli/")
PATTERNS = ("/a", "GET /a/**", "GET /a/b", "/**", "PUT /a", "/*/b", "GET /A")
METHODS = ("GET", "GET", "HEAD", "PUT", "POST")
TARGETS = ("/", "/a", "/A", "/a/", "/a/b", "/c/b", "/a/b/c", "/a?recursive=1", "/latest", "/x/api/token")
HEADERS = (("user-agent", "x/1"), ("user-agent", "aws-cli/2"), (IMDSV2_TOKEN, "t"), ("x-forwarded-for", "1"))
ADDRESSES = ("10.0.0.0", "10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3", "0.0.0.0", "::ffff:10.0.0.1")
T = TypeVar("T")


def some(random: Random, pool: Sequence[T], up_to: int = 2) -> tuple[T, ...]:
    """None or a few."""
    return tuple(random.sample(pool, random.randint(0, up_to)))


def identities(random: Random) -> Identities:
    """Up to four: one number is a user and a group."""
    return Identities(frozenset(some(random, (1, 2, 3))), frozenset(some(random, (2, 11, 12))))


def listed(random: Random) -> Identities:
    """What a list of a lock has: sometimes nothing, sometimes too many groups."""
    found = identities(random) if random.random() < 0.5 else Identities()
    return found._replace(groups=found.groups | MANY) if random.random() < 0.1 else found


def rules(random: Random) -> FilterRules:
    return FilterRules(
        some(random, PATTERNS),
        some(random, PATTERNS),
        random.choice((None, None, EC2_METADATA_FILTER)),
        some(random, AGENTS),
        random.random() < 0.3,
        random.random() < 0.1,
        random.choice(((), (), (NO_CREDENTIALS,))),
    )


def a_filter(random: Random, name: str) -> Filter:
    everyone = random.random() < 0.3
    who = Identities() if everyone else identities(random)
    where = random.choice((("a",), ("b",), ("a", "b")))
    return Filter(name, where, who, everyone, rules(random), random.choice((80, 80, 80, 443)))


def locks(random: Random) -> tuple[Lock, ...]:
    """One lock or two: a prefix, and addresses in it."""
    endpoints = [ONE, TWO, PREFIX]
    random.shuffle(endpoints)
    parts = random.choice(
        ((endpoints[:1],), (endpoints[:2],), (endpoints[:1], endpoints[1:]), (endpoints[:1], endpoints[1:2]))
    )
    defaults = (Verdict.DENY, Verdict.DENY, Verdict.ALLOW)
    return tuple(
        Lock(name, tuple(part), listed(random), listed(random), random.choice(defaults))
        for name, part in zip("ab", parts)
    )


class Parts(NamedTuple):
    """A policy before make_policy(): edits can't be made to a normal form."""

    locks: tuple[Lock, ...]
    filters: tuple[Filter, ...]
    containers: Verdict
    mode: Mode
    account: int | None

    def policy(self) -> Policy:
        """Filters are left out where they serve nothing."""
        kept = [one for one in self.filters if any(_is_served(lock, one) for lock in self.locks)]
        known = {lock.name for lock in self.locks}
        kept = [one._replace(locks=tuple(name for name in one.locks if name in known)) for one in kept]
        return make_policy(self.locks, self.mode, self.containers, filters=kept, filter_uid=self.account)


def _is_served(lock: Lock, one: Filter) -> bool:
    single = [each for each in lock.endpoints if each.network.prefixlen == 32]
    return lock.name in one.locks and any(low <= one.port <= high for each in single for low, high in each.tcp)


def policy_parts(random: Random) -> Parts:
    names = some(random, "fgh", 3)
    mode = Mode.AUDIT if random.random() < 0.1 else Mode.ENFORCE
    account = random.choice((None, *ACCOUNTS))
    made = tuple(a_filter(random, name) for name in names)
    return Parts(locks(random), made, random.choice(tuple(Verdict)), mode, account)


EDITS = ("locks", "lock", "account", "containers", "mode", *("filters",) * 8)


def pair(random: Random) -> tuple[Policy, Policy]:
    """Two policies that differ by a few edits. An edit takes a part of the policy from another one."""
    before, other = policy_parts(random), policy_parts(random)
    after = before
    for edit in random.choices(EDITS, k=random.choice((1, 1, 1, 2, 3))):
        if edit == "filters":
            after = after._replace(filters=edited(random, after.filters))
        elif edit == "lock":
            changed = other.locks[0]._replace(endpoints=after.locks[0].endpoints)
            after = after._replace(locks=(changed, *after.locks[1:]))
        else:
            after = after._replace(**{edit: getattr(other, edit)})
    return before.policy(), after.policy()


def edited(random: Random, before: tuple[Filter, ...]) -> tuple[Filter, ...]:
    """The filters in another order, with one more or one less, or with one field of one as in another filter."""
    kind = random.choice(("order", "add", "remove", *("field",) * 4))
    if not before or kind == "add":
        number = random.randint(0, len(before))
        new = a_filter(random, f"new {len(before)}")
        return (*before[:number], new, *before[number:]) if new.name not in {one.name for one in before} else before
    if kind == "order":
        return tuple(random.sample(before, len(before)))
    number = random.randrange(len(before))
    changed = () if kind == "remove" else (with_another_field(random, before[number]),)
    return (*before[:number], *changed, *before[number + 1 :])


def with_another_field(random: Random, one: Filter) -> Filter:
    taken = a_filter(random, one.name)
    field = random.choice(("who", "rules", "rules", "locks", "port"))
    values: dict[str, Any] = {field: getattr(taken, field)}
    if field == "who":
        values = {"who": taken.who, "everyone": taken.everyone}
    elif field == "rules":
        values = {"rules": with_other_rules(random, one.rules)}
    return one._replace(**values)


def with_other_rules(random: Random, one: FilterRules) -> FilterRules:
    field = random.choice(FilterRules._fields)
    return one._replace(**{field: getattr(rules(random), field)})


def a_caller(random: Random) -> Caller:
    return Caller(
        random.choice((1, 2, 3, 4, *ACCOUNTS)),
        random.choice((2, 11, 12, 13, 13)),
        frozenset(some(random, (2, 11, 12, 13, 1000))),
        random.random() < 0.7,
        random.random() < 0.7,
        repeated_groups=MAX_WALKED_GROUPS + 1 if random.random() < 0.2 else 0,
    )


def a_destination(random: Random) -> Destination:
    protocol = Protocol.UDP if random.random() < 0.2 else Protocol.TCP
    return Destination(ipaddress.ip_address(random.choice(ADDRESSES)), random.choice((80, 80, 80, 443, 81)), protocol)


def a_source(random: Random) -> Source:
    address = random.choice((None, None, None, "10.0.0.1", "fd00::1"))
    return Source(None if address is None else ipaddress.ip_address(address), random.random() < 0.1)


def a_request(random: Random) -> Request:
    return Request(random.choice(METHODS), parse_target(random.choice(TARGETS).encode()), some(random, HEADERS))


# --- the property -----------------------------------------------------------------------------------------------------


def passes_on(one: FilterRules, request: Request) -> bool:
    return one.audit or Judge(one).judge(request).allowed


def passes(policy: Policy, decision: Decision, request: Request) -> bool:
    """Whether the endpoint gets the request. In audit mode the caller reaches it without a filter."""
    if not decision.allowed or decision.reason is not Reason.FILTERED or policy.mode is Mode.AUDIT:
        return decision.allowed
    return next(passes_on(one.rules, request) for one in policy.filters if one.name == decision.filter)


def was_asked_for(found: Difference, before: Policy, decision: Decision, caller: Caller) -> bool:
    """Whether somebody has named the caller: on an allow list, or in a filter where none named it before."""
    filters_differ = bool(found.filters_added or found.filters_changed)
    if decision.matched is not None:
        what, number = decision.matched
        if what == "user" and number in ACCOUNTS and filters_differ:
            return True  # the filters run as this user, and connect to what they serve
        added = (one for one in found.lists if one.kind == "allow" and one.added)
        return any(number in (one.who.users if what == "user" else one.who.groups) for one in added)
    return decision.reason is Reason.FILTERED and filters_differ


def names(one: Filter, caller: Caller) -> bool:
    return one.everyone or caller.fsuid in one.who.users or bool((caller.groups | {caller.fsgid}) & one.who.groups)


class Probe(NamedTuple):
    """One attempt under two policies."""

    caller: Caller
    to: Destination
    source: Source
    request: Request

    def opens(self, before: Policy, after: Policy) -> bool:
        """Whether this passes now, and did not before."""
        earlier, decision = (decide(one, *self[:3]) for one in (before, after))
        return passes(after, decision, self.request) and not passes(before, earlier, self.request)

    def fault(self, before: Policy, after: Policy, found: Difference) -> str:
        """What the difference does not say; empty where it says all."""
        earlier, decision = (decide(one, *self[:3]) for one in (before, after))
        if earlier.allowed != decision.allowed and not found:
            return "nothing is said to differ"
        if not self.opens(before, after) or found.opening:
            return ""
        if any(one.everyone for one in after.filters if one.name == decision.filter):
            return "a filter for everyone names nobody, and opens"
        named = any(names(one, self.caller) for one in before.filters if earlier.lock in one.locks)
        if named and decision.reason is Reason.FILTERED:
            return "a filter named the caller before"
        return "" if was_asked_for(found, before, decision, self.caller) else "nobody has asked for this"


def probe(random: Random) -> Probe:
    return Probe(a_caller(random), a_destination(random), a_source(random), a_request(random))


def test_what_passes_that_did_not_is_named() -> None:
    """Many pairs, and many attempts for each."""
    opened = 0
    for seed in range(FIRST_SEED, FIRST_SEED + PAIRS):
        random = Random(seed)
        before, after = pair(random)
        found = difference(before, after)
        for one in (probe(random) for _ in range(PROBES)):
            opened += one.opens(before, after)
            again = f"IMDS_GUARD_SEED={seed} IMDS_GUARD_DIFFERENCES=1 ./run test tests/unit/test_difference_filters.py"
            assert not one.fault(before, after, found), f"{one}\n{before}\n{after}\n{found}\nto repeat it: {again}"
    assert opened > PAIRS // 2 or PAIRS < 100, "hardly anything passes that did not: the pools are wrong"


def test_rules_that_pass_more_are_known() -> None:
    more = 0
    for seed in range(FIRST_SEED, FIRST_SEED + 5 * PAIRS):
        random = Random(seed)
        one = rules(random)
        other = with_other_rules(random, one) if random.random() < 0.8 else rules(random)
        request = a_request(random)
        if passes_on(other, request) and not passes_on(one, request):
            more += 1
            assert pass_more(one, other), (seed, one, other, request)
    assert more > PAIRS // 10 or PAIRS < 100


# --- by hand ----------------------------------------------------------------------------------------------------------

READ = FilterRules(("GET /a",), ("/a/b",), EC2_METADATA_FILTER)
LOCK = Lock("a", (ONE, parse_endpoint("10.0.0.4/30")))


@pytest.mark.parametrize(
    "rules",
    [
        READ,
        READ._replace(allow=()),
        READ._replace(deny=("/a/B",)),
        READ._replace(deny=("/a/**",)),
        READ._replace(deny=("/*/b", "/c")),
        READ._replace(require_imdsv2=True),
        READ._replace(user_agents=("aws-cli/2",)),
        READ._replace(sets=(NO_CREDENTIALS,)),
    ],
)
def test_rules_that_are_as_strict_do_not_open(rules: FilterRules) -> None:
    """Who is asked too often says yes to everything."""
    assert not pass_more(READ, rules)
    assert not pass_more(READ._replace(audit=True), rules)


@pytest.mark.parametrize(
    "rules",
    [
        READ._replace(allow=("GET /a/**",)),
        READ._replace(allow=("GET /*",)),
        READ._replace(allow=("/a", "PUT /a")),
        READ._replace(deny=("GET /a/b",)),
        READ._replace(headers=None),
        READ._replace(user_agents=("aws",)),
        READ._replace(audit=True),
    ],
)
def test_rules_that_are_less_strict_open(rules: FilterRules) -> None:
    assert pass_more(READ, rules)


def a_policy(*filters: Filter, default: Verdict = Verdict.DENY, more: Sequence[Lock] = (), lock: Lock = LOCK) -> Policy:
    return make_policy((lock._replace(default=default), *more), filters=filters, filter_uid=99)


def a_rule(name: str, *users: int, groups: Sequence[int] = (), allow: str = "GET /a") -> Filter:
    """For everyone where it names nobody."""
    who = Identities(frozenset(users), frozenset(groups))
    return Filter(name, ("a",), who, not who, FilterRules((allow,)))


STRICT, LOOSE, ALL = a_rule("strict", 1, 2), a_rule("loose", 2, 3, allow="GET /**"), a_rule("all")


@pytest.mark.parametrize(
    ("before", "after", "added", "removed", "changed"),
    [
        # By the order: user 2 is in both.
        (a_policy(STRICT, LOOSE), a_policy(LOOSE, STRICT), (), (), ("loose",)),
        (a_policy(LOOSE, STRICT), a_policy(STRICT, LOOSE), (), (), ()),
        (a_policy(STRICT), a_policy(LOOSE, STRICT), ("loose",), (), ()),
        (a_policy(STRICT, LOOSE), a_policy(LOOSE), (), (), ("loose",)),
        (
            a_policy(STRICT, LOOSE),
            a_policy(STRICT._replace(who=Identities(frozenset((1,)))), LOOSE),
            (),
            (),
            ("strict",),
        ),
        # For everyone.
        (a_policy(), a_policy(ALL), ("all",), (), ()),
        (a_policy(STRICT), a_policy(STRICT, ALL), ("all",), (), ()),
        (a_policy(default=Verdict.ALLOW), a_policy(ALL, default=Verdict.ALLOW), (), (), ()),
        # Somebody who is named, and was in no filter.
        (a_policy(), a_policy(STRICT), (), (), ()),
        (a_policy(STRICT), a_policy(STRICT, a_rule("loose", 3, allow="GET /**")), (), (), ()),
        (a_policy(STRICT), a_policy(STRICT._replace(who=Identities(frozenset((1, 2, 3))))), (), (), ()),
        # Without its filter a caller is anyone.
        (a_policy(STRICT), a_policy(), (), (), ()),
        (a_policy(STRICT, default=Verdict.ALLOW), a_policy(default=Verdict.ALLOW), (), ("strict",), ()),
        # Callers with many groups are denied where filters name groups.
        (a_policy(a_rule("g", 1, groups=(5,))), a_policy(a_rule("g", 1)), (), (), ("g",)),
    ],
)
def test_filters_open_by_their_order_and_by_everyone(
    before: Policy, after: Policy, added: tuple[str, ...], removed: tuple[str, ...], changed: tuple[str, ...]
) -> None:
    opening = difference(before, after).opening
    assert (opening.filters_added, opening.filters_removed, opening.filters_changed) == (added, removed, changed)
    assert bool(opening) == bool(added or removed or changed)


def test_an_endpoint_that_leaves_the_locks_of_a_filter_opens_where_everyone_is_let_in() -> None:
    """What the filter serves is the same: it serves no prefix, and its callers are denied there."""
    alone = LOCK._replace(endpoints=(ONE,))
    other = Lock("b", LOCK.endpoints[1:], default=Verdict.ALLOW)
    before, after = (
        a_policy(ALL, default=Verdict.ALLOW),
        a_policy(ALL, default=Verdict.ALLOW, more=(other,), lock=alone),
    )
    assert difference(before, after).opening.filters_changed == ("all",)
    back = difference(after, before)
    assert (back.filters_changed, bool(back.opening)) == (("all",), False)
