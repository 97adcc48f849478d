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
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from imds_guard.backends.iptables.rules import ACCEPT, LOG, MARK, REJECT, RETURN, Range, Rule
from imds_guard.errors import Unsupported
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Protocol, Verdict
from imds_guard.policy.ports import ALL_PORTS

HEAD = "IMDS-GUARD"
TCP = "IMDS-GUARD-T"
UDP = "IMDS-GUARD-U"
DENY = "IMDS-GUARD-DENY"
FORMAT = "imds-guard/1"
"""The comment in IMDS-GUARD begins with this. Another layout of the rules gets another number."""

FAN_OUT = 4
"""Ranges in a leaf, and children of a node. With 1,000 ranges there are five levels, and a packet meets about 12 rules.

nft counts a goto as a level and takes 16 (NFT_JUMP_STACK_SIZE, nft_chain_validate() in Linux
net/netfilter/nf_tables_api.c); with OUTPUT and our own steps that leaves ten levels, a million ranges.
"""
MAX_RANGES = 20_000
"""Ranges of IDs in all lists. iptables-restore takes seconds for so many, and its time grows faster than their number.
"""
FLAT = 8
"""Up to so many ranges are in the lock's own chain, without a tree."""

MEMBER = "member"
"""The comment of a rule for users that are there as members of a listed group."""

Chains = dict[str, list[Rule]]
Members = Mapping[tuple[str, str], frozenset[int]]
"""("lock name", "allow" or "deny") -> the members of that list's groups."""


class Part(enum.Enum):
    """What the rules of one table are for."""

    ALONE = "alone"
    """Filter, where marks don't work."""
    FILTER = "filter"
    MANGLE = "mangle"


class ResolvedPolicy(NamedTuple):
    """A policy with the members of its groups. ``members`` is None where the kernel matches supplementary groups."""

    policy: Policy
    members: Members | None = None


def require_supported(policy: Policy) -> None:
    """Raises Unsupported for a policy that no rules can enforce, on any machine."""
    if policy.strict:
        raise Unsupported(
            "iptables can't enforce a strict policy: it judges who opened a socket, and does not know if a connect "
            "was let through; leave --strict (strict = true) out"
        )
    if policy.filters:
        raise Unsupported("iptables can't enforce filters: leave the tables [filter.NAME] out")
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
    return hashlib.sha256("\n".join(fields).encode()).hexdigest()[:16]


def render(resolved: ResolvedPolicy, version: int, part: Part = Part.ALONE) -> Chains:
    """Chain -> rules for IP ``version`` 4 or 6. Empty when no endpoint is of that version.

    In audit mode mangle alone writes to the kernel log: one line for a packet.
    """
    policy = resolved.policy
    chains: Chains = {}
    entries = _entries(policy, version)
    if not entries or (part is Part.FILTER and policy.mode is Mode.AUDIT):
        return chains
    header = f"{FORMAT} containers={policy.containers.value} policy={digest(policy)}"
    chains[HEAD] = [Rule(DENY, goto=True, marked=True)] if part is Part.FILTER else []
    for protocol, name in ((Protocol.TCP, TCP), (Protocol.UDP, UDP)):
        finders = [rule for entry in entries for rule in _find_lock(*entry, protocol)]
        if finders:
            syn = protocol is Protocol.TCP
            chains[HEAD].append(Rule(name, goto=True, protocol=protocol.value, syn=syn, comment=header))
            chains[name] = finders
    for number in sorted({number for number, _, _ in entries}):
        _render_lock(chains, resolved, number)
    chains[DENY] = denial(policy.mode, version, part)
    return chains


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
        return [Rule(MARK), Rule(ACCEPT)]
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
        rules.append(Rule(_tree(chains, f"{name}-D", denied, Rule(DENY, goto=True), [])))
    else:
        rules += [_user_rule(users, Rule(DENY, goto=True)) for users in denied]
    rules += [Rule(DENY, goto=True, gids=g, supplementary=supplementary) for g in id_ranges(lock.deny.groups)]
    rules += [Rule(RETURN, gids=g, supplementary=supplementary) for g in id_ranges(lock.allow.groups)]
    default = Rule(DENY, goto=True) if lock.default is Verdict.DENY else Rule(RETURN)
    allowed = _listed_users(resolved, lock, "allow", lock.allow)
    if len(allowed) > FLAT:
        rules.append(Rule(_tree(chains, f"{name}-A", allowed, Rule(RETURN), [default]), goto=True))
    else:
        rules += [_user_rule(users, Rule(RETURN)) for users in allowed] + [default]


Users = tuple[int, int, str]
"""First and last user ID, and the comment: MEMBER or nothing."""


def _listed_users(resolved: ResolvedPolicy, lock: Lock, which: str, identities: Identities) -> list[Users]:
    """Listed users and resolved members in ascending, disjoint ranges. A user that is both counts as listed."""
    members = (resolved.members or {}).get((lock.name, which), frozenset()) - identities.users
    listed = [(low, high, "") for low, high in id_ranges(identities.users)]
    return sorted(listed + [(low, high, MEMBER) for low, high in id_ranges(members)])


def id_ranges(ids: Iterable[int]) -> list[Range]:
    """The IDs as ascending ranges that do not touch."""
    ranges: list[Range] = []
    for number in sorted(ids):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _user_rule(users: Users, hit: Rule) -> Rule:
    return Rule(hit.target, hit.goto, uids=users[:2], comment=users[2])


def _tree(chains: Chains, prefix: str, users: Sequence[Users], hit: Rule, miss: list[Rule]) -> str:
    """Adds a search tree: it leads a user ID to the one leaf that may list it. Returns the name of the root."""
    numbers = itertools.count()

    def node(part: Sequence[Users]) -> str:
        name = f"{prefix}{next(numbers)}"
        rules = chains[name] = []
        if len(part) <= FAN_OUT:
            rules += [_user_rule(one, hit) for one in part] + miss
            return name
        children = _split(part)
        for child in children[:-1]:
            rules.append(Rule(node(child), goto=True, uids=(child[0][0], child[-1][1])))
        rules.append(Rule(node(children[-1]), goto=True))
        return name

    return node(users)


def _split(users: Sequence[Users]) -> list[Sequence[Users]]:
    """At most FAN_OUT parts. The leaves of all but the last are full."""
    size = FAN_OUT
    while size * FAN_OUT < len(users):
        size *= FAN_OUT
    return [users[low : low + size] for low in range(0, len(users), size)]
