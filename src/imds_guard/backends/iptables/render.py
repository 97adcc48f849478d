# SPDX-License-Identifier: Apache-2.0
"""The rules of one IP version for a policy. Pure: nothing here touches the system.

Table mangle has the policy, and gives a mark to the packets that it denies. The packets that have it are rejected by a
chain of nft in front of NAT (marks.py), and by the first rule in table filter; mangle can't reject. Behind that rule
filter has the policy once more: it judges the address that NAT has put in, and holds where somebody lets packets past
mangle. Where marks don't work, filter has the policy alone.

IMDS-GUARD       separates TCP and UDP; of TCP only packets with a lone SYN go on
IMDS-GUARD-T, -U find the lock: the most specific endpoint comes first
IMDS-GUARD-L0    the first lock: deny lists, allow lists, default
IMDS-GUARD-L0-A3 a node in the tree of the users that this lock allows (-D3: denies)
IMDS-GUARD-DENY  denies

All steps are -g, but for the one into a tree of denied users. So RETURN leads to the rule after the jump in OUTPUT: an
allowed packet meets everybody else's rules as it would without ours.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from imds_guard.backends.iptables import render_filters as of_filters
from imds_guard.backends.iptables.rules import (
    ACCEPT,
    DENIED_MARK,
    LOG,
    MARK,
    REJECT,
    RETURN,
    Range,
    Rule,
    id_ranges,
)
from imds_guard.backends.iptables.user_tree import FLAT, MEMBER, Users, tree, user_rule
from imds_guard.errors import Unsupported
from imds_guard.policy.filter_numbers import NO_NUMBERS, Numbers
from imds_guard.policy.filter_text import rules_text
from imds_guard.policy.filters import Target, targets_of
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Protocol, Verdict
from imds_guard.policy.ports import ALL_PORTS

HEAD = "IMDS-GUARD"
TCP = "IMDS-GUARD-T"
UDP = "IMDS-GUARD-U"
DENY = "IMDS-GUARD-DENY"
FORMAT = "imds-guard/1"
"""The comment in IMDS-GUARD begins with this. Another layout of the rules gets another number."""

MAX_RANGES = 20_000
"""Ranges of IDs in all lists. iptables-restore takes seconds for so many, and its time grows faster than their number.
"""
Chains = dict[str, list[Rule]]
Members = Mapping[tuple[str, str], frozenset[int]]
"""("lock name", "allow" or "deny") -> the members of that list's groups."""


class Part(enum.Enum):
    """What the rules of one table are for."""

    ALONE = "alone"
    """Filter, where marks don't work."""
    FILTER = "filter"
    MANGLE = "mangle"
    NAT = "nat"
    """Callers of filters are led to them. It denies nothing."""


class ResolvedPolicy(NamedTuple):
    """A policy with the members of its groups. ``members`` is None where the kernel matches supplementary groups."""

    policy: Policy
    members: Members | None = None
    numbers: Numbers = NO_NUMBERS
    """Of the filters, which are part of the addresses at which they listen."""


def require_supported(policy: Policy) -> None:
    """Raises Unsupported for a policy that no rules can enforce, on any machine."""
    if policy.strict:
        raise Unsupported(
            "iptables can't enforce a strict policy: it judges who opened a socket, and does not know if a connect "
            "was let through; leave --strict (strict = true) out"
        )
    of_filters.require_supported(policy)
    ranges = sum(
        len(id_ranges(ids))
        for lock in policy.locks
        for ids in (lock.allow.users, lock.allow.groups, lock.deny.users, lock.deny.groups)
    )
    if ranges > MAX_RANGES:
        raise Unsupported(
            f"the lists of the policy have {ranges} ranges of IDs, and the maximum for iptables is {MAX_RANGES}: "
            "list a group in place of its members"
        )


def digest(policy: Policy) -> str:
    """16 hexadecimal digits that differ for different policies. The rules of both IP versions have them."""
    import hashlib  # noqa: PLC0415 -- start-up time: no rules are read or written where there is a guard by eBPF

    fields = [policy.mode.value, policy.containers.value]
    for lock in policy.locks:
        fields += [lock.name, lock.default.value]
        fields += [f"{e.network} {e.tcp} {e.udp}" for e in lock.endpoints]
        for identities in (lock.allow, lock.deny):
            fields += [repr(sorted(identities.users)), repr(sorted(identities.groups))]
    fields += [repr(policy.filter_uid)] if policy.filters else []
    for one in policy.filters:
        fields += [one.name, repr(one.locks), repr(one.everyone), str(one.port), rules_text(one.rules)]
        fields += [repr(sorted(one.who.users)), repr(sorted(one.who.groups))]
    return hashlib.sha256("\n".join(fields).encode()).hexdigest()[:16]


