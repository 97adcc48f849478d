# SPDX-License-Identifier: Apache-2.0
"""Faults of rules that are in force, a sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from imds_guard.backends.iptables.form import FILTER, NAT, Form
from imds_guard.backends.iptables.members import resolve
from imds_guard.backends.iptables.our_rules import OurRules
from imds_guard.backends.iptables.render import HEAD, Chains, ResolvedPolicy, digest, render
from imds_guard.backends.iptables.tables import Anchor, is_first, is_reached
from imds_guard.kernel.netns import accepted_routes
from imds_guard.policy.model import Mode, Policy

GONE = (
    "iptables rules were put in force here and are gone: another program flushed them, or iptables was removed; "
    "start again"
)


def of_position(families: Sequence[OurRules], form: Form) -> list[str]:
    """Faults when packets meet our rules not at all, not first, or more than once.

    Where nft rejects what mangle has marked, filter is a second line: others may stand before ours there, unless the
    policy has filters.
    """
    filtered = any(rules.policy is not None and rules.policy.filtered for rules in families)
    lines = [line for rules in families for line in _of_position(rules, form, filtered)]
    tables = [(rules.program.version, rules.anchor.table) for rules in families]
    return lines + [
        f"IPv{version}: rules of ours are in nf_tables and in legacy tables; start again to leave those of the default"
        for version in (4, 6)
        if any(tables.count((version, table)) > 1 for _, table in tables)
    ]


def _of_position(rules: OurRules, form: Form, filtered: bool) -> list[str]:
    title, where, anchor = rules.program.title, _where(rules.anchor), rules.anchor
    if not is_reached(rules.table, anchor):
        return [f"{title}: nothing in {where} leads to {HEAD} any more, so its rules do nothing; start again"]
    if is_first(rules.table, anchor):
        return []
    output = rules.table[anchor.builtin]
    position = output.index(anchor.jump)
    if position == 0:
        return [f"{title}: {where} leads to {HEAD} more than once; start again"]
    if anchor is FILTER and form is Form.NFT and not filtered:
        return []
    if anchor is NAT:
        return [
            f"{title}: {position} of other people's rules in {where} stand before ours, first {output[0]!r}: callers "
            "of filters whose address they change are denied; start again to put ours first"
        ]
    first = f"{position} of other people's rules in {where} stand before ours, first {output[0]!r}"
    if anchor is FILTER and form is Form.NFT:
        return [
            f"{title}: {first}: a caller of a filter that they accept may reach more; start again to put ours first"
        ]
    return [f"{title}: {first}: what they accept is not denied; start again to put ours first"]


def _where(anchor: Anchor) -> str:
    return anchor.builtin if anchor is FILTER else f"{anchor.table} {anchor.builtin}"


def of_rules(families: Sequence[OurRules], current: ResolvedPolicy, form: Form) -> list[str]:
    """Faults when the rules are not those that render() makes of their policy."""
    foreign = [(rules.program.title, line) for rules in families for line in rules.foreign]
    if foreign:
        return [f"{title}: someone put {line!r} in our chain; start again" for title, line in foreign]
    digests = {policy.digest for policy in (rules.policy for rules in families) if policy is not None}
    if len(digests) > 1:
        return ["our tables hold different policies: a command was ended before it had changed all; start again"]
    if digests != {digest(current.policy)}:
        return [_other_policy(families)]
    return _of_missing(families, current, form) or [
        f"{rules.program.title}: someone changed the rules in our chains of table {rules.anchor.table}; start again"
        for rules in families
        if rules.is_reached and rules.chains != _expected(rules, current, form)
    ]


def _expected(rules: OurRules, current: ResolvedPolicy, form: Form) -> Chains:
    part = form.parts.get(rules.anchor)
    return {} if part is None else render(current, rules.program.version, part)


def _of_missing(families: Sequence[OurRules], current: ResolvedPolicy, form: Form) -> list[str]:
    there = {(rules.program.version, rules.anchor) for rules in families}
    return [
        f"IPv{version}: our rules in table {anchor.table} are gone: someone flushed it; start again"
        for version in (4, 6)
        for anchor, part in form.parts.items()
        if (version, anchor) not in there and render(current, version, part)
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


def of_routes(policy: Policy) -> list[str]:
    """Faults when a packet that names a route goes on to a locked address after our rules have seen its first hop."""
    if policy.mode is Mode.AUDIT:
        return []
    return [
        f"{name} is 1, so a route in the packet leads past our rules by way of another address of this machine; set it "
        "to 0"
        for name in accepted_routes()
    ]
