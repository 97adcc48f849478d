# SPDX-License-Identifier: Apache-2.0
"""The records of the lists of one generation: who may pass, who may not, who goes to which filter. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.filter_records import filter_bit
from imds_guard.backends.ebpf.image import Items, ListKey
from imds_guard.policy.model import Identities, Lock, Policy, Verdict


def list_key(policy: Policy, lock: Lock) -> ListKey:
    """The lists of a lock."""
    filters = tuple(index for index, one in enumerate(policy.filters) if lock.name in one.locks)
    return lock.allow, lock.deny, lock.default, filters


def number_lists(policy: Policy) -> dict[ListKey, int]:
    """A number for each different set of lists: locks with the same lists share them."""
    numbers: dict[ListKey, int] = {}
    for lock in policy.locks:
        numbers.setdefault(list_key(policy, lock), len(numbers))
    return numbers


def list_items(policy: Policy, generation: int, lists: Mapping[ListKey, int]) -> dict[Map, Items]:
    """The records of Map.LISTS, Map.MEMBERS and Map.GROUPS."""
    return {
        Map.LISTS: tuple((abi.list_key(generation, number), _record(policy, key)) for key, number in lists.items()),
        Map.MEMBERS: tuple(item for key, number in lists.items() for item in _members(policy, generation, number, key)),
        Map.GROUPS: tuple(item for key, number in lists.items() for item in _groups(generation, number, key)),
    }


def users_of(policy: Policy, key: ListKey) -> frozenset[int]:
    """All users that have a record in Map.MEMBERS."""
    return frozenset().union(*(ids.users for _, ids in _lists(policy, key)))


def groups_of(policy: Policy, key: ListKey) -> frozenset[int]:
    """All groups that have a record in Map.MEMBERS."""
    return frozenset().union(*(ids.groups for _, ids in _lists(policy, key)))


def _lists(policy: Policy, key: ListKey) -> list[tuple[int, Identities]]:
    """The lists of a lock: the bit that their members have, and the members."""
    allow, deny, _, filters = key
    lists = [(abi.ALLOW, allow), (abi.DENY, deny)]
    lists += [(filter_bit(index), policy.filters[index].who) for index in filters]
    if filters and policy.filter_uid is not None:
        lists.append((abi.FILTER_ACCOUNT, Identities(frozenset((policy.filter_uid,)))))
    return lists


def _record(policy: Policy, key: ListKey) -> bytes:
    allow, deny, default, filters = key
    groups = groups_of(policy, key)
    flags = abi.LIST_VALID | abi.LIST_DEFAULT_ALLOW * (default is Verdict.ALLOW)
    flags |= abi.LIST_GROUPS * bool(groups) | abi.LIST_DENY_GROUPS * bool(deny.groups)
    flags |= abi.LIST_USERS * any(ids.users for _, ids in _lists(policy, key))
    flags |= abi.LIST_SMALL * (len(allow.groups | deny.groups) <= abi.MAX_SEARCHED_GROUPS)
    flags |= abi.LIST_FILTER_GROUPS * any(policy.filters[index].who.groups for index in filters)
    bitmap = [0] * abi.GID_BITMAP_WORDS
    for gid in groups:
        bitmap[gid >> 5 & abi.GID_BITMAP_WORDS - 1] |= 1 << (gid & 31)
    everyone = sum(filter_bit(index) for index in filters if policy.filters[index].everyone)
    return abi.LIST.pack(flags, 0, *bitmap, everyone)


def _members(policy: Policy, generation: int, number: int, key: ListKey) -> list[tuple[bytes, bytes]]:
    items = []
    for kind, of in ((abi.USER, 0), (abi.GROUP, 1)):
        lists = [(bit, ids[of]) for bit, ids in _lists(policy, key) if ids[of]]
        for identity in frozenset().union(*(ids for _, ids in lists)):
            verdict = sum(bit for bit, ids in lists if identity in ids)
            items.append((abi.MEMBER.pack(generation, kind, number, identity), abi.MEMBER_VALUE.pack(verdict)))
    return items


def _groups(generation: int, number: int, key: ListKey) -> list[tuple[bytes, bytes]]:
    """The listed groups in order, denied ones first. Only for lists that are short enough to be searched.

    Groups of filters are not among them: they are not searched.
    """
    allow, deny, _, filters = key
    ordered = sorted(deny.groups) + sorted(allow.groups - deny.groups)
    if not (ordered or filters) or len(ordered) > abi.MAX_SEARCHED_GROUPS:
        return []
    padded = ordered + [0] * (abi.MAX_SEARCHED_GROUPS - len(ordered))
    return [(abi.SMALL_KEY.pack(generation, number), abi.GROUPS.pack(len(deny.groups), len(ordered), *padded))]