def render(resolved: ResolvedPolicy, version: int, part: Part = Part.ALONE) -> Chains:
    """Chain -> rules for IP ``version`` 4 or 6. Empty when no endpoint is of that version.

    In audit mode mangle alone writes to the kernel log: one line for a packet.
    """
    policy = resolved.policy
    chains: Chains = {}
    entries = _entries(policy, version)
    if not entries or (part in (Part.FILTER, Part.NAT) and policy.mode is Mode.AUDIT):
        return chains
    if part is Part.NAT:
        entries = _entries_of_filters(policy, version)
        if not entries:
            return chains
    header = f"{FORMAT} containers={policy.containers.value} policy={digest(policy)}"
    chains[HEAD] = _first_rules(policy, version, part)
    for protocol, name in ((Protocol.TCP, TCP), (Protocol.UDP, UDP)):
        finders = [rule for entry in entries for rule in _find_lock(*entry, protocol)]
        if finders:
            syn = protocol is Protocol.TCP
            chains[HEAD].append(Rule(name, goto=True, protocol=protocol.value, syn=syn, comment=header))
            chains[name] = finders
    for number in sorted({number for number, _, _ in entries}):
        _render_lock(chains, resolved, number)
        _render_rest(chains, resolved, number, version, part)
    chains.update(_of_places(resolved, version, part))
    chains[DENY] = denial(policy.mode, version, part)
    return chains


def _first_rules(policy: Policy, version: int, part: Part) -> list[Rule]:
    """What comes before the locks: the marks, and direct connects to where filters listen."""
    deny = Rule(DENY, goto=True)
    rules = [deny._replace(mark=DENIED_MARK)] if part is Part.FILTER else []
    if not policy.filters or version != 4 or part is Part.NAT:
        return rules
    if part is Part.MANGLE:  # NAT comes later: whoever has such an address here has asked for it
        return [of_filters.at_places(deny)]
    return [*rules, of_filters.at_places(Rule(of_filters.PLACES, goto=True)), of_filters.elsewhere(deny)]


def lock_chain(number: int) -> str:
    """The name of the chain of a lock, by its position in the policy."""
    return f"{HEAD}-L{number}"


def lock_comment(name: str) -> str:
    """A lock's name in ASCII without quotes or spaces: at most 194 of a comment's 255 bytes."""
    import urllib.parse  # noqa: PLC0415

    return "lock=" + urllib.parse.quote(name, safe="")


def _entries(policy: Policy, version: int) -> list[tuple[int, Lock, Endpoint]]:
    """(number of the lock, lock, endpoint), the most specific endpoint first."""
    entries = [
        (number, lock, endpoint)
        for number, lock in enumerate(policy.locks)
        for endpoint in lock.endpoints
        if endpoint.network.version == version
    ]
    return sorted(entries, key=lambda entry: (-entry[2].network.prefixlen, entry[2].sort_key(), entry[0]))


def _entries_of_filters(policy: Policy, version: int) -> list[tuple[int, Lock, Endpoint]]:
    """The addresses that filters serve, with the ports at which they do. NAT is for IPv4 alone."""
    return [
        (number, lock, Endpoint(ipaddress.ip_network(target.address), ((target.port, target.port),)))
        for number, lock in enumerate(policy.locks)
        for target in sorted({one for each in policy.filters for one in targets_of(each, (lock,))}, key=Target.sort_key)
        if target.address.version == version == 4
    ]


def _find_lock(number: int, lock: Lock, endpoint: Endpoint, protocol: Protocol) -> list[Rule]:
    ports = endpoint.ports(protocol)
    ranges: Sequence[Range | None] = [None] if ports == ALL_PORTS else list(ports)
    everywhere = endpoint.network.prefixlen == 0
    return [
        Rule(
            lock_chain(number),
            goto=True,
            destination=None if everywhere else endpoint.network,
            protocol=protocol.value,
            ports=range_,
            comment=lock_comment(lock.name),
        )
        for range_ in ranges
    ]


