# SPDX-License-Identifier: Apache-2.0
"""Faults of rules that are in force, a sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from imds_guard.backends.iptables.members import resolve
from imds_guard.backends.iptables.our_rules import ANCHOR, OurRules
from imds_guard.backends.iptables.render import HEAD, ResolvedPolicy, digest, render
from imds_guard.backends.iptables.tables import is_first, is_reached

GONE = (
    "iptables rules were put in force here and are gone: another program flushed them, or iptables was removed; "
    "start again"
)


def of_position(families: Sequence[OurRules]) -> list[str]:
    """Faults when packets meet our rules not at all, not first, or more than once."""
    lines = [line for rules in families for line in _of_position(rules)]
    versions = [rules.program.version for rules in families]
    return lines + [
        f"IPv{version}: rules of ours are in nf_tables and in legacy tables; start again to leave those of the default"
        for version in (4, 6)
        if versions.count(version) > 1
    ]


def _of_position(rules: OurRules) -> list[str]:
    title = rules.program.title
    if not is_reached(rules.table, ANCHOR):
        return [f"{title}: nothing in OUTPUT leads to {HEAD} any more, so its rules do nothing; start again"]
    if is_first(rules.table, ANCHOR):
        return []
    output = rules.table[ANCHOR.builtin]
    position = output.index(ANCHOR.jump)
    if position == 0:
        return [f"{title}: OUTPUT leads to {HEAD} more than once; start again"]
    return [f"{title}: {position} of other people's rules stand before ours, first {output[0]!r}; start again"]


def of_rules(families: Sequence[OurRules], current: ResolvedPolicy) -> list[str]:
    """Faults when the rules are not those that render() makes of their policy."""
    foreign = [(rules.program.title, line) for rules in families for line in rules.foreign]
    if foreign:
        return [f"{title}: someone put {line!r} in our chain; start again" for title, line in foreign]
    digests = {policy.digest for policy in (rules.policy for rules in families) if policy is not None}
    if len(digests) > 1:
        return ["IPv4 and IPv6 hold different policies: a command was ended between the two; start again"]
    if digests != {digest(current.policy)}:
        return [_other_policy(families)]
    return [
        f"{rules.program.title}: someone changed the rules in our chains; start again"
        for rules in families
        if rules.policy is not None and rules.chains != render(current, rules.program.version)
    ]


def _other_policy(families: Sequence[OurRules]) -> str:
    """The rules of each IP version have the digest of the whole policy, so one shows that the other is gone."""
    versions = {rules.program.version for rules in families if rules.policy is not None}
    missing = sorted({4, 6} - versions)
    if missing:
        return f"the rules for IPv{missing[0]} are gone, or someone changed the others; start again"
    return "the rules in our chains are not those that were written: someone changed them; start again"


def of_members(current: ResolvedPolicy) -> list[str]:
    """Faults when resolved groups have other members now than the rules name."""
    if current.members is None:
        return []
    now = resolve(current.policy)
    changed = sorted(
        {name for name, which in now if now[name, which] != current.members.get((name, which), frozenset())}
    )
    return [
        f"lock {name!r}: its groups have other members now than when the rules were made; start again"
        for name in changed
    ]
