# SPDX-License-Identifier: Apache-2.0
"""What differs between the policy in force and a new one, as those see it who connect. Pure.

Locks are compared by the endpoints that they decide for, and not by their names: ``allow --ip`` splits a lock, and that
alone changes nobody's rights. policy/difference_text.py has the words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from imds_guard.policy.emergency import is_emergency
from imds_guard.policy.filters import Filter, targets_of
from imds_guard.policy.lock_index import LockIndex
from imds_guard.policy.model import NOBODY, Endpoint, Identities, Lock, Network, Policy, Protocol, Verdict
from imds_guard.policy.ports import Ports, common_ports, normal_ports

Endpoints = tuple[Endpoint, ...]


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
    """``mode``, ``containers``, ``strict``, ``forwarded``; ``filter account``: the user ID of the filters' service."""
    before: str
    after: str

    @property
    def weaker(self) -> bool:
        """True where less is denied than before."""
        return self.after in ("audit", "allow", "off", "leave")


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
    filters_weaker: tuple[str, ...] = ()
    """Those of ``filters_changed`` that refuse less than before."""
    emergency_ends: bool = False
    """The policy before was the emergency lock: another one is what everybody waits for."""

    def __bool__(self) -> bool:
        return any(self[:-1])

    @property
    def opening(self) -> Difference:
        """The part by which less is locked than before. An entry on an allow list that somebody asked for is not."""
        return Difference(
            unlocked=self.unlocked,
            lists=tuple(one for one in self.lists if one.kind == "deny" and not one.added),
            others=tuple(one for one in self.others if one.after is Verdict.ALLOW),
            settings=tuple(one for one in self.settings if one.weaker),
            filters_changed=self.filters_weaker,
        )

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
    pairs = _pairs(before, after)
    added, removed, changed = _filters(before, after)
    return Difference(
        locked=_at(pairs, (key for key in pairs if key[0] is None)),
        unlocked=_at(pairs, (key for key in pairs if key[1] is None)),
        lists=tuple(_lists(pairs, {lock.name: lock for lock in (after.locks if after else ())}, _by_name(before))),
        others=tuple(_others(pairs, _by_name(before), _by_name(after))),
        settings=tuple(_settings(before, after, forwarded)) if before and after else (),
        filters_added=added,
        filters_removed=removed,
        filters_changed=changed,
        filters_weaker=tuple(_weaker_filters(before, after)),
        emergency_ends=before is not None and is_emergency(before) and not (after and is_emergency(after)),
    )


def _by_name(policy: Policy | None) -> dict[str, Lock]:
    return {lock.name: lock for lock in policy.locks} if policy is not None else {}


# --- which lock decided for an endpoint, and which one decides now ----------------------------------------------------

_Pair = tuple["str | None", "str | None"]
"""The names of the lock before and the lock after; None where nothing was locked."""
_Pairs = dict[_Pair, dict[Network, Endpoint]]


def _pairs(before: Policy | None, after: Policy | None) -> _Pairs:
    """Every port of every prefix in either policy, by the two locks that decide for it."""
    old, new = LockIndex(before), LockIndex(after)
    found: _Pairs = {}
    for network in sorted({*old.networks, *new.networks}, key=lambda one: Endpoint(one).sort_key()):
        for protocol in Protocol:
            for one, one_ports, _ in old.deciding(network, protocol):
                for other, other_ports, _ in new.deciding(network, protocol):
                    ports = common_ports(one_ports, other_ports)
                    if ports and (one, other) != (None, None):
                        _add(found.setdefault((one, other), {}), network, protocol, ports)
    return found


def _add(endpoints: dict[Network, Endpoint], network: Network, protocol: Protocol, ports: Ports) -> None:
    known = endpoints.get(network, Endpoint(network))
    both = normal_ports((*known.ports(protocol), *ports))
    endpoints[network] = known._replace(tcp=both) if protocol is Protocol.TCP else known._replace(udp=both)


