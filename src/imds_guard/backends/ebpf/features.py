# SPDX-License-Identifier: Apache-2.0
"""Features: code of the hooks that only some policies need. The programs of other policies are compiled without it.

What a program has is read from the kernel: it uses the maps that its code names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Callable, NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.hooks import Hook
from imds_guard.policy.model import Policy


class Feature(NamedTuple):
    """One feature. ``uses``: the map that programs with its code use, and no others."""

    name: str
    define: str
    uses: Map
    is_in: Callable[[Policy], bool]


FILTERS = Feature("filters", "IG_FEATURE_FILTERS", Map.FILTERS, lambda policy: bool(policy.filters))
FEATURES = (FILTERS,)


def needed_features(policy: Policy | None) -> frozenset[Feature]:
    """The features that a policy needs. None: one that can't be read."""
    return frozenset(feature for feature in FEATURES if policy is not None and feature.is_in(policy))


def loaded_features(found: Iterable[Hook], map_id: Callable[[Map], int]) -> frozenset[Feature]:
    """The features that some program of ours has. ``map_id``: the kernel's ID of a map of the guard."""
    used = {identity for hook in found if hook.ours is not None for identity in hook.ours.map_ids}
    return frozenset(feature for feature in FEATURES if map_id(feature.uses) in used)


def lacks(hook: Hook, needed: Collection[Feature], map_id: Callable[[Map], int]) -> list[str]:
    """The names of the features that our program at this hook should have, and does not."""
    if hook.ours is None or hook.name in abi.INDIFFERENT:  # these are the same for all features
        return []
    return sorted(feature.name for feature in needed if map_id(feature.uses) not in hook.ours.map_ids)


def names_of(features: Collection[Feature]) -> str:
    """Their names, for a message."""
    return ", ".join(sorted(feature.name for feature in features))


def defines_of(features: Collection[Feature]) -> tuple[tuple[str, int], ...]:
    """The macros for the compiler."""
    return tuple((feature.define, 1) for feature in FEATURES if feature in features)
