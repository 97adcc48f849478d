# SPDX-License-Identifier: Apache-2.0
"""Which filters differ between two policies, and by which of them a request passes that did not before. Pure.

The first filter that names a caller decides. So a filter also opens by its place, by who is named in those before it,
and by its end where the lock lets everyone through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from imds_guard.policy.difference_pairs import Pairs
from imds_guard.policy.difference_rules import pass_more
from imds_guard.policy.filters import Filter, Target, targets_of
from imds_guard.policy.model import Endpoint, Identities, Lock, Network, Policy, Verdict
from imds_guard.policy.ports import has_port


class FilterChanges(NamedTuple):
    """Names of filters."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    opening: tuple[str, ...] = ()
    """Those of the three before by which something passes that did not. A user or group that no filter named there
    before, and that one names now, was asked for: that is none."""


def filter_changes(before: Policy | None, after: Policy | None, pairs: Pairs) -> FilterChanges:
    """What differs. ``pairs`` are those of pairs_of()."""
    old, new = _contents(before), _contents(after)
    moved: set[str] = set()
    opening: set[str] = set()
    if before is not None and after is not None:
        for one, other, endpoints in _at_locks(before, after, pairs):
            moved |= {each.name for each in one.filters} ^ {each.name for each in other.filters}
            for names in _opening(one, other, endpoints):
                opening.add(_that_differs(names, old, new))
    changed = {name for name in old.keys() & new.keys() if old[name] != new[name]}
    changed |= (moved | opening) & old.keys() & new.keys()
    return FilterChanges(
        tuple(name for name in new if name not in old),
        tuple(name for name in old if name not in new),
        tuple(name for name in new if name in changed),
        tuple(name for name in {**new, **old} if name in opening),
    )


_Contents = dict[str, tuple[object, ...]]


def _contents(policy: Policy | None) -> _Contents:
    """What counts of each filter: its place, what it serves and for whom. Not the names of its locks."""
    if policy is None:
        return {}
    return {
        one.name: (number, targets_of(one, policy.locks), one._replace(locks=()))
        for number, one in enumerate(policy.filters)
    }


def _that_differs(names: tuple[str, ...], old: _Contents, new: _Contents) -> str:
    """Of the filters before and after, in the order in which they are to be named, the first that is not as it was."""
    return next((name for name in names if old.get(name) != new.get(name)), names[0])


# --- one lock before, and one after, that decide for the same endpoints ---------------------------------------------


class _AtLock(NamedTuple):
    """The filters of one policy at a lock, in the order in which they are asked."""

    lock: Lock
    filters: tuple[Filter, ...]
    containers: Verdict

    @property
    def lets_others_in(self) -> bool:
        """True for callers that no filter names."""
        return self.lock.default is Verdict.ALLOW

    @property
    def names_groups(self) -> bool:
        """True where callers with too many groups are denied."""
        return any(one.who.groups for one in self.filters)


def _at_locks(
    before: Policy, after: Policy, pairs: Pairs
) -> Iterator[tuple[_AtLock, _AtLock, dict[Network, Endpoint]]]:
    if not before.filters and not after.filters:
        return
    old, new = ({lock.name: _at_lock(policy, lock) for lock in policy.locks} for policy in (before, after))
    for (one, other), endpoints in pairs.items():
        if one is not None and other is not None and (old[one].filters or new[other].filters):
            yield old[one], new[other], endpoints


def _at_lock(policy: Policy, lock: Lock) -> _AtLock:
    return _AtLock(lock, tuple(one for one in policy.filters if lock.name in one.locks), policy.containers)


def _opening(old: _AtLock, new: _AtLock, endpoints: dict[Network, Endpoint]) -> Iterator[tuple[str, ...]]:
    """For each way in which something passes that did not: the filters by which, the one to be named first."""
    served = {id(one): _served(one, each.lock, endpoints) for each in (old, new) for one in each.filters}
    moves = _moves(old.filters, new.filters)
    for j, now in enumerate((*new.filters, None)):
        for i, was in enumerate((*old.filters, None)):
            if (was or now) and _opens(old, new, was, now, served) and _can_move(old, new, (i, j), moves):
                yield tuple(one.name for one in (now, was) if one is not None)
    if old.names_groups and not new.names_groups and (new.filters or new.lets_others_in):
        yield from ((one.name,) for one in old.filters if one.who.groups)


def _served(one: Filter, lock: Lock, endpoints: dict[Network, Endpoint]) -> set[Target]:
    """What a filter serves of these endpoints."""
    own = targets_of(one, (lock,))
    single = {endpoint.network.network_address: endpoint for endpoint in endpoints.values() if _is_single(endpoint)}
    return {to for to in own if to.address in single and has_port(single[to.address].tcp, to.port)}


def _is_single(endpoint: Endpoint) -> bool:
    return endpoint.network.prefixlen == endpoint.network.max_prefixlen


def _opens(old: _AtLock, new: _AtLock, was: Filter | None, now: Filter | None, served: dict[int, set[Target]]) -> bool:
    """Whether something passes for a caller of the filter ``was`` that is one of ``now``. None: no filter names it."""
    if now is None:
        return new.lets_others_in
    if was is None:
        return now.everyone and bool(served[id(now)]) and not old.lets_others_in
    if served[id(now)] - served[id(was)]:
        return True
    if was.everyone and not now.everyone and served[id(now)] and new.containers is Verdict.ALLOW:
        return True  # "everyone" is no one of another user namespace: reason USER_NAMESPACE of decide()
    return bool(served[id(now)]) and pass_more(was.rules, now.rules)


# --- who can be a caller of one filter before, and of another one after -----------------------------------------------

_Move = tuple[int, int]
"""The places of the first filter that names somebody, before and after; one behind the last where none does."""


class _Moves(NamedTuple):
    """Those of all users and groups that are named. There may be 100,000 of them, and there are few moves."""

    users: frozenset[_Move]
    groups: frozenset[_Move]


def _moves(old: Sequence[Filter], new: Sequence[Filter]) -> _Moves:
    found = []
    for kind in Identities._fields:
        before, after = ({one: at for at, one in _places(filters, kind)} for filters in (old, new))
        named = before.keys() | after.keys()
        found.append(frozenset((before.get(one, len(old)), after.get(one, len(new))) for one in named))
    return _Moves(*found)


def _places(filters: Sequence[Filter], kind: str) -> Iterator[tuple[int, int]]:
    """The place of a filter with each ID that it names, from the last to the first."""
    for place in reversed(range(len(filters))):
        yield from ((place, one) for one in getattr(filters[place].who, kind))


def _can_move(old: _AtLock, new: _AtLock, move: _Move, moves: _Moves) -> bool:
    """Whether there is a caller for whom these two filters are the first."""
    if any(one.everyone for one in (*old.filters[: move[0]], *new.filters[: move[1]])):
        return False
    # One entry makes it a caller of the filter before, one of the filter after, and no entry one of an earlier filter.
    users, groups = (
        [{(one[side] == move[side]) and one[1 - side] >= move[1 - side] for one in kind} for side in (0, 1)]
        for kind in moves
    )
    sides = [side for side, each in ((0, old), (1, new)) if _names(each.filters, move[side])]
    by_user, by_group = ([True in kind[side] for side in sides] for kind in (users, groups))
    if not all(one or other for one, other in zip(by_user, by_group)):
        return False
    # A caller has one user ID, and any number of groups.
    return len(sides) < 2 or any(by_group) or move in moves.users


def _names(filters: Sequence[Filter], place: int) -> bool:
    """False for "everyone", and behind the last filter: there a caller needs no entry."""
    return place < len(filters) and not filters[place].everyone
