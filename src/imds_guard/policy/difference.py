# SPDX-License-Identifier: Apache-2.0
"""What differs between the policy in force and a new one, as those see it who connect. Pure.

Locks are compared by the endpoints that they decide for, and not by their names: ``allow --ip`` splits a lock, and that
alone changes nobody's rights. policy/difference_text.py has the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from imds_guard.policy.decide import MAX_SEARCHED_GROUPS
from imds_guard.policy.difference_filters import filter_changes
from imds_guard.policy.difference_pairs import Endpoints, Pair, Pairs, endpoints_at, pairs_of
from imds_guard.policy.emergency import is_emergency
from imds_guard.policy.model import NOBODY, Identities, Lock, Policy, Verdict


class ListChange(NamedTuple):
    """Users and groups that were put on one kind of list, or taken off it."""

    kind: str
    """``allow`` or ``deny``."""
    added: bool
    """False: taken off."""
    who: Identities
    endpoints: Endpoints | None
    """Where. None where it is so at every locked endpoint now, and was so nowhere before (or is so nowhere now)."""


class OthersChange(NamedTuple):
    """Endpoints where another default holds for callers that no list names."""

    before: Verdict
    after: Verdict
    endpoints: Endpoints


class Setting(NamedTuple):
    """A value for the whole policy."""

    name: str
    """``mode``, ``containers``, ``strict``, ``forwarded``; ``filter account``: the user ID of the filters' service.

    That user may connect to what the filters serve."""
    before: str
    after: str

    @property
    def weaker(self) -> bool:
        """True where something is not denied that was."""
        return self.name == "filter account" or self.after in ("audit", "allow", "off", "leave")


class Difference(NamedTuple):
    """Empty (false) where nothing differs."""

    locked: Endpoints = ()
    """Nobody locked these before."""
    unlocked: Endpoints = ()
    lists: tuple[ListChange, ...] = ()
    others: tuple[OthersChange, ...] = ()
    settings: tuple[Setting, ...] = ()
    filters_added: tuple[str, ...] = ()
    filters_removed: tuple[str, ...] = ()
    filters_changed: tuple[str, ...] = ()
    filters_opening: tuple[str, ...] = ()
    """Those of the three before by which something passes that did not."""
    many_groups: Endpoints = ()
    """Where callers with more groups than a backend searches are not denied any more."""
    emergency_ends: bool = False
    """The policy before was the emergency lock: another one is what everybody waits for."""

    def __bool__(self) -> bool:
        return any(self[:-1])

    @property
    def opening(self) -> Difference:
        """The part by which something passes that did not. A user or group that somebody has put on a list is not."""
        return Difference(
            unlocked=self.unlocked,
            lists=tuple(one for one in self.lists if one.kind == "deny" and not one.added),
            others=tuple(one for one in self.others if one.after is Verdict.ALLOW),
            settings=tuple(one for one in self.settings if one.weaker),
            filters_added=self._opening(self.filters_added),
            filters_removed=self._opening(self.filters_removed),
            filters_changed=self._opening(self.filters_changed),
            many_groups=self.many_groups,
        )

    def _opening(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if name in self.filters_opening)

    @property
    def taking(self) -> Difference:
        """The part by which somebody who could pass may not any more. An endpoint that was not locked is not."""
        return Difference(
            lists=tuple(one for one in self.lists if one.added == (one.kind == "deny")),
            others=tuple(one for one in self.others if one.after is Verdict.DENY),
            settings=tuple(one for one in self.settings if not one.weaker and one.name in ("mode", "containers")),
            filters_removed=self.filters_removed,
        )


def difference(
    before: Policy | None, after: Policy | None, forwarded: tuple[str | None, str | None] = (None, None)
) -> Difference:
    """What differs. None is "nothing is in force". ``forwarded``: ``drop`` or ``leave``, before and after."""
    pairs = pairs_of(before, after)
    filters = filter_changes(before, after, pairs)
    old, new = _by_name(before), _by_name(after)
    return Difference(
        locked=endpoints_at(pairs, (key for key in pairs if key[0] is None)),
        unlocked=endpoints_at(pairs, (key for key in pairs if key[1] is None)),
        lists=tuple(_lists(pairs, new, old)),
        others=tuple(_others(pairs, old, new)),
        settings=tuple(_settings(before, after, forwarded)) if before and after else (),
        filters_added=filters.added,
        filters_removed=filters.removed,
        filters_changed=filters.changed,
        filters_opening=filters.opening,
        many_groups=endpoints_at(pairs, (key for key in pairs if _searches_again(key, old, new))),
        emergency_ends=before is not None and is_emergency(before) and not (after and is_emergency(after)),
    )


def _by_name(policy: Policy | None) -> dict[str, Lock]:
    return {lock.name: lock for lock in policy.locks} if policy is not None else {}


# --- who may, and who may not ---------------------------------------------------------------------------------------

_Entry = tuple[str, bool, str, int]
"""(allow or deny, whether it was added, users or groups, ID)."""
_Place = tuple[str, bool, tuple[Pair, ...], bool]
"""(allow or deny, whether it was added, where, whether it is so everywhere now)."""


def _lists(pairs: Pairs, after: Mapping[str, Lock], before: Mapping[str, Lock]) -> Iterator[ListChange]:
    """Entries that changed at the same endpoints are one ListChange."""
    where: dict[_Entry, list[Pair]] = {}
    for old, new in pairs:
        if new is not None:
            lists_before = before[old] if old is not None else None
            for entry in _changed(lists_before, after[new]):
                where.setdefault(entry, []).append((old, new))
    grouped: dict[_Place, dict[str, set[int]]] = {}
    for (kind, added, what, number), keys in where.items():
        everywhere = all(_has(lock, kind, what, number) == added for lock in after.values())
        if added and everywhere:  # somewhere it was so before: then it is new at some endpoints only
            everywhere = not any(_has(lock, kind, what, number) for lock in before.values())
        who = grouped.setdefault((kind, added, tuple(keys), everywhere), {"users": set(), "groups": set()})
        who[what].add(number)
    for place, who in sorted(grouped.items(), key=lambda item: _order(item[0])):
        kind, added, keys_of, everywhere = place
        identities = Identities(frozenset(who["users"]), frozenset(who["groups"]))
        yield ListChange(kind, added, identities, None if everywhere else endpoints_at(pairs, keys_of))


def _order(key: _Place) -> tuple[str, bool, bool, list[tuple[str, str]]]:
    kind, added, pairs, everywhere = key
    return kind, not added, not everywhere, [(one or "", other or "") for one, other in pairs]


def _changed(before: Lock | None, after: Lock) -> Iterator[_Entry]:
    for kind in ("allow", "deny"):
        old: Identities = getattr(before, kind) if before is not None else NOBODY
        new: Identities = getattr(after, kind)
        for what in Identities._fields:
            was, now = getattr(old, what), getattr(new, what)
            if was != now:
                yield from ((kind, True, what, number) for number in now - was)
                yield from ((kind, False, what, number) for number in was - now)


def _has(lock: Lock, kind: str, what: str, number: int) -> bool:
    return number in getattr(getattr(lock, kind), what)


def _others(pairs: Pairs, before: Mapping[str, Lock], after: Mapping[str, Lock]) -> Iterator[OthersChange]:
    for old, new in ((Verdict.DENY, Verdict.ALLOW), (Verdict.ALLOW, Verdict.DENY)):
        keys = [
            (one, other)
            for one, other in pairs
            if one is not None and other is not None and (before[one].default, after[other].default) == (old, new)
        ]
        if keys:
            yield OthersChange(old, new, endpoints_at(pairs, keys))


def _searches_again(pair: Pair, before: Mapping[str, Lock], after: Mapping[str, Lock]) -> bool:
    """Whether callers with many groups were denied for that, and now may pass: TOO_MANY_GROUPS of decide()."""
    if pair[0] is None or pair[1] is None:
        return False
    return len(before[pair[0]].listed_groups) > MAX_SEARCHED_GROUPS >= len(after[pair[1]].listed_groups)


# --- the rest -------------------------------------------------------------------------------------------------------


def _settings(before: Policy, after: Policy, forwarded: tuple[str | None, str | None]) -> Iterator[Setting]:
    values = (
        ("mode", before.mode.value, after.mode.value),
        ("containers", before.containers.value, after.containers.value),
        ("strict", _switch(before.strict), _switch(after.strict)),
        ("forwarded", *forwarded),
        *([("filter account", _account(before), _account(after))] if before.filters and after.filters else []),
    )
    for name, old, new in values:
        if old is not None and new is not None and old != new:
            yield Setting(name, old, new)


def _account(policy: Policy) -> str:
    return "none" if policy.filter_uid is None else str(policy.filter_uid)


def _switch(on: bool) -> str:
    return "on" if on else "off"
