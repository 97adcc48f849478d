# SPDX-License-Identifier: Apache-2.0
"""Random policies as rules, and random packets through them: what ``decide()`` says of each, and what the rules do.

Rules see less than the hooks, and each difference is written down here once: see ``as_opener()``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from random import Random
from typing import Callable, NamedTuple

from imds_guard.backends.forwarded import by_iptables as mangle
from imds_guard.backends.forwarded import by_nft as own
from imds_guard.backends.iptables.render import HEAD, Members, ResolvedPolicy, render
from imds_guard.backends.iptables.tables import Anchor, Table, restore_text, rule_texts
from imds_guard.kernel.nft import replacement
from imds_guard.policy.decide import UNBOUND, Caller, Decision, Destination, decide, resolve_unspecified
from imds_guard.policy.decide_forwarded import Direction, ForwardedPacket, ForwardReason, decide_forwarded
from imds_guard.policy.model import Address, Identities, Lock, Mode, Policy, Protocol
from imds_guard.policy.packet import Fragment
from tests import generate
from tests.rules.edits import Edit, unchanged
from tests.rules.forwarded import FLAG_BITS
from tests.rules.iptables import Filter
from tests.rules.nft import Ruleset
from tests.rules.packets import SYN, TCP_FLAGS, Outcome, Owner, Packet

OUTPUT = Anchor("OUTPUT", HEAD)
FORWARD = mangle.ANCHOR

DENIAL_PREFIX = "imds-guard would deny: "
OTHERS_PREFIX = "others: "
OTHERS = f'-j LOG --log-prefix "{OTHERS_PREFIX}"'
"""Somebody else's rule behind ours. Every packet that we let through must still meet it."""


class Attempt(NamedTuple):
    """A packet that a caller sends. ``other_protocol`` is neither TCP nor UDP, or empty."""

    caller: Caller
    destination: Destination
    flags: frozenset[str] = SYN
    other_protocol: str = ""

    @property
    def address(self) -> Address:
        """The address in the packet: never 0.0.0.0 or ::, and never a mapped one."""
        found = resolve_unspecified(self.destination.address, UNBOUND)
        assert found is not None
        return found

    @property
    def begins(self) -> bool:
        """True for a datagram, and for the first packet of a TCP connection."""
        if self.other_protocol:
            return False
        return self.destination.protocol is Protocol.UDP or self.flags & {"FIN", "SYN", "RST", "ACK"} == SYN

    def packet(self) -> Packet:
        """The packet as rules see it."""
        caller = self.caller
        owner = None if caller.kernel_thread else Owner(caller.fsuid, caller.fsgid, caller.groups)
        protocol = self.other_protocol or self.destination.protocol.value
        return Packet(self.address, protocol, self.destination.port, self.flags, owner)


def attempt(random: Random, policy: Policy) -> Attempt:
    """Mostly the beginning of a connect. The rest are later packets, odd flags and other protocols."""
    flags, other = SYN, ""
    if random.random() < 0.15:
        flags = frozenset(random.sample(TCP_FLAGS, random.randint(0, 3))) | (SYN if random.random() < 0.5 else set())
    if random.random() < 0.02:
        other = random.choice(("icmp", "sctp", "udplite"))
    return Attempt(generate.caller(random, policy), generate.destination(random, policy), flags, other)


# --- what is expected -----------------------------------------------------------------------------------------------


def as_opener(policy: Policy, caller: Caller) -> Caller:
    """The caller as owner rules know it: no namespaces ("containers", "user-namespace" in differences.py).

    Groups that nothing lists are left out, since rules compare any number of groups ("groups" there).
    """
    listed = frozenset(gid for lock in policy.locks for gid in lock.listed_groups)
    listed = listed.union(*(one.who.groups for one in policy.filters))
    return caller._replace(groups=caller.groups & listed, pid_namespace_is_initial=True, user_namespace_is_initial=True)


def decision(policy: Policy, one: Attempt) -> Decision:
    """The decision for the caller as owner rules know it."""
    return decide(policy, as_opener(policy, one.caller), one.destination)


