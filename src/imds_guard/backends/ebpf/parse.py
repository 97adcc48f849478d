# SPDX-License-Identifier: Apache-2.0
"""The policy in the records of one generation: the way back from render(). Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.image import Image, ListKey, Settings
from imds_guard.errors import GuardError
from imds_guard.policy.model import Endpoint, Identities, Lock, Network, Policy, Verdict, make_policy
from imds_guard.policy.ports import NO_PORTS, Ports


def parse(image: Image, settings: Settings) -> Policy:
    """The policy that the hooks enforce with these records. Raises GuardError when records contradict each other."""
    lists = _parse_lists(image)
    endpoints = _parse_endpoints(image)
    locks = []
    for key, value in image.items[Map.LOCKS]:
        number = abi.SMALL_KEY.unpack(key)[1]
        list_number, _, name = abi.LOCK.unpack(value)
        if list_number not in lists or number not in endpoints:
            raise GuardError(f"reading the policy back from the eBPF maps: lock {number} has no list or no endpoint")
        allow, deny, default = lists[list_number]
        text = name.rstrip(b"\0").decode(errors="replace")
        locks.append(Lock(text, tuple(endpoints[number]), allow, deny, default))
    return make_policy(locks, settings.mode, settings.containers, settings.strict)


def _parse_lists(image: Image) -> dict[int, ListKey]:
    members: dict[int, dict[tuple[int, int], list[int]]] = {}
    for key, value in image.items[Map.MEMBERS]:
        _, kind, number, identity = abi.MEMBER.unpack(key)
        verdict = abi.MEMBER_VALUE.unpack(value)[0]
        of_list = members.setdefault(number, {})
        for bit in (abi.ALLOW, abi.DENY):
            if verdict & bit:
                of_list.setdefault((kind, bit), []).append(identity)
    lists: dict[int, ListKey] = {}
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
        for low, high, lock, _, protocols, flags in abi.endpoint_ranges(value):
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
