# SPDX-License-Identifier: Apache-2.0
"""Random policies as rules, and random packets through them: what ``decide()`` says of each, and what the rules do.

Rules see less than the hooks, and each difference is written down here once: see ``as_opener()``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from random import Random
from typing import Callable, NamedTuple

from imds_guard.backends import forwarded
from imds_guard.backends.iptables.render import HEAD, Chains, Members, ResolvedPolicy, render
from imds_guard.backends.iptables.tables import Anchor, restore_text, rule_texts
from imds_guard.policy.decide import UNBOUND, Caller, Decision, Destination, decide, find_lock, resolve_unspecified
from imds_guard.policy.model import Address, Identities, Lock, Mode, Policy, Protocol
from tests import generate
from tests.rules.edits import Edit, unchanged
from tests.rules.iptables import Filter
from tests.rules.nft import Ruleset
from tests.rules.packets import SYN, TCP_FLAGS, Outcome, Owner, Packet

OUTPUT = Anchor("OUTPUT", HEAD)
FORWARD = forwarded.ANCHOR

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

    Groups that no lock lists are left out, since rules compare any number of groups ("groups" there).
    """
    listed = frozenset(gid for lock in policy.locks for gid in lock.listed_groups)
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
    """Table filter of both IP versions, with somebody else's rule in OUTPUT and in FORWARD."""
    filters = {version: Filter(version) for version in (4, 6)}
    for one in filters.values():
        one.restore(f"*filter\n-A OUTPUT {OTHERS}\n-A FORWARD {OTHERS}\nCOMMIT\n")
    return filters


def apply(filters: Mapping[int, Filter], resolved: ResolvedPolicy, edit: Edit = unchanged) -> None:
    """Puts a policy in force as the backend does: by the text for iptables-restore that makes the change."""
    _replace(filters, OUTPUT, lambda version: render(resolved, version), edit)


def apply_forwarded(filters: Mapping[int, Filter], policy: Policy, edit: Edit = unchanged) -> None:
    """Puts the rules for forwarded packets in force."""
    _replace(filters, FORWARD, lambda version: forwarded.render(policy, version), edit)


def _replace(filters: Mapping[int, Filter], anchor: Anchor, chains: Callable[[int], Chains], edit: Edit) -> None:
    for version, one in filters.items():
        text = restore_text(one.texts(), anchor, rule_texts(chains(version)))
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


def by_forward(filters: Mapping[int, Filter], policy: Policy, attempts: Iterable[Attempt]) -> list[str]:
    """The packets that the rules in FORWARD judge otherwise than they should: none may pass to a locked endpoint."""
    wrong = []
    for one in attempts:
        locked = not one.other_protocol and find_lock(policy, one.destination._replace(address=one.address)) is not None
        packet = replace(one.packet(), owner=None)
        outcome = filters[one.address.version].judge("FORWARD", packet)
        wrong += _complaint(one, policy, outcome, expected(policy, one, locked))
    return wrong


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
