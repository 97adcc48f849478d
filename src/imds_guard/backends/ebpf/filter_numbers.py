# SPDX-License-Identifier: Apache-2.0
"""The numbers of targets and filters, which are part of the addresses of listeners (policy/filter_address.py). Pure.

A number keeps its meaning from one policy to the next, so that listeners and connections outlive a change that has
nothing to do with them. What changed gets a number that the policy before did not use. Where all are in use the digest
of a listener still tells the old meaning from the new one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeVar

from imds_guard.backends.ebpf import abi
from imds_guard.policy.filters import Filter, Target, targets
from imds_guard.policy.model import Policy


class Numbers(NamedTuple):
    """T of each target, and F of each filter by its name."""

    targets: Mapping[Target, int]
    filters: Mapping[str, int]


_T = TypeVar("_T")
NO_NUMBERS = Numbers({}, {})


class Numbered(NamedTuple):
    """The filters of a policy that was in force, and its numbers."""

    filters: tuple[Filter, ...] = ()
    numbers: Numbers = NO_NUMBERS


NOTHING = Numbered()


def assigned(policy: Policy, before: Numbered = NOTHING) -> Numbers:
    """The numbers for a policy. ``before`` is the one in force, whose numbers are kept for what is unchanged."""
    if not policy.filters:
        return NO_NUMBERS
    old_rules = {one.name: one.rules for one in before.filters}
    unchanged = [one.name for one in policy.filters if old_rules.get(one.name) == one.rules]
    kept = {name: before.numbers.filters[name] for name in unchanged if name in before.numbers.filters}
    names = [one.name for one in policy.filters]
    wanted = targets(policy)
    kept_targets = {one: before.numbers.targets[one] for one in wanted if one in before.numbers.targets}
    return Numbers(
        _completed(wanted, kept_targets, set(before.numbers.targets.values()), abi.TARGETS),
        _completed(names, kept, set(before.numbers.filters.values()), abi.NUMBERS),
    )


def _completed(
    wanted: Collection[_T], kept: Mapping[_T, int], used_before: Collection[int], last: int
) -> dict[_T, int]:
    """A number from 1 to ``last`` for each: those of ``kept``, then ones that were not used before, then any."""
    taken = set(kept.values())
    fresh = [number for number in range(1, last + 1) if number not in used_before]
    again = [number for number in range(1, last + 1) if number in used_before and number not in taken]
    free = iter((*fresh, *again))
    return {one: kept[one] if one in kept else next(free) for one in wanted}
