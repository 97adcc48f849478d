# SPDX-License-Identifier: Apache-2.0
"""The records of one generation for a policy. Pure: nothing here touches the system."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.image import Image, ListKey
from imds_guard.errors import Unsupported
from imds_guard.policy.model import Lock, Network, Policy, Verdict
from imds_guard.policy.ports import minus_ports, normal_ports


class Range(NamedTuple):
    """struct ig_port_range. ``protocols`` are bits."""

    low: int
    high: int
    lock: int
    inherited: bool
    protocols: int


def require_fits(policy: Policy) -> None:
    """Raises Unsupported when the maps are too small for the policy."""
    if policy.filters:
        raise Unsupported("the program in the kernel does not know filters yet")
    _check_sizes(policy, _number_lists(policy), _endpoint_entries(policy))


def render(policy: Policy, generation: int) -> Image:
    """The records that make the hooks enforce ``policy``. Raises Unsupported when they would not fit."""
    lists = _number_lists(policy)
    endpoints = _endpoint_entries(policy)
    _check_sizes(policy, lists, endpoints)
    list_of_lock = [lists[_list_key(lock)] for lock in policy.locks]
    names = [lock.name.encode() for lock in policy.locks]
    return Image(
        generation,
        {
            Map.ADDRESS_BITMAP: ((abi.ARRAY_KEY.pack(generation), _address_bitmap(endpoints)),),
            Map.ENDPOINTS: tuple(
                (_endpoint_key(generation, network), _endpoint_value(ranges, list_of_lock))
                for network, ranges in endpoints.items()
            ),
            Map.LISTS: tuple((abi.list_key(generation, number), _list_record(key)) for key, number in lists.items()),
            Map.MEMBERS: tuple(item for key, number in lists.items() for item in _members(generation, number, key)),
            Map.GROUPS: tuple(item for key, number in lists.items() for item in _groups(generation, number, key)),
            Map.LOCKS: tuple(
                (abi.SMALL_KEY.pack(generation, number), abi.LOCK.pack(list_of_lock[number], 0, name))
                for number, name in enumerate(names)
            ),
        },
    )


def _list_key(lock: Lock) -> ListKey:
    return lock.allow, lock.deny, lock.default


def _number_lists(policy: Policy) -> dict[ListKey, int]:
    """A number for each different pair of lists: locks with the same lists share them."""
    numbers: dict[ListKey, int] = {}
    for lock in policy.locks:
        numbers.setdefault(_list_key(lock), len(numbers))
    return numbers


def _check_sizes(policy: Policy, lists: Mapping[ListKey, int], endpoints: Mapping[Network, list[Range]]) -> None:
    members = sum(len(a.users | d.users) + len(a.groups | d.groups) for a, d, _ in lists)
    for what, count, maximum in (
        ("locks", len(policy.locks), abi.LOCKS // 2),
        ("different allowlists", len(lists), abi.LISTS),
        ("users and groups", members, abi.MEMBERS // 2),
        ("endpoints", len(endpoints), abi.ENDPOINTS // 2),
    ):
        if count > maximum:
            raise Unsupported(f"loading the policy into eBPF maps: it has {count} {what}, and the maximum is {maximum}")
    for network, ranges in endpoints.items():
        if len(ranges) > abi.RANGES:
            raise Unsupported(
                f"loading the policy into eBPF maps: {network} has {len(ranges)} ranges of ports, those of the "
                f"prefixes around it included, and the maximum is {abi.RANGES}"
            )


# --- endpoints --------------------------------------------------------------------------------------------------------

_UNSPECIFIED = ipaddress.IPv4Network("0.0.0.0/32")
_MAPPED_SPACE = ipaddress.IPv4Network("0.0.0.0/0")
_MAPPED_MIDDLE = ipaddress.IPv6Address("::ffff:0:0")


def _endpoint_entries(policy: Policy) -> dict[Network, list[Range]]:
    """The ranges of each prefix, inherited ones included, and entries that no endpoint of the policy has."""
    own = _own_ranges(policy)
    entries = _inherit(own)
    if _MAPPED_SPACE not in entries and any(n.version == 6 and _MAPPED_MIDDLE in n for n in entries):
        entries[_MAPPED_SPACE] = []  # ::/0 must not lock IPv4, which is ::ffff:0:0/96 of the same trie
    anywhere = _locked_anywhere(own)
    if anywhere:
        entries[_UNSPECIFIED] = anywhere
    return entries


def _own_ranges(policy: Policy) -> dict[Network, list[Range]]:
    own: dict[Network, list[Range]] = {}
    for number, lock in enumerate(policy.locks):
        for endpoint in lock.endpoints:
            ranges = [Range(low, high, number, False, abi.TCP) for low, high in endpoint.tcp]
            ranges += [Range(low, high, number, False, abi.UDP) for low, high in endpoint.udp]
            own.setdefault(endpoint.network, []).extend(ranges)
    return own


def _inherit(own: Mapping[Network, list[Range]]) -> dict[Network, list[Range]]:
    """Adds to each prefix the ranges of the next shorter prefix around it, without the ports of its own ranges."""
    entries: dict[Network, list[Range]] = {}
    lengths = {version: sorted({n.prefixlen for n in own if n.version == version}, reverse=True) for version in (4, 6)}
    for network in sorted(own, key=lambda n: n.prefixlen):
        around = _next_shorter(network, entries, lengths[network.version])
        inherited = [] if around is None else _inherited(entries[around], own[network])
        entries[network] = _merge_protocols(own[network] + inherited)
    return entries


def _next_shorter(network: Network, entries: Mapping[Network, list[Range]], lengths: Iterable[int]) -> Network | None:
    """The longest prefix around a network. ``lengths`` are those of all prefixes, the longest first."""
    for length in lengths:
        if length < network.prefixlen:
            candidate = network.supernet(new_prefix=length)
            if candidate in entries:
                return candidate
    return None


def _inherited(ranges: Iterable[Range], own: Iterable[Range]) -> list[Range]:
    """``ranges`` marked as inherited, without the ports that ``own`` has for the same protocol."""
    rest = []
    for one in ranges:
        for protocol in (abi.TCP, abi.UDP):
            if one.protocols & protocol:
                taken = normal_ports((o.low, o.high) for o in own if o.protocols & protocol)
                rest += [
                    Range(low, high, one.lock, True, protocol)
                    for low, high in minus_ports(((one.low, one.high),), taken)
                ]
    return rest


def _merge_protocols(ranges: Iterable[Range]) -> list[Range]:
    """One range in place of a TCP and a UDP range that are otherwise the same."""
    protocols: dict[tuple[int, int, int, bool], int] = {}
    for one in ranges:
        key = (one.low, one.high, one.lock, one.inherited)
        protocols[key] = protocols.get(key, 0) | one.protocols
    return [Range(*key, bits) for key, bits in sorted(protocols.items())]


_NO_LOCK = -1


def _locked_anywhere(own: Mapping[Network, list[Range]]) -> list[Range]:
    """The ports that are locked on some IPv4 address: denied to a connect to 0.0.0.0 whose destination is unknown."""
    ranges = []
    for protocol in (abi.TCP, abi.UDP):
        ports = normal_ports(
            (r.low, r.high) for n, rs in own.items() if n.version == 4 for r in rs if r.protocols & protocol
        )
        ranges += [Range(low, high, _NO_LOCK, True, protocol) for low, high in ports]
    return _merge_protocols(ranges)


def _endpoint_key(generation: int, network: Network) -> bytes:
    bits = network.prefixlen + (96 if network.version == 4 else 0)
    return abi.ENDPOINT_KEY.pack(
        abi.ENDPOINT_KEY_FIXED_BITS + bits, generation, abi.address_bytes(network.network_address)
    )


def _endpoint_value(ranges: list[Range], list_of_lock: list[int]) -> bytes:
    return abi.endpoint_value(
        [
            abi.RANGE.pack(r.low, r.high, abi.NO_LOCK, abi.NO_LIST, r.protocols, abi.INHERITED)
            if r.lock == _NO_LOCK
            else abi.RANGE.pack(r.low, r.high, r.lock, list_of_lock[r.lock], r.protocols, abi.INHERITED * r.inherited)
            for r in ranges
        ]
    )


def _address_bitmap(entries: Mapping[Network, list[Range]]) -> bytes:
    bitmap = bytearray(abi.ADDRESS_BITMAP_BYTES)
    for network, ranges in entries.items():
        if not ranges:
            continue
        if network.prefixlen == network.max_prefixlen:
            abi.set_bit(bitmap, 0, abi.host_bit(abi.address_bytes(network.network_address)))
            continue
        base = abi.HOST_BYTES + (abi.NETWORK_BYTES if network.version == 6 else 0)
        first = int(network.network_address) >> (network.max_prefixlen - 16)
        for bit in range(first, first + (1 << max(0, 16 - network.prefixlen))):
            abi.set_bit(bitmap, base, bit)
    return bytes(bitmap)


# --- lists ------------------------------------------------------------------------------------------------------------


def _list_record(key: ListKey) -> bytes:
    allow, deny, default = key
    flags = abi.LIST_VALID | abi.LIST_DEFAULT_ALLOW * (default is Verdict.ALLOW)
    flags |= abi.LIST_GROUPS * bool(allow.groups or deny.groups) | abi.LIST_DENY_GROUPS * bool(deny.groups)
    flags |= abi.LIST_USERS * bool(allow.users or deny.users)
    flags |= abi.LIST_SMALL * (len(allow.groups | deny.groups) <= abi.MAX_SEARCHED_GROUPS)
    bitmap = [0] * abi.GID_BITMAP_WORDS
    for gid in allow.groups | deny.groups:
        bitmap[gid >> 5 & abi.GID_BITMAP_WORDS - 1] |= 1 << (gid & 31)
    return abi.LIST.pack(flags, 0, *bitmap)


def _members(generation: int, number: int, key: ListKey) -> list[tuple[bytes, bytes]]:
    allow, deny, _ = key
    items = []
    for kind, allowed, denied in ((abi.USER, allow.users, deny.users), (abi.GROUP, allow.groups, deny.groups)):
        for identity in allowed | denied:
            verdict = abi.ALLOW * (identity in allowed) | abi.DENY * (identity in denied)
            items.append((abi.MEMBER.pack(generation, kind, number, identity), abi.MEMBER_VALUE.pack(verdict)))
    return items


def _groups(generation: int, number: int, key: ListKey) -> list[tuple[bytes, bytes]]:
    """The listed groups in order, denied ones first. Only for lists that are short enough to be searched."""
    allow, deny, _ = key
    ordered = sorted(deny.groups) + sorted(allow.groups - deny.groups)
    if not ordered or len(ordered) > abi.MAX_SEARCHED_GROUPS:
        return []
    padded = ordered + [0] * (abi.MAX_SEARCHED_GROUPS - len(ordered))
    return [(abi.SMALL_KEY.pack(generation, number), abi.GROUPS.pack(len(deny.groups), len(ordered), *padded))]
