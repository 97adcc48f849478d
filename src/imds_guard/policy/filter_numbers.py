# SPDX-License-Identifier: Apache-2.0
"""The numbers of targets and filters, which are part of the addresses of listeners (filter_address.py). Pure.

A number keeps its meaning from one policy to the next, so that listeners and connections outlive a change that has
nothing to do with them. What changed gets a number that the policy before did not use.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeVar

from imds_guard.errors import Unsupported
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.filter_text import digest
from imds_guard.policy.filters import MAX_TARGETS, Filter, Target, targets, targets_of
from imds_guard.policy.model import Policy

MAX_NUMBER = 254
"""Of a filter. 127.169.T.255 would be a broadcast address where somebody gives lo a prefix of 24 bits."""


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
    """The numbers for a policy. ``before`` is the one in force, whose numbers are kept for what is unchanged.

    Where all numbers are in use a number gets a new meaning. The digest of a listener still tells it from the old one.
    """
    return _assigned(policy, before, None)


def assigned_afresh(policy: Policy, before: Numbered, listening: Collection[tuple[int, int]]) -> Numbers:
    """As assigned(), where nothing but the numbers tells what a listener serves: no number gets a new meaning.

    ``listening`` has T and F of every place where somebody listens now: these numbers are not free either. Raises
    Unsupported when none is left.
    """
    return _assigned(policy, before, listening)


def _assigned(policy: Policy, before: Numbered, listening: Collection[tuple[int, int]] | None) -> Numbers:
    if not policy.filters:
        return NO_NUMBERS
    old_rules = {one.name: one.rules for one in before.filters}
    unchanged = [one.name for one in policy.filters if old_rules.get(one.name) == one.rules]
    kept = {name: before.numbers.filters[name] for name in unchanged if name in before.numbers.filters}
    wanted = targets(policy)
    kept_targets = {one: before.numbers.targets[one] for one in wanted if one in before.numbers.targets}
    rows = None if listening is None else {row for row, _ in listening}
    columns = None if listening is None else {column for _, column in listening}
    return Numbers(
        _completed(wanted, kept_targets, set(before.numbers.targets.values()), MAX_TARGETS, rows),
        _completed(
            [one.name for one in policy.filters], kept, set(before.numbers.filters.values()), MAX_NUMBER, columns
        ),
    )


def _completed(
    wanted: Collection[_T],
    kept: Mapping[_T, int],
    used_before: Collection[int],
    last: int,
    listening: Collection[int] | None,
) -> dict[_T, int]:
    """A number from 1 to ``last`` for each: those of ``kept``, then ones that were not used before, then any.

    With ``listening`` none of these, and none that was used before.
    """
    taken = set(kept.values())
    fresh = [number for number in range(1, last + 1) if number not in used_before and number not in (listening or ())]
    again = [number for number in range(1, last + 1) if number in used_before and number not in taken]
    free = iter(fresh if listening is not None else (*fresh, *again))
    try:
        return {one: kept[one] if one in kept else next(free) for one in wanted}
    except StopIteration:
        raise Unsupported(
            "numbering the filters: every number is in use by the policy in force, or a process listens at its address "
            "(ss -ltnp sport = :169); change fewer filters at a time, or run imds-guard stop first"
        ) from None


def listeners_of(policy: Policy, numbers: Numbers) -> list[Listener]:
    """What has to listen for a policy: in the order of its filters, then of the targets."""
    return [
        Listener(target, one.name, digest(target, one.rules), numbers.targets[target], numbers.filters[one.name])
        for one in policy.filters
        for target in targets_of(one, policy.locks)
    ]