def _at(pairs: _Pairs, keys: Iterable[_Pair]) -> Endpoints:
    """The endpoints of several pairs, in order."""
    merged: dict[Network, Endpoint] = {}
    for key in keys:
        for network, endpoint in pairs[key].items():
            for protocol in Protocol:
                if endpoint.ports(protocol):
                    _add(merged, network, protocol, endpoint.ports(protocol))
    return tuple(sorted(merged.values(), key=Endpoint.sort_key))


# --- who may, and who may not ---------------------------------------------------------------------------------------

_Entry = tuple[str, bool, str, int]
"""(allow or deny, whether it was added, users or groups, ID)."""
_Place = tuple[str, bool, tuple[_Pair, ...], bool]
"""(allow or deny, whether it was added, where, whether it is so everywhere now)."""


def _lists(pairs: _Pairs, after: Mapping[str, Lock], before: Mapping[str, Lock]) -> Iterator[ListChange]:
    """Entries that changed at the same endpoints are one ListChange."""
    where: dict[_Entry, list[_Pair]] = {}
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
        yield ListChange(kind, added, identities, None if everywhere else _at(pairs, keys_of))


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


def _others(pairs: _Pairs, before: Mapping[str, Lock], after: Mapping[str, Lock]) -> Iterator[OthersChange]:
    for old, new in ((Verdict.DENY, Verdict.ALLOW), (Verdict.ALLOW, Verdict.DENY)):
        keys = [
            (one, other)
            for one, other in pairs
            if one is not None and other is not None and (before[one].default, after[other].default) == (old, new)
        ]
        if keys:
            yield OthersChange(old, new, _at(pairs, keys))


# --- the rest -------------------------------------------------------------------------------------------------------


def _settings(before: Policy, after: Policy, forwarded: tuple[str | None, str | None]) -> Iterator[Setting]:
    values = (
        ("mode", before.mode.value, after.mode.value),
        ("containers", before.containers.value, after.containers.value),
        ("strict", _switch(before.strict), _switch(after.strict)),
        ("forwarded", *forwarded),
        ("filter account", _account(before), _account(after)),
    )
    for name, old, new in values:
        if old is not None and new is not None and old != new:
            yield Setting(name, old, new)


def _account(policy: Policy) -> str | None:
    return None if policy.filter_uid is None else str(policy.filter_uid)


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _filters(before: Policy | None, after: Policy | None) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The names of filters that are new, gone and changed."""
    old, new = _filters_by_name(before), _filters_by_name(after)
    changed = [name for name in new if name in old and old[name] != new[name]]
    return tuple(n for n in new if n not in old), tuple(n for n in old if n not in new), tuple(changed)


def _weaker_filters(before: Policy | None, after: Policy | None) -> Iterator[str]:
    """The names of filters that lost a restriction. An entry of ``allow`` that somebody asked for is none."""
    old = {one.name: one for one in (before.filters if before else ())}
    for one in after.filters if after else ():
        if one.name in old and _lost_restriction(old[one.name], one):
            yield one.name


def _lost_restriction(before: Filter, after: Filter) -> bool:
    old, new = before.rules, after.rules
    return (
        after.everyone > before.everyone
        or new.audit > old.audit
        or new.require_imdsv2 < old.require_imdsv2
        or not set(new.deny) >= set(old.deny)
        or not set(new.sets) >= set(old.sets)  # they deny, too
        or (old.headers is not None and (new.headers != old.headers or new.user_agents != old.user_agents))
    )


def _filters_by_name(policy: Policy | None) -> dict[str, tuple[object, ...]]:
    """What counts of each filter: its place, what it serves and for whom. Not the names of its locks."""
    if policy is None:
        return {}
    return {one.name: _content(number, one, policy) for number, one in enumerate(policy.filters)}


def _content(number: int, one: Filter, policy: Policy) -> tuple[object, ...]:
    return number, targets_of(one, policy.locks), one._replace(locks=())
