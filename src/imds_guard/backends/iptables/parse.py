# SPDX-License-Identifier: Apache-2.0
"""The policy in the rules of both IP versions.

The names of locks and the setting for containers come from comments. Who may connect where comes from the rules alone.
Rules that are not ours are ignored here. They are noticed because render() makes other rules of the result.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from imds_guard.backends.iptables.render import DENY, FORMAT, HEAD, TCP, UDP, Chains, ResolvedPolicy
from imds_guard.backends.iptables.render_filters import REST
from imds_guard.backends.iptables.rules import LOG, RETURN, ForeignRule, Range, Rule, parse_rule
from imds_guard.backends.iptables.user_tree import MEMBER
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Network, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS, Ports

MAX_IDS = 524_288
"""More IDs than any policy may list. A range that somebody widened must not fill our memory."""

_EVERYWHERE: dict[int, Network] = {4: ipaddress.ip_network("0.0.0.0/0"), 6: ipaddress.ip_network("::/0")}


class ParsedLock:
    """One lock in the rules of one IP version."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tcp: dict[Network, Ports] = {}
        self.udp: dict[Network, Ports] = {}
        self.ids: dict[tuple[str, str], set[int]] = {}
        self.default = Verdict.DENY
        self.supplementary = True

    def add(self, which: str, kind: str, range_: Range) -> None:
        """Adds IDs to a list: ``which`` is "allow" or "deny", ``kind`` is "users", "groups" or "members"."""
        known = self.ids.setdefault((which, kind), set())
        if range_[1] - range_[0] + len(known) < MAX_IDS:
            known.update(range(range_[0], range_[1] + 1))

    def listed(self, which: str) -> Identities:
        """The users and groups of the list ``which``."""
        users, groups = self.ids.get((which, "users"), ()), self.ids.get((which, "groups"), ())
        return Identities(frozenset(users), frozenset(groups))

    def endpoints(self) -> tuple[Endpoint, ...]:
        """The locked endpoints of this IP version."""
        networks = {**self.tcp, **self.udp}
        return tuple(Endpoint(n, self.tcp.get(n, ()), self.udp.get(n, ())) for n in networks)


class FamilyPolicy(NamedTuple):
    """The policy in the chains of one IP version. ``digest`` is that of the whole policy, both IP versions together."""

    locks: tuple[ParsedLock, ...]
    mode: Mode
    containers: Verdict
    digest: str
    filtered: bool = False
    """It has filters. What they allow is in no rule: filter_state.py."""


def parse_chains(table: Mapping[str, Sequence[str]]) -> tuple[Chains, list[str]]:
    """The rules of our chains, and the lines that can't be ours."""
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


def parse_family(chains: Chains, version: int) -> FamilyPolicy:
    """The policy in our chains of one IP version."""
    containers, digest = Verdict.DENY, ""
    for rule in chains.get(HEAD, []):
        fields = dict(field.partition("=")[::2] for field in rule.comment.split())
        if FORMAT in fields:
            containers = Verdict.ALLOW if fields.get("containers") == Verdict.ALLOW.value else Verdict.DENY
            digest = fields.get("policy", "")
    audit = any(rule.target == LOG for rule in chains.get(DENY, []))
    locks = tuple(_parse_locks(chains, version).values())
    filtered = any(name.startswith(REST) for name in chains)
    return FamilyPolicy(locks, Mode.AUDIT if audit else Mode.ENFORCE, containers, digest, filtered)


def _parse_locks(chains: Chains, version: int) -> dict[str, ParsedLock]:
    locks: dict[str, ParsedLock] = {}
    everywhere = _EVERYWHERE[version]
    for chain in (TCP, UDP):
        for rule in chains.get(chain, []):
            if rule.target not in chains:
                continue
            if rule.target not in locks:
                locks[rule.target] = ParsedLock(_lock_name(rule))
                _read_lock(chains, rule.target, locks[rule.target])
            ports = locks[rule.target].tcp if chain == TCP else locks[rule.target].udp
            network = rule.destination or everywhere
            ports[network] = ports.get(network, ()) + ((rule.ports,) if rule.ports else ALL_PORTS)
    return locks


def _lock_name(rule: Rule) -> str:
    import urllib.parse  # noqa: PLC0415 -- start-up time: most machines have no rules of ours

    # Bytes that are not UTF-8, which somebody else must have written, are surrogates here. No policy can have those.
    kind, _, name = rule.comment.encode(errors="replace").decode().partition("=")
    return urllib.parse.unquote(name) if kind == "lock" and name else rule.target


def _read_lock(chains: Chains, name: str, lock: ParsedLock) -> None:
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
            lock.default = _default(chains, rule)
            return


def _read_tree(chains: Chains, lock_chain: str, root: Rule, lock: ParsedLock) -> None:
    """Collects the leaves. The leaves of allowed users end with the lock's default, those of denied users do not."""
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
                lock.default = _default(chains, rule)


def _is_node(chains: Chains, lock_chain: str, rule: Rule) -> bool:
    return rule.target in chains and rule.target.startswith(lock_chain + "-")


def _which(rule: Rule) -> str:
    return "deny" if rule.target == DENY else "allow"


def _kind(rule: Rule) -> str:
    return "members" if rule.comment == MEMBER else "users"


def _default(chains: Chains, rule: Rule) -> Verdict:
    """Filters stand between the lists and the default."""
    rest = chains.get(rule.target, []) if rule.target.startswith(REST) else []
    rule = rest[-1] if rest else rule
    return Verdict.ALLOW if rule.target == RETURN else Verdict.DENY


# --- both IP versions -------------------------------------------------------------------------------------------------


def combine(families: Iterable[FamilyPolicy]) -> ResolvedPolicy | None:
    """The policy of both IP versions together. None when there is none. Raises BadPolicy.

    A lock whose lists differ between the IP versions becomes two locks. Where the mode differs the stricter one is
    taken, so that a change that is based on the result weakens nothing.
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
    return ResolvedPolicy(policy, None if supplementary else members)


def _merge(locks: dict[str, Lock], parsed: ParsedLock) -> str:
    """Merges a lock of one IP version into ``locks``. Returns the name that it has there."""
    name = parsed.name
    part = Lock(name, parsed.endpoints(), parsed.listed("allow"), parsed.listed("deny"), parsed.default)
    known = locks.get(name)
    if known is not None and (known.allow, known.deny, known.default) != (part.allow, part.deny, part.default):
        name = name.encode()[:50].decode(errors="ignore") + " (IPv6)"
        locks[name] = Lock(name, part.endpoints, part.allow, part.deny, part.default)
    elif known is not None:
        locks[name] = Lock(name, known.endpoints + part.endpoints, part.allow, part.deny, part.default)
    else:
        locks[name] = part
    return name
