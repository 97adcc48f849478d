# SPDX-License-Identifier: Apache-2.0
"""How a lock's endpoints are written: by the names of presets where they are theirs, so that they stay presets.

The endpoints of a preset differ by version and by machine: who said ``preset = "default"`` did not mean ten addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from imds_guard.errors import BadPolicy
from imds_guard.kernel.dmi import dmi_text
from imds_guard.policy.builtin import ALL_PRESET, DEFAULT_PRESET, preset_endpoints
from imds_guard.policy.model import Endpoint, Lock, make_policy
from imds_guard.policy.wireserver import split_off_wireserver

Presets = Mapping["tuple[str, ...]", "tuple[Endpoint, ...]"]
"""Names of presets, and the endpoints that they mean together on this machine. The first that fit are taken."""
NO_PRESETS: Presets = {}


class Spelling(NamedTuple):
    """One table of a lock."""

    presets: tuple[str, ...]
    endpoints: tuple[Endpoint, ...]
    """Beside those of the presets."""
    locks: tuple[str, ...]
    """The names of the locks that the table means: two where it has the WireServer."""


def known_presets(given: Sequence[str] = ()) -> Presets:
    """``given`` first: the presets that somebody has named. Two addresses alone may be anything, so no others."""
    text = dmi_text()
    names = dict.fromkeys((tuple(dict.fromkeys(given)), (DEFAULT_PRESET,), (ALL_PRESET,)))
    return {some: tuple(one for name in some for one in preset_endpoints(name, text)) for some in names if some}


def spelling(lock: Lock, locks: Mapping[str, Lock], presets: Presets) -> Spelling:
    """How to write ``lock``, which is one of ``locks``. A table means just what these say, or it names no preset."""
    for names, endpoints in presets.items():
        more = tuple(one for one in lock.endpoints if one not in endpoints)
        meant = _locks_of(lock._replace(endpoints=(*endpoints, *more)))
        if meant.get(lock.name) == lock and all(locks.get(name) == one for name, one in meant.items()):
            return Spelling(names, more, tuple(meant))
    return Spelling((), lock.endpoints, (lock.name,))


def spellings(locks: Mapping[str, Lock], presets: Presets) -> dict[str, Spelling]:
    """The tables for these locks, by the name of the lock."""
    left, found = dict(locks), {}
    for named in (True, False):
        for name, lock in locks.items():
            one = spelling(lock, left, presets if named else NO_PRESETS)
            if name in left and (one.presets or not named):
                found[name] = one
                for taken in one.locks:
                    del left[taken]
    return {name: found[name] for name in locks if name in found}


def _locks_of(table: Lock) -> dict[str, Lock]:
    try:
        return {lock.name: lock for lock in make_policy(split_off_wireserver(table)).locks}
    except BadPolicy:
        return {}
