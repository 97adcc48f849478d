# SPDX-License-Identifier: Apache-2.0
"""The policy in the records of one generation: the way back from render(). Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.filter_records import filter_bit, parse_filters
from imds_guard.backends.ebpf.image import Image, Settings
from imds_guard.errors import GuardError
from imds_guard.policy.model import Endpoint, Identities, Lock, Network, Policy, Verdict, make_policy
from imds_guard.policy.ports import NO_PORTS, Ports


def parse(image: Image, settings: Settings) -> Policy:
    """The policy that the hooks enforce with these records. Raises GuardError when records contradict each other."""
    members = _parse_members(image)
    lists = _parse_lists(image, members)
    endpoints = _parse_endpoints(image)
    locks, list_of_lock = [], {}
    for key, value in image.items[Map.LOCKS]:
        number = abi.SMALL_KEY.unpack(key)[1]
        list_number, _, name = abi.LOCK.unpack(value)
        if list_number not in lists or number not in endpoints:
            raise GuardError(f"reading the policy back from the eBPF maps: lock {number} has no list or no endpoint")
        allow, deny, default = lists[list_number]
        text = name.rstrip(b"\0").decode(errors="replace")
        list_of_lock[text] = list_number
        locks.append(Lock(text, tuple(endpoints[number]), allow, deny, default))
    filters = [
        one._replace(who=_identities(members.get(list_of_lock.get(one.locks[0], -1), {}), filter_bit(index)))
        for index, one in enumerate(parse_filters(image))
    ]
    accounts = {uid for of_list in members.values() for uid in of_list.get((abi.USER, abi.FILTER_ACCOUNT), ())}
    account = min(accounts, default=None)
    return make_policy(locks, settings.mode, settings.containers, settings.strict, filters, account)


_Members = Mapping[int, Mapping[tuple[int, int], list[int]]]
"""Number of a list -> (kind, verdict bit) -> IDs."""


def _parse_members(image: Image) -> _Members:
    members: dict[int, dict[tuple[int, int], list[int]]] = {}
    bits = [abi.ALLOW, abi.DENY, abi.FILTER_ACCOUNT, *map(filter_bit, range(abi.FILTERS))]
    for key, value in image.items[Map.MEMBERS]:
        _, kind, number, identity = abi.MEMBER.unpack(key)
        verdict = abi.MEMBER_VALUE.unpack(value)[0]
        of_list = members.setdefault(number, {})
        for bit in bits if verdict > abi.ALLOW | abi.DENY else bits[:2]:
            if verdict & bit:
                of_list.setdefault((kind, bit), []).append(identity)
    return members


def _parse_lists(image: Image, members: _Members) -> dict[int, tuple[Identities, Identities, Verdict]]:
    lists: dict[int, tuple[Identities, Identities, Verdict]] = {}
    for key, value in image.items[Map.LISTS]:
        number = abi.list_number(image.generation, key)
        flags = abi.LIST.unpack(value)[0]
        of_list = members.get(number, {})
        default = Verdict.ALLOW if flags & abi.LIST_DEFAULT_ALLOW else Verdict.DENY
        lists[number] = (_identities(of_list, abi.ALLOW), _identities(of_list, abi.DENY), default)
    return lists


def _identities(members: Mapping[tuple[int, int], list[int]], verdict: int) -> Identities:
    def of_kind(kind: int) -> frozenset[int]:
        return frozenset(members.get((kind, verdict), ()))

    return Identities(of_kind(abi.USER), of_kind(abi.GROUP))


def _parse_endpoints(image: Image) -> dict[int, list[Endpoint]]:
    """The endpoints of each lock: the ranges that are not inherited."""
    found: dict[int, list[Endpoint]] = {}
    for key, value in image.items[Map.ENDPOINTS]:
        bits, _, packed = abi.ENDPOINT_KEY.unpack(key)
        network = _network(packed, bits - abi.ENDPOINT_KEY_FIXED_BITS)
        ports: dict[tuple[int, int], Ports] = {}
        for low, high, lock, _, protocols, flags, _ in abi.endpoint_ranges(value):
            for protocol in (abi.TCP, abi.UDP):
                if protocols & protocol and not flags & abi.INHERITED:
                    ports[lock, protocol] = (*ports.get((lock, protocol), NO_PORTS), (low, high))
        for lock in {lock for lock, _ in ports}:
            found.setdefault(lock, []).append(
                Endpoint(network, ports.get((lock, abi.TCP), NO_PORTS), ports.get((lock, abi.UDP), NO_PORTS))
            )
    return found


def _network(packed: bytes, bits: int) -> Network:
    """The network of an address in 16 bytes. An IPv4 network is one of IPv4-mapped addresses there."""
    address = ipaddress.IPv6Address(packed)
    if bits >= 96 and address.ipv4_mapped is not None:
        return ipaddress.IPv4Network((int(address.ipv4_mapped), bits - 96))
    return ipaddress.IPv6Network((packed, bits))
