# SPDX-License-Identifier: Apache-2.0
"""The comparison finds faults: each of these, planted in the rules, makes some packet end otherwise."""

from __future__ import annotations

from random import Random

import pytest

from imds_guard.backends.iptables.render import ResolvedPolicy
from imds_guard.export import export
from tests import generate
from tests.rules.compare import (
    apply,
    apply_forwarded,
    attempt,
    by_iptables,
    by_mangle,
    by_nft,
    by_own_tables,
    new_filters,
    new_mangles,
    nft_forwarded,
)
from tests.rules.edits import FORWARD, IPTABLES, NFT, NFT_FORWARD
from tests.rules.forwarded import packet
from tests.rules.nft import Ruleset
from tests.rules.packets import BadRules

WITHIN = range(120)
"""Seeds of policies: as many as test_rules.py compares."""
PACKETS = 80


@pytest.mark.parametrize("fault", IPTABLES)
def test_a_fault_in_iptables_rules_is_found(fault: str) -> None:
    def is_found(seed: int) -> bool:
        random, filters = Random(seed), new_filters()
        policy = generate.policy(random, strict=False)
        apply(filters, ResolvedPolicy(policy), IPTABLES[fault])
        attempts = [attempt(random, policy) for _ in range(PACKETS)]
        return bool(by_iptables(filters, ResolvedPolicy(policy), attempts))

    assert any(map(is_found, WITHIN))


@pytest.mark.parametrize("fault", FORWARD)
def test_a_fault_in_mangle_forward_is_found(fault: str) -> None:
    def is_found(seed: int) -> bool:
        random, tables, tracked = Random(seed), new_mangles(), seed % 2 == 0
        policy = generate.policy(random)
        try:
            apply_forwarded(tables, policy, tracked, FORWARD[fault])
            return bool(by_mangle(tables, policy, [packet(random, policy) for _ in range(PACKETS)], tracked))
        except BadRules:
            return True

    assert any(map(is_found, WITHIN))


@pytest.mark.parametrize("fault", NFT_FORWARD)
def test_a_fault_in_nft_rules_for_forwarded_packets_is_found(fault: str) -> None:
    def is_found(seed: int) -> bool:
        random, tracked = Random(seed), seed % 2 == 0
        policy = generate.policy(random)
        sent = [packet(random, policy) for _ in range(PACKETS)]
        try:
            return bool(by_own_tables(nft_forwarded(policy, tracked, NFT_FORWARD[fault]), policy, sent, tracked))
        except BadRules:
            return True

    assert any(map(is_found, WITHIN))


@pytest.mark.parametrize("fault", NFT)
def test_a_fault_in_exported_nft_rules_is_found(fault: str) -> None:
    def is_found(seed: int) -> bool:
        random = Random(seed)
        policy = generate.policy(random)
        rules = Ruleset(NFT[fault](export(policy, "nftables").text))
        return bool(by_nft(rules, policy, [attempt(random, policy) for _ in range(PACKETS)]))

    assert any(map(is_found, WITHIN))
