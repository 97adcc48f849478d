# SPDX-License-Identifier: Apache-2.0
"""Rules as they are written do with every packet what ``decide()`` says.

IMDS_GUARD_RULES is the number of policies of each test (default: 120), IMDS_GUARD_SEED the first seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from random import Random

import pytest

from imds_guard.backends.iptables.parse import combine, parse_chains, parse_family
from imds_guard.backends.iptables.render import Part, ResolvedPolicy, render, require_supported
from imds_guard.backends.iptables.tables import rule_texts
from imds_guard.errors import Unsupported
from imds_guard.export import export
from imds_guard.policy.decide import Reason, decide
from imds_guard.policy.model import Mode, Policy
from tests import generate
from tests.rules.compare import (
    Attempt,
    apply,
    apply_forwarded,
    attempt,
    by_iptables,
    by_mangle,
    by_nft,
    by_own_tables,
    members,
    new_filters,
    new_mangles,
    nft_forwarded,
)
from tests.rules.forwarded import packet
from tests.rules.nft import Ruleset

POLICIES = int(os.environ.get("IMDS_GUARD_RULES", "120"))
FIRST_SEED = int(os.environ.get("IMDS_GUARD_SEED", "1"))
PACKETS = 80
IN_A_ROW = 4
"""Policies that are put in force one after the other in the same tables."""


def seeds(step: int = 1) -> range:
    return range(FIRST_SEED, FIRST_SEED + POLICIES, step)


def packets(random: Random, policy: Policy) -> list[Attempt]:
    return [attempt(random, policy) for _ in range(PACKETS)]


def repeats(test: str, seed: int, lines: Iterable[str]) -> list[str]:
    """Each line with the command that repeats it."""
    again = f"IMDS_GUARD_SEED={seed} IMDS_GUARD_RULES=1 ./run test tests/rules/test_rules.py -k {test}"
    return [f"{again}  # {line}" for line in lines]


def supported(random: Random) -> tuple[Policy, bool]:
    """A policy that the backend takes, and whether it was refused first, because it was strict."""
    policy = generate.policy(random)
    if not policy.strict:
        require_supported(policy)
        return policy, False
    with pytest.raises(Unsupported, match="strict"):
        require_supported(policy)
    return policy._replace(strict=False), True


def test_iptables() -> None:
    """Also after changes, and with groups that were resolved to users. Strict policies are refused."""
    wrong: list[str] = []
    refused = 0
    for seed in seeds(IN_A_ROW):
        random, filters = Random(seed), new_filters()
        for _ in range(IN_A_ROW):
            policy, strict = supported(random)
            refused += strict
            resolved = ResolvedPolicy(policy, members(random, policy))
            apply(filters, resolved)
            wrong += repeats("test_iptables", seed, by_iptables(filters, resolved, packets(random, policy)))
    assert wrong == []
    assert refused > 0 or POLICIES < 50


def test_iptables_rules_are_the_policy() -> None:
    """What was written is read back as the policy, with the members of resolved groups, and nothing is left over."""
    wrong: list[str] = []
    for seed in seeds():
        random = Random(seed)
        policy, _ = supported(random)
        resolved = ResolvedPolicy(policy, members(random, policy))
        part = random.choice([Part.ALONE, Part.MANGLE] + [Part.FILTER] * (policy.mode is Mode.ENFORCE))
        families = []
        for version in (4, 6):
            chains, foreign = parse_chains(rule_texts(render(resolved, version, part)))
            assert foreign == []
            families.append(parse_family(chains, version))
        held = combine(families)
        if held is None or held.policy != policy or _listed(held) != _listed(resolved):
            wrong += repeats("test_iptables_rules_are_the_policy", seed, [f"{held} in place of {resolved}"])
    assert wrong == []


def _listed(resolved: ResolvedPolicy) -> dict[tuple[str, str], frozenset[int]]:
    """The members that there are. A list without any need not be mentioned."""
    return {key: found for key, found in (resolved.members or {}).items() if found}


@pytest.mark.parametrize("tracked", [False, True])
def test_forwarded_by_iptables(tracked: bool) -> None:
    """Rules in mangle FORWARD do with every forwarded packet what ``decide_forwarded()`` says. Also after changes."""
    wrong: list[str] = []
    for seed in seeds(IN_A_ROW):
        random, tables = Random(seed), new_mangles()
        for _ in range(IN_A_ROW):
            policy = generate.policy(random)
            apply_forwarded(tables, policy, tracked)
            sent = [packet(random, policy) for _ in range(PACKETS)]
            wrong += repeats("test_forwarded_by_iptables", seed, by_mangle(tables, policy, sent, tracked))
    assert wrong == []


@pytest.mark.parametrize("tracked", [False, True])
def test_forwarded_by_nft(tracked: bool) -> None:
    """So do the tables of nft."""
    wrong: list[str] = []
    for seed in seeds():
        random = Random(seed)
        policy = generate.policy(random)
        rules = nft_forwarded(policy, tracked)
        sent = [packet(random, policy) for _ in range(PACKETS)]
        wrong += repeats("test_forwarded_by_nft", seed, by_own_tables(rules, policy, sent, tracked))
    assert wrong == []


def test_exported_iptables() -> None:
    """``export --format iptables``: each of the two commands takes its part of the file."""
    wrong: list[str] = []
    for seed in seeds(4):
        random, filters = Random(seed), new_filters()
        policy = generate.policy(random)
        for one in filters.values():
            one.restore(export(policy, "iptables").text)
        found = by_iptables(filters, ResolvedPolicy(policy), packets(random, policy))
        wrong += repeats("test_exported_iptables", seed, found)
    assert wrong == []


def test_exported_nftables() -> None:
    """``export --format nftables``: the verdict is that of a caller without supplementary groups."""
    wrong: list[str] = []
    for seed in seeds():
        random = Random(seed)
        policy = generate.policy(random)
        rules = Ruleset(export(policy, "nftables").text)
        wrong += repeats("test_exported_nftables", seed, by_nft(rules, policy, packets(random, policy)))
    assert wrong == []


def test_exported_nftables_says_where_it_differs() -> None:
    """Where the rules let through what ``decide()`` denies, or the other way round, the file says so."""
    wrong: list[str] = []
    kinds: set[str] = set()
    for seed in seeds():
        random = Random(seed)
        policy = generate.policy(random)._replace(mode=Mode.ENFORCE)
        exported = export(policy, "nftables")
        rules = Ruleset(exported.text)
        for one in packets(random, policy):
            note = _difference(rules, policy, one)
            if note is None or not one.begins:
                continue
            kinds.add(note.split(" ")[0])
            if note not in exported.text:
                wrong += repeats("test_exported_nftables_says", seed, [f"{note!r} is missing: {one} under {policy}"])
    assert wrong == []
    assert kinds == {"WEAKER:", "Note:"} or POLICIES < 50


def _difference(rules: Ruleset, policy: Policy, one: Attempt) -> str | None:
    """The note for an attempt that the rules and ``decide()`` judge differently."""
    found = decide(policy, one.caller, one.destination._replace(address=one.address))
    allowed = rules.judge("output", one.packet()).verdict == "ACCEPT"
    if found.allowed == allowed or found.reason is Reason.TOO_MANY_GROUPS:  # a limit of eBPF, not of nft
        return None
    seen = "nftables sees primary groups only: lock"
    return {
        Reason.ALLOWED_GROUP: f"Note: {seen} {found.lock!r} denies who has an allowed group as a supplementary group",
        Reason.DENIED_GROUP: f"WEAKER: {seen} {found.lock!r} does not deny who has a denied group as a supplementary",
        Reason.CONTAINER: "Note: callers in containers are treated as the host's own; the policy denies them",
        Reason.USER_NAMESPACE: f"WEAKER: lock {found.lock!r} allows by default: a listed user can take another ID",
    }.get(found.reason, f"no note for {found}")
