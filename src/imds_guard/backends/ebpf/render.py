# SPDX-License-Identifier: Apache-2.0
"""The records of one generation for a policy. Pure: nothing here touches the system."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.filter_records import filter_items
from imds_guard.backends.ebpf.image import Image, ListKey
from imds_guard.backends.ebpf.render_lists import groups_of, list_items, list_key, number_lists, users_of
from imds_guard.errors import Unsupported
from imds_guard.policy.filter_numbers import Numbers, assigned
from imds_guard.policy.filters import FILTER_NETWORK, FILTER_PORT
from imds_guard.policy.model import Address, Endpoint, Network, Policy
from imds_guard.policy.ports import has_port, minus_ports, normal_ports


class Range(NamedTuple):
    """struct ig_port_range. ``protocols`` are bits."""

    low: int
    high: int
    lock: int
    inherited: bool
    protocols: int
    target: int = 0
    """The number of the target that this one TCP port is."""


def require_fits(policy: Policy) -> None:
    """Raises Unsupported when the maps are too small for the policy."""
    numbers = assigned(policy)
    _check_sizes(policy, number_lists(policy), _endpoint_entries(policy, numbers))
    filter_items(policy, abi.GENERATIONS[0], numbers)


def render(policy: Policy, generation: int, numbers: Numbers | None = None) -> Image:
    """The records that make the hooks enforce ``policy``. Raises Unsupported when they would not fit.

    ``numbers`` are those of its targets and filters; without them they are numbered from 1.
    """
    numbers = assigned(policy) if numbers is None else numbers
    lists = number_lists(policy)
    endpoints = _endpoint_entries(policy, numbers)
    _check_sizes(policy, lists, endpoints)
    list_of_lock = [lists[list_key(policy, lock)] for lock in policy.locks]
    names = [lock.name.encode() for lock in policy.locks]
    return Image(
        generation,
        {
            Map.ADDRESS_BITMAP: ((abi.ARRAY_KEY.pack(generation), _address_bitmap(endpoints)),),
            Map.ENDPOINTS: tuple(
                (_endpoint_key(generation, network), _endpoint_value(ranges, list_of_lock))
                for network, ranges in endpoints.items()
            ),
            **list_items(policy, generation, lists),
            Map.LOCKS: tuple(
                (abi.SMALL_KEY.pack(generation, number), abi.LOCK.pack(list_of_lock[number], 0, name))
                for number, name in enumerate(names)
            ),
            **filter_items(policy, generation, numbers),
        },
    )


def _check_sizes(policy: Policy, lists: Mapping[ListKey, int], endpoints: Mapping[Network, list[Range]]) -> None:
    members = sum(len(users_of(policy, key)) + len(groups_of(policy, key)) for key in lists)
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


def _endpoint_entries(policy: Policy, numbers: Numbers) -> dict[Network, list[Range]]:
    """The ranges of each prefix, inherited ones included, and entries that no endpoint of the policy has."""
    own = _own_ranges(policy, numbers)
    entries = _inherit(own)
    if _MAPPED_SPACE not in entries and any(n.version == 6 and _MAPPED_MIDDLE in n for n in entries):
        entries[_MAPPED_SPACE] = []  # ::/0 must not lock IPv4, which is ::ffff:0:0/96 of the same trie
    anywhere = _locked_anywhere(own)
    if anywhere:
        entries[_UNSPECIFIED] = anywhere
    return entries


def _own_ranges(policy: Policy, numbers: Numbers) -> dict[Network, list[Range]]:
    served: dict[Address, dict[int, int]] = {}
    for target, number in numbers.targets.items():
        served.setdefault(target.address, {})[target.port] = number
    own: dict[Network, list[Range]] = {}
    for number, lock in enumerate(policy.locks):
        for endpoint in lock.endpoints:
            ranges = _tcp_ranges(endpoint, number, served)
            ranges += [Range(low, high, number, False, abi.UDP) for low, high in endpoint.udp]
            own.setdefault(endpoint.network, []).extend(ranges)
    if policy.filters:
        listeners = Range(FILTER_PORT, FILTER_PORT, _FILTER_LOCK, True, abi.TCP)
        own.setdefault(FILTER_NETWORK, []).append(listeners)
    return own


def _tcp_ranges(endpoint: Endpoint, lock: int, served: Mapping[Address, Mapping[int, int]]) -> list[Range]:
    """The TCP ports of an endpoint. A target of filters is a range of its own."""
    network = endpoint.network
    numbers = served.get(network.network_address, {}) if network.prefixlen == network.max_prefixlen else {}
    targets = {port: number for port, number in numbers.items() if has_port(endpoint.tcp, port)}
    rest = minus_ports(endpoint.tcp, normal_ports((port, port) for port in targets))
    ranges = [Range(low, high, lock, False, abi.TCP) for low, high in rest]
    return ranges + [Range(port, port, lock, False, abi.TCP, number) for port, number in sorted(targets.items())]


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
    protocols: dict[tuple[int, int, int, bool, int], int] = {}
    for one in ranges:
        key = (one.low, one.high, one.lock, one.inherited, one.target)
        protocols[key] = protocols.get(key, 0) | one.protocols
    return [Range(*key[:4], bits, key[4]) for key, bits in sorted(protocols.items())]


_NO_LOCK, _FILTER_LOCK = -1, -2
_LISTS_WITHOUT_LOCK = {_NO_LOCK: abi.NO_LIST, _FILTER_LOCK: abi.FILTER_LIST}


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
    def packed(one: Range) -> bytes:
        lock, number = one.lock, _LISTS_WITHOUT_LOCK.get(one.lock)
        if number is None:
            number = list_of_lock[lock]
        else:
            lock = abi.NO_LOCK
        inherited = abi.INHERITED * one.inherited
        return abi.RANGE.pack(one.low, one.high, lock, number, one.protocols, inherited, one.target)

    return abi.endpoint_value([packed(one) for one in ranges])


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
