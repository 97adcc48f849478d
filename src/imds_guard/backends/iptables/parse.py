# SPDX-License-Identifier: Apache-2.0
"""The rules of both address families as the Policy that they stand for.

Names of locks and what is to happen to containers come from comments; who may go where comes from the rules alone.
What is no rule of ours is left out here: that the rules are not what render() makes of the result is how it is seen.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from imds_guard.backends.iptables.render import DENY, FORMAT, HEAD, MEMBER, TCP, UDP, Chains, Holding
from imds_guard.backends.iptables.rules import LOG, RETURN, ForeignRule, Range, Rule, parse_rule
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Network, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS, Ports

MAX_IDS = 524_288
"""More ids than any policy may list (design: sizes). A range that somebody widened must not fill our memory."""


_EVERYWHERE: dict[int, Network] = {4: ipaddress.ip_network("0.0.0.0/0"), 6: ipaddress.ip_network("::/0")}


class FoundLock:
    """What the rules of one family say about one lock."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tcp: dict[Network, Ports] = {}
        self.udp: dict[Network, Ports] = {}
        self.ids: dict[tuple[str, str], set[int]] = {}
        self.default = Verdict.DENY
        self.supplementary = True

    def add(self, which: str, kind: str, range_: Range) -> None:
        """Notes ids of a list: ``which`` is "allow" or "deny", ``kind`` "users", "groups" or "members"."""
        known = self.ids.setdefault((which, kind), set())
        if range_[1] - range_[0] + len(known) < MAX_IDS:
            known.update(range(range_[0], range_[1] + 1))

    def listed(self, which: str) -> Identities:
        """One of the lists."""
        users, groups = self.ids.get((which, "users"), ()), self.ids.get((which, "groups"), ())
        return Identities(frozenset(users), frozenset(groups))

    def endpoints(self) -> tuple[Endpoint, ...]:
        """The locked endpoints of this family."""
        networks = {**self.tcp, **self.udp}
        return tuple(Endpoint(n, self.tcp.get(n, ()), self.udp.get(n, ())) for n in networks)


class Found(NamedTuple):
    """What one family's chains say. ``digest`` is of the whole policy that they are a part of."""

    locks: tuple[FoundLock, ...]
    mode: Mode
    containers: Verdict
    digest: str


def parse_chains(table: Mapping[str, Sequence[str]]) -> tuple[Chains, list[str]]:
    """The rules of our chains, and those lines that can't be ours."""
    chains: Chains = {}
    foreign: list[str] = []
    for chain, lines in table.items():
        rules = chains[chain] = []
        for line in lines:
            try:
                rules.append(parse_rule(line))
            except ForeignRule:
                foreign.append(f"-A {chain} {line}")
    return chains, foreign


def find(chains: Chains, version: int) -> Found:
    """What our chains of one IP version say."""
    containers, digest = Verdict.DENY, ""
    for rule in chains.get(HEAD, []):
        words = dict(word.partition("=")[::2] for word in rule.comment.split())
        if FORMAT in words:
            containers = Verdict.ALLOW if words.get("containers") == Verdict.ALLOW.value else Verdict.DENY
            digest = words.get("policy", "")
    audit = any(rule.target == LOG for rule in chains.get(DENY, []))
    locks = tuple(_find_locks(chains, version).values())
    return Found(locks, Mode.AUDIT if audit else Mode.ENFORCE, containers, digest)


def _find_locks(chains: Chains, version: int) -> dict[str, FoundLock]:
    locks: dict[str, FoundLock] = {}
    everywhere = _EVERYWHERE[version]
    for chain in (TCP, UDP):
        for rule in chains.get(chain, []):
            if rule.target not in chains:
                continue
            if rule.target not in locks:
                locks[rule.target] = FoundLock(_lock_name(rule))
                _read_lock(chains, rule.target, locks[rule.target])
            ports = locks[rule.target].tcp if chain == TCP else locks[rule.target].udp
            network = rule.destination or everywhere
            ports[network] = ports.get(network, ()) + ((rule.ports,) if rule.ports else ALL_PORTS)
    return locks