def expected(policy: Policy, one: Attempt, denied: bool, others: tuple[str, ...] = (OTHERS_PREFIX,)) -> Outcome:
    """What rules must do with a packet. ``others``: what a packet that they let through writes to the log."""
    if not denied:
        return Outcome("ACCEPT", "", others)
    if policy.mode is Mode.AUDIT:
        return Outcome("ACCEPT", "", (DENIAL_PREFIX, *others))
    return Outcome("REJECT", rejection(one))


def rejection(one: Attempt) -> str:
    """How a packet is rejected: with what ends a connect at once."""
    if one.destination.protocol is Protocol.TCP:
        return "tcp-reset"
    return "icmp-port-unreachable" if one.address.version == 4 else "icmp6-port-unreachable"


def same(outcome: Outcome, wanted: Outcome) -> bool:
    """True for the same verdict. In audit mode a denial may be logged more than once."""
    return outcome[:2] == wanted[:2] and set(outcome.logged) == set(wanted.logged)


# --- iptables -------------------------------------------------------------------------------------------------------


def new_filters() -> dict[int, Filter]:
    """Table filter of both IP versions, with somebody else's rule in OUTPUT."""
    filters = {version: Filter(version) for version in (4, 6)}
    for one in filters.values():
        one.restore(f"*filter\n-A OUTPUT {OTHERS}\nCOMMIT\n")
    return filters


def new_mangles() -> dict[int, Filter]:
    """Table mangle of both IP versions, with somebody else's rule in FORWARD."""
    tables = {version: Filter(version, "mangle") for version in (4, 6)}
    for one in tables.values():
        one.restore(f"*mangle\n-A FORWARD {OTHERS}\nCOMMIT\n")
    return tables


def apply(filters: Mapping[int, Filter], resolved: ResolvedPolicy, edit: Edit = unchanged) -> None:
    """Puts a policy in force as the backend does: by the text for iptables-restore that makes the change."""
    _replace(filters, OUTPUT, lambda version: rule_texts(render(resolved, version)), edit)


def apply_forwarded(tables: Mapping[int, Filter], policy: Policy, tracked: bool, edit: Edit = unchanged) -> None:
    """Puts the rules for forwarded packets in force, by iptables."""
    _replace(tables, FORWARD, lambda version: mangle.render(policy, version, tracked), edit)


def nft_forwarded(policy: Policy, tracked: bool, edit: Edit = unchanged) -> dict[int, Ruleset]:
    """The rules for forwarded packets of each IP version that has some, by nft."""
    found = {}
    for version, table in own.TABLES.items():
        chains = own.render(policy, version, tracked)
        if chains:
            found[version] = Ruleset(edit(replacement(table, chains)))
    return found


def _replace(tables: Mapping[int, Filter], anchor: Anchor, chains: Callable[[int], Table], edit: Edit) -> None:
    for version, one in tables.items():
        text = restore_text(one.texts(), anchor, chains(version))
        if text:
            one.restore(edit(text))


def members(random: Random, policy: Policy) -> Members | None:
    """Members of the groups, as --resolve-groups would find them; mostly None, as without that option."""
    if random.random() < 0.75:
        return None
    listed = sorted({uid for lock in policy.locks for uid in lock.allow.users | lock.deny.users} | {7, 8, 10, 1001})
    return {
        (lock.name, which): frozenset(random.sample(listed, min(len(listed), random.randint(0, 12)))) - identities.users
        for lock in policy.locks
        for which, identities in (("allow", lock.allow), ("deny", lock.deny))
        if identities.groups
    }


def with_members(resolved: ResolvedPolicy) -> Policy:
    """The policy that rules with resolved groups enforce: the members are users."""
    if resolved.members is None:
        return resolved.policy

    def widened(lock: Lock, which: str, identities: Identities) -> Identities:
        return identities._replace(
            users=identities.users | (resolved.members or {}).get((lock.name, which), frozenset())
        )

    locks = (
        lock._replace(allow=widened(lock, "allow", lock.allow), deny=widened(lock, "deny", lock.deny))
        for lock in resolved.policy.locks
    )
    return resolved.policy._replace(locks=tuple(locks))


