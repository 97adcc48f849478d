# SPDX-License-Identifier: Apache-2.0
"""The rules in OUTPUT, through all its hooks, do with every packet what ``decide()`` says: also beside NAT and rules of
others, and after each step of a change.

IMDS_GUARD_RULES and IMDS_GUARD_SEED are as in test_rules.py.
"""

from __future__ import annotations

from random import Random

import pytest

from imds_guard.backends.iptables.form import Form
from imds_guard.backends.iptables.output_rules import steps
from imds_guard.backends.iptables.parse import combine, parse_chains, parse_family
from imds_guard.backends.iptables.render import Part, ResolvedPolicy, render, require_supported
from imds_guard.backends.iptables.tables import rule_texts
from imds_guard.errors import Unsupported
from imds_guard.policy.edit import without_ipv6
from imds_guard.policy.filter_numbers import NOTHING, Numbered, Numbers, assigned_afresh
from imds_guard.policy.model import Mode, Policy
from tests import generate
from tests.rules.compare import attempt
from tests.rules.edits import CHAIN, FILTERS, IPTABLES, MARKS, Edit, unchanged
from tests.rules.output import Output, complaints, gains, nat, neither
from tests.rules.test_rules import IN_A_ROW, PACKETS, repeats, seeds, supported

WITHIN = range(120)
"""Seeds of policies in which a fault must show."""


def put_all(rules: Output, resolved: ResolvedPolicy, form: Form, edit: Edit = unchanged) -> None:
    if form is Form.NFT:
        rules.put_chain()
    for anchor, part in steps(form):
        rules.put(resolved, anchor, part, edit)


@pytest.mark.parametrize("form", Form)
def test_output(form: Form) -> None:
    """One policy after the other. After each step of a change each packet gets the old verdict or the new one."""
    wrong: list[str] = []
    for seed in seeds(3 * IN_A_ROW):
        random = Random(seed)
        rules, before = Output(), None
        for _ in range(IN_A_ROW):
            resolved = ResolvedPolicy(supported(random)[0])
            attempts = [attempt(random, resolved.policy) for _ in range(PACKETS)]
            rules.nat, rules.accept_first = {}, random.random() < 0.2
            if form is Form.NFT:
                rules.put_chain()
            for anchor, part in steps(form):
                rules.put(resolved, anchor, part)
                if before is not None:
                    wrong += repeats("test_output", seed, neither(rules, [(before, form), (resolved, form)], attempts))
            rules.nat = nat(random, resolved.policy)
            wrong += repeats("test_output", seed, complaints(rules, resolved, form, attempts))
            before = resolved
    assert wrong == []


WITH_FILTERS = [Form.NFT, Form.MANGLE]
"""The others refuse filters."""


def with_filters(random: Random, before: ResolvedPolicy | None = None) -> ResolvedPolicy:
    """A policy with filters that the backend takes, sometimes without any, and numbers that follow those before."""
    while True:
        policy = generate.policy(random, strict=False, filters=True)
        try:
            require_supported(policy)
            return ResolvedPolicy(policy, None, numbers_of(policy, before))
        except Unsupported:
            continue


def numbers_of(policy: Policy, before: ResolvedPolicy | None) -> Numbers:
    held = NOTHING if before is None else Numbered(before.policy.filters, before.numbers)
    return assigned_afresh(without_ipv6(policy), held, ())


@pytest.mark.parametrize("form", WITH_FILTERS)
def test_output_with_filters(form: Form) -> None:
    """The same with filters: callers are led to them, and to nothing else, also where others have NAT before ours."""
    wrong: list[str] = []
    for seed in seeds(3):
        random = Random(seed)
        rules, before = Output(), None
        for _ in range(IN_A_ROW):
            resolved = with_filters(random, before)
            attempts = [attempt(random, resolved.policy) for _ in range(PACKETS)]
            rules.nat, rules.accept_first, rules.nat_first = {}, random.random() < 0.1, False
            if form is Form.NFT:
                rules.put_chain()
            for anchor, part in steps(form):
                rules.put(resolved, anchor, part)
                if before is not None:
                    found = neither(rules, [(before, form), (resolved, form)], attempts)
                    wrong += repeats("test_output_with_filters", seed, found)
            rules.nat, rules.nat_first = nat(random, resolved.policy), random.random() < 0.3
            wrong += repeats("test_output_with_filters", seed, complaints(rules, resolved, form, attempts))
            before = resolved
    assert wrong == []