def denial(mode: Mode, version: int, part: Part = Part.ALONE) -> list[Rule]:
    """The rules for a packet that is denied: it is rejected at once, or in audit mode written to the kernel log.

    In mangle ACCEPT ends the table: no rule behind ours can change the mark. What may pass always goes on (RETURN).
    """
    if mode is Mode.AUDIT:
        return [Rule(LOG)]
    if part is Part.MANGLE:
        return [Rule(MARK, mark=DENIED_MARK), Rule(ACCEPT)]
    if part is Part.NAT:
        return [Rule(RETURN)]
    unreachable = "icmp-port-unreachable" if version == 4 else "icmp6-port-unreachable"
    return [Rule(REJECT, protocol="tcp", reject_with="tcp-reset"), Rule(REJECT, reject_with=unreachable)]


# --- one lock ---------------------------------------------------------------------------------------------------------


def _render_lock(chains: Chains, resolved: ResolvedPolicy, number: int) -> None:
    lock = resolved.policy.locks[number]
    name = lock_chain(number)
    rules = chains[name] = []
    if lock.default is Verdict.ALLOW:
        # A socket of the kernel itself has no owner, so no deny list could stop it.
        rules.append(Rule(DENY, goto=True, ownerless=True))
    supplementary = resolved.members is None
    denied = _listed_users(resolved, lock, "deny", lock.deny)
    if len(denied) > FLAT:
        # -j: packets of users that are not in the tree must come back. In audit mode packets of those in it come back,
        # too, after a line in the log, and a later rule may log them once more.
        rules.append(Rule(tree(chains, f"{name}-D", denied, Rule(DENY, goto=True), [])))
    else:
        rules += [user_rule(users, Rule(DENY, goto=True)) for users in denied]
    rules += [Rule(DENY, goto=True, gids=g, supplementary=supplementary) for g in id_ranges(lock.deny.groups)]
    rules += [Rule(RETURN, gids=g, supplementary=supplementary) for g in id_ranges(lock.allow.groups)]
    default = _default(lock)
    if of_filters.has_filters(lock, resolved.policy):
        default = Rule(of_filters.rest_chain(number), goto=True)
    allowed = _listed_users(resolved, lock, "allow", lock.allow)
    if len(allowed) > FLAT:
        rules.append(Rule(tree(chains, f"{name}-A", allowed, Rule(RETURN), [default]), goto=True))
    else:
        rules += [user_rule(users, Rule(RETURN)) for users in allowed] + [default]


def _default(lock: Lock) -> Rule:
    return Rule(DENY, goto=True) if lock.default is Verdict.DENY else Rule(RETURN)


def _render_rest(chains: Chains, resolved: ResolvedPolicy, number: int, version: int, part: Part) -> None:
    """The filters of a lock, between its lists and its default."""
    policy, deny = resolved.policy, Rule(DENY, goto=True)
    if not of_filters.has_filters(policy.locks[number], policy):
        return
    led = {Part.NAT: of_filters.leading, Part.MANGLE: of_filters.marking}.get(part, of_filters.arriving)
    led = of_filters.passing if policy.mode is Mode.AUDIT else led
    listeners = of_filters.listeners_under(policy, resolved.numbers) if version == 4 else []
    chains[of_filters.rest_chain(number)] = [
        *of_filters.rest(policy, number, version),
        _default(policy.locks[number]),
    ]
    chains.update(of_filters.filter_chains(policy, number, listeners, led, deny))


def _of_places(resolved: ResolvedPolicy, version: int, part: Part) -> Chains:
    """The chains at which the marks of filters are set and asked for."""
    policy = resolved.policy
    if not policy.filters or version != 4 or part is Part.NAT:
        return {}
    if part is Part.MANGLE:
        return {} if policy.mode is Mode.AUDIT else {of_filters.LED: list(of_filters.LED_RULES)}
    numbers = resolved.numbers.targets
    finders = [
        Rule(lock_chain(number), goto=True, destination=of_filters.row(numbers[Target(address, low)]))
        for number, _, endpoint in _entries_of_filters(policy, version)
        for address, low in [(endpoint.network.network_address, endpoint.tcp[0][0])]
    ]
    return {of_filters.PLACES: [*finders, Rule(DENY, goto=True)]}


def _listed_users(resolved: ResolvedPolicy, lock: Lock, which: str, identities: Identities) -> list[Users]:
    """Listed users and resolved members in ascending, disjoint ranges. A user that is both counts as listed."""
    members = (resolved.members or {}).get((lock.name, which), frozenset()) - identities.users
    listed = [(low, high, "") for low, high in id_ranges(identities.users)]
    return sorted(listed + [(low, high, MEMBER) for low, high in id_ranges(members)])