def by_iptables(filters: Mapping[int, Filter], resolved: ResolvedPolicy, attempts: Iterable[Attempt]) -> list[str]:
    """The attempts that the rules judge otherwise than ``decide()``. Without --suppl-groups only the primary counts."""
    policy = with_members(resolved)
    wrong = []
    for one in attempts:
        seen = one if resolved.members is None else one._replace(caller=one.caller._replace(groups=frozenset()))
        wanted = expected(policy, one, one.begins and not decision(policy, seen).reason.permits)
        outcome = filters[one.address.version].judge("OUTPUT", one.packet())
        wrong += _complaint(one, resolved, outcome, wanted)
    return wrong


# --- forwarded packets ----------------------------------------------------------------------------------------------


def as_rules_see(one: ForwardedPacket, tracked: bool) -> Packet:
    """A forwarded packet for the interpreters. Without conntrack nobody knows its direction."""
    flags = frozenset(name for name, bit in FLAG_BITS.items() if one.tcp_flags & bit)
    protocol = (
        "" if one.protocol is None and one.is_cut_short else "sctp" if one.protocol is None else one.protocol.value
    )
    direction = {Direction.ORIGINAL: "original", Direction.REPLY: "reply"}.get(one.direction, "")
    return Packet(
        one.destination,
        protocol,
        one.port,
        flags,
        fragment="" if one.fragment is Fragment.WHOLE else one.fragment.value,
        is_cut_short=one.is_cut_short,
        direction=direction if tracked else "",
    )


def specified(policy: Policy, one: ForwardedPacket, tracked: bool) -> bool:
    """Whether ``decide_forwarded()`` lets a packet pass."""
    known = one if tracked else replace(one, direction=Direction.UNKNOWN)
    return decide_forwarded(policy, known).passes


def by_mangle(
    tables: Mapping[int, Filter], policy: Policy, packets: Iterable[ForwardedPacket], tracked: bool
) -> list[str]:
    """The packets that rules in mangle FORWARD judge otherwise. What they let through meets others' rules, too.

    Of the fragments of IPv4 the first one passes, and nobody can put it together without the others.
    """
    wrong = []
    for one in packets:
        found = tables[one.destination.version].judge("FORWARD", as_rules_see(one, tracked))
        passes = specified(policy, one, tracked)
        if one.destination.version == 4 and one.fragment is Fragment.FIRST and found.verdict == "ACCEPT":
            passes = True
        wanted = Outcome("ACCEPT", "", (OTHERS_PREFIX,)) if passes else Outcome("DROP")
        wrong += [] if same(found, wanted) else [f"{found} in place of {wanted}: {one} under {policy}"]
    return wrong


def by_own_tables(
    rules: Mapping[int, Ruleset], policy: Policy, packets: Iterable[ForwardedPacket], tracked: bool
) -> list[str]:
    """The packets that rules of nft judge otherwise."""
    wrong = []
    for one in packets:
        version = one.destination.version
        seen = as_rules_see(one, tracked)
        found = rules[version].judge("forward", seen) if version in rules else Outcome("ACCEPT")
        decision = decide_forwarded(policy, one if tracked else replace(one, direction=Direction.UNKNOWN))
        wanted = Outcome("ACCEPT")
        if not decision.passes:
            dropped = decision.reason is ForwardReason.FRAGMENT
            wanted = Outcome("DROP") if dropped else Outcome("REJECT", _rejection_of(one))
        wrong += [] if same(found, wanted) else [f"{found} in place of {wanted}: {one} under {policy}"]
    return wrong


def _rejection_of(one: ForwardedPacket) -> str:
    if one.protocol is Protocol.TCP:
        return "tcp-reset"
    return "icmp-port-unreachable" if one.destination.version == 4 else "icmp6-port-unreachable"


# --- nft ------------------------------------------------------------------------------------------------------------


def by_nft(rules: Ruleset, policy: Policy, attempts: Iterable[Attempt]) -> list[str]:
    """The attempts that exported nft rules judge otherwise than ``decide()`` without supplementary groups."""
    wrong = []
    for one in attempts:
        seen = one._replace(caller=one.caller._replace(groups=frozenset()))
        wanted = expected(policy, one, one.begins and not decision(policy, seen).reason.permits, others=())
        wrong += _complaint(one, policy, rules.judge("output", one.packet()), wanted)
    return wrong


def _complaint(one: Attempt, under: Policy | ResolvedPolicy, outcome: Outcome, wanted: Outcome) -> list[str]:
    return [] if same(outcome, wanted) else [f"{outcome} in place of {wanted}: {one} under {under}"]
