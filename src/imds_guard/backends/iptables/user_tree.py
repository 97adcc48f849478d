# SPDX-License-Identifier: Apache-2.0
"""Rules for many users of one list: a search tree of chains, so that a packet meets few of them. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from imds_guard.backends.iptables.rules import Rule

FAN_OUT = 4
"""Ranges in a leaf, and children of a node. With 1,000 ranges there are five levels, and a packet meets about 12 rules.

nft counts a goto as a level and takes 16 (NFT_JUMP_STACK_SIZE, nft_chain_validate() in Linux
net/netfilter/nf_tables_api.c); with OUTPUT and our own steps that leaves ten levels, a million ranges.
"""
FLAT = 8
"""Up to so many ranges are in the lock's own chain, without a tree."""

MEMBER = "member"
"""The comment of a rule for users that are there as members of a listed group."""

Users = tuple[int, int, str]
"""First and last user ID, and the comment: MEMBER or nothing."""


def user_rule(users: Users, hit: Rule) -> Rule:
    """The rule for some users."""
    return Rule(hit.target, hit.goto, uids=users[:2], comment=users[2])


def tree(chains: dict[str, list[Rule]], prefix: str, users: Sequence[Users], hit: Rule, miss: list[Rule]) -> str:
    """Adds a search tree: it leads a user ID to the one leaf that may list it. Returns the name of the root."""
    numbers = itertools.count()

    def node(part: Sequence[Users]) -> str:
        name = f"{prefix}{next(numbers)}"
        rules = chains[name] = []
        if len(part) <= FAN_OUT:
            rules += [user_rule(one, hit) for one in part] + miss
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