def _lock_name(rule: Rule) -> str:
    import urllib.parse  # noqa: PLC0415 -- start-up time: most machines have no rules of ours

    # Octets that are no UTF-8, which somebody else must have written, come as surrogates that no policy can hold.
    kind, _, name = rule.comment.encode(errors="replace").decode().partition("=")
    return urllib.parse.unquote(name) if kind == "lock" and name else rule.target


def _read_lock(chains: Chains, name: str, lock: FoundLock) -> None:
    for rule in chains[name]:
        if rule.ownerless:
            continue
        if rule.gids:
            lock.add(_which(rule), "groups", rule.gids)
            lock.supplementary = lock.supplementary and rule.supplementary
        elif rule.uids:
            lock.add(_which(rule), _kind(rule), rule.uids)
        elif _is_node(chains, name, rule):
            _read_tree(chains, name, rule, lock)
        else:
            lock.default = _default(rule)
            return


def _read_tree(chains: Chains, lock_chain: str, root: Rule, lock: FoundLock) -> None:
    """Collects the leaves. The tree of allowed users ends in the lock's default, that of denied ones nowhere."""
    which = "allow" if root.goto else "deny"
    waiting, seen = [root.target], {root.target}
    while waiting:
        for rule in chains[waiting.pop()]:
            if _is_node(chains, lock_chain, rule):
                if rule.target not in seen:
                    seen.add(rule.target)
                    waiting.append(rule.target)
            elif rule.uids:
                lock.add(which, _kind(rule), rule.uids)
            elif which == "allow":
                lock.default = _default(rule)


def _is_node(chains: Chains, lock_chain: str, rule: Rule) -> bool:
    return rule.target in chains and rule.target.startswith(lock_chain + "-")


def _which(rule: Rule) -> str:
    return "deny" if rule.target == DENY else "allow"


def _kind(rule: Rule) -> str:
    return "members" if rule.comment == MEMBER else "users"


def _default(rule: Rule) -> Verdict:
    return Verdict.ALLOW if rule.target == RETURN else Verdict.DENY


# --- both families --------------------------------------------------------------------------------------------------


def combine(families: Iterable[Found]) -> Holding | None:
    """The policy that the families hold together; None when they hold nothing. Raises BadPolicy.

    A lock that has other lists in one family than in the other comes out as two. Where the families differ in the mode
    the stricter one is told, so that a change on top of it weakens nothing.
    """
    found = [family for family in families if family.locks]
    if not found:
        return None
    mode = Mode.AUDIT if all(family.mode is Mode.AUDIT for family in found) else Mode.ENFORCE
    allows = all(family.containers is Verdict.ALLOW for family in found)
    locks: dict[str, Lock] = {}
    members: dict[tuple[str, str], frozenset[int]] = {}
    supplementary = True
    for lock in (lock for family in found for lock in family.locks):
        name = _merge(locks, lock)
        supplementary = supplementary and lock.supplementary
        for which in ("allow", "deny"):
            members[name, which] = members.get((name, which), frozenset()) | lock.ids.get((which, "members"), set())
    policy = make_policy(locks.values(), mode, Verdict.ALLOW if allows else Verdict.DENY)
    return Holding(policy, None if supplementary else members)


def _merge(locks: dict[str, Lock], found: FoundLock) -> str:
    """Adds a family's part of a lock to the other's; returns the name under which it went in."""
    name = found.name
    part = Lock(name, found.endpoints(), found.listed("allow"), found.listed("deny"), found.default)
    known = locks.get(name)
    if known is not None and (known.allow, known.deny, known.default) != (part.allow, part.deny, part.default):
        name = name.encode()[:50].decode(errors="ignore") + " (IPv6)"
        locks[name] = Lock(name, part.endpoints, part.allow, part.deny, part.default)
    elif known is not None:
        locks[name] = Lock(name, known.endpoints + part.endpoints, part.allow, part.deny, part.default)
    else:
        locks[name] = part
    return name
