# SPDX-License-Identifier: Apache-2.0
"""The rules of iptables as they are written do with every packet what ``decide()`` says.

IMDS_GUARD_RULES is the number of policies of each test (default: 120), IMDS_GUARD_SEED the first seed.
"""

from __future__ import annotations

import os
from random import Random

import pytest

from imds_guard.backends.iptables.render import ResolvedPolicy, require_supported
from imds_guard.errors import Unsupported
from imds_guard.policy.model import Policy
from tests import generate
from tests.rules.compare import apply, attempt, by_iptables, members, new_filters

POLICIES = int(os.environ.get("IMDS_GUARD_RULES", "120"))
FIRST_SEED = int(os.environ.get("IMDS_GUARD_SEED", "1"))
PACKETS = 80
IN_A_ROW = 4
"""Policies that are put in force one after the other in the same tables."""


def supported(random: Random) -> tuple[Policy, bool]:
    """A policy that the backend takes, and whether it was refused as strict first."""
    policy = generate.policy(random)
    if not policy.strict:
        require_supported(policy)
        return policy, False
    with pytest.raises(Unsupported, match="strict"):
        require_supported(policy)
    return policy._replace(strict=False), True


def test_rules_do_what_decide_says() -> None:
    wrong: list[str] = []
    refused = 0
    for seed in range(FIRST_SEED, FIRST_SEED + POLICIES, IN_A_ROW):
        random, filters = Random(seed), new_filters()
        for _ in range(IN_A_ROW):
            policy, strict = supported(random)
            refused += strict
            resolved = ResolvedPolicy(policy, members(random, policy))
            apply(filters, resolved)
            found = by_iptables(filters, resolved, [attempt(random, policy) for _ in range(PACKETS)])
            repeat = f"IMDS_GUARD_SEED={seed} IMDS_GUARD_RULES=1 ./run test tests/rules/test_iptables.py  # "
            wrong += [repeat + line for line in found]
    assert wrong == []
    assert refused > 0 or POLICIES < 50