def test_rules_with_filters_are_the_policy() -> None:
    """Each table is read back as the locks of the policy, with nothing left over, and says that there are filters."""
    wrong: list[str] = []
    for seed in seeds():
        random = Random(seed)
        resolved = with_filters(random)
        policy = resolved.policy
        part = random.choice([Part.MANGLE] + [Part.FILTER] * (policy.mode is Mode.ENFORCE))
        families = []
        for version in (4, 6):
            chains, foreign = parse_chains(rule_texts(render(resolved, version, part)))
            _, foreign_in_nat = parse_chains(rule_texts(render(resolved, version, Part.NAT)))
            assert foreign + foreign_in_nat == []
            families.append(parse_family(chains, version))
        held = combine(families)
        locks = policy._replace(filters=(), filter_uid=None)
        if held is None or held.policy != locks or any(one.filtered for one in families) != bool(policy.filters):
            wrong += repeats("rules_with_filters_are", seed, [f"{held} in place of {resolved}"])
    assert wrong == []


@pytest.mark.parametrize("form", WITH_FILTERS)
def test_nobody_gains_by_what_conntrack_remembers(form: Form) -> None:
    """A caller that has the addresses and ports of an earlier connection gets the translation of that one.

    It reaches its own filter, or what it may reach itself, or nothing.
    """
    wrong: list[str] = []
    for seed in seeds(3):
        random, rules = Random(seed), Output()
        resolved = with_filters(random)
        put_all(rules, resolved, form)
        attempts = [attempt(random, resolved.policy) for _ in range(PACKETS)]
        wrong += repeats("conntrack", seed, gains(random, rules, resolved, form, attempts))
    assert wrong == []


@pytest.mark.parametrize("after", Form)
@pytest.mark.parametrize("before", Form)
def test_from_one_form_to_another(before: Form, after: Form) -> None:
    """Each step denies what the old form denied under the old policy, or judges by the new one. NAT is not there."""
    wrong: list[str] = []
    for seed in seeds(12):
        random, rules = Random(seed), Output()
        old, new = (ResolvedPolicy(supported(random)[0]) for _ in range(2))
        put_all(rules, old, before)
        attempts = [attempt(random, one.policy) for one in (old, new) for _ in range(PACKETS // 2)]
        if after is Form.NFT:
            rules.put_chain()
        for anchor, part in steps(after):
            rules.put(new, anchor, part)
            found = neither(rules, [(old, before), (new, after)], attempts)
            wrong += repeats("test_from_one_form_to_another", seed, found)
        if after is not Form.NFT:
            rules.chain = None
        wrong += repeats("test_from_one_form_to_another", seed, complaints(rules, new, after, attempts))
    assert wrong == []


# --- faults -----------------------------------------------------------------------------------------------------------


def is_found(seed: int, form: Form, edit: Edit, chain: Edit = unchanged) -> bool:
    random, rules = Random(seed), Output()
    resolved = ResolvedPolicy(generate.policy(random, strict=False))
    rules.nat, rules.accept_first = nat(random, resolved.policy), random.random() < 0.3
    put_all(rules, resolved, form, edit)
    if form is Form.NFT:
        rules.put_chain(chain)
    return bool(complaints(rules, resolved, form, [attempt(random, resolved.policy) for _ in range(PACKETS)]))


@pytest.mark.parametrize("fault", [name for name in IPTABLES if "rejection" not in name and "rejects" not in name])
def test_a_fault_in_both_tables_is_found(fault: str) -> None:
    assert any(is_found(seed, Form.NFT, IPTABLES[fault]) for seed in WITHIN)


@pytest.mark.parametrize("fault", MARKS)
def test_a_fault_of_marks_is_found(fault: str) -> None:
    assert any(is_found(seed, form, MARKS[fault]) for form in (Form.NFT, Form.MANGLE) for seed in WITHIN)


@pytest.mark.parametrize("fault", CHAIN)
def test_a_fault_in_the_chain_of_nft_is_found(fault: str) -> None:
    assert any(is_found(seed, Form.NFT, unchanged, CHAIN[fault]) for seed in WITHIN)


@pytest.mark.parametrize("fault", FILTERS)
def test_a_fault_of_filters_is_found(fault: str) -> None:
    def is_found(seed: int) -> bool:
        random, rules = Random(seed), Output()
        resolved, form = with_filters(random), random.choice(WITH_FILTERS)
        attempts = [attempt(random, resolved.policy) for _ in range(PACKETS)]
        if form is Form.NFT:
            rules.put_chain()
        put_all(rules, resolved, form, FILTERS[fault])
        if gains(random, rules, resolved, form, attempts):
            return True
        rules.inherited = None
        rules.nat, rules.nat_first = nat(random, resolved.policy), random.random() < 0.5
        return bool(complaints(rules, resolved, form, attempts))

    assert any(map(is_found, WITHIN))
