# SPDX-License-Identifier: Apache-2.0
"""Policy <-> the records of one generation. Pure."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.errors import GuardError, Unsupported
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Network, Policy, Verdict, make_policy
from imds_guard.policy.ports import NO_PORTS, Ports, minus_ports, normal_ports

try:  # start-up time: hashlib has the same function, and loads OpenSSL for others
    from _blake2 import blake2s
except ImportError:  # a Python that has all of its hashes from OpenSSL
    from hashlib import blake2s

BYTE_ORDER: Literal["little", "big"] = sys.byteorder

Items = tuple[tuple[bytes, bytes], ...]


class Image(NamedTuple):
    """Every record of one generation but its settings: (key, value) pairs, as they lie in the maps."""

    generation: int
    items: Mapping[Map, Items]

    def digest(self) -> bytes:
        """16 octets that change with any record; the order in which the kernel hands records out does not matter."""
        state = blake2s(digest_size=16)
        for number in sorted(self.items):
            state.update(bytes([number]))
            state.update(b"".join(key + value for key, value in sorted(self.items[number])))
        return state.digest()


class Settings(NamedTuple):
    """struct ig_settings, without its digest and its serial."""

    mode: Mode
    containers: Verdict
    strict: bool = False

    def pack(self, digest: bytes, serial: int) -> bytes:
        """The record as it lies in the map."""
        mode = abi.MODE_AUDIT if self.mode is Mode.AUDIT else abi.MODE_ENFORCE
        containers = self.containers is Verdict.ALLOW
        return abi.SETTINGS.pack(1, mode, containers, abi.ABI, digest, self.strict, serial)


class Range(NamedTuple):
    """struct ig_port_range, its protocols as bits."""

    low: int
    high: int
    lock: int
    inherited: bool
    protocols: int


_ListKey = tuple[Identities, Identities, Verdict]


def settings_of(policy: Policy) -> Settings:
    """The part of a policy that stands in its generation's settings."""
    return Settings(policy.mode, policy.containers, policy.strict)


def render(policy: Policy, generation: int) -> Image:
    """The records that make the hooks enforce ``policy``. Raises Unsupported when they would not fit."""
    lists = _number_lists(policy)
    endpoints = _endpoint_entries(policy)
    _check_sizes(policy, lists, endpoints)
    list_of_lock = [lists[_list_key(lock)] for lock in policy.locks]
    return Image(
        generation,
        {
            Map.ADDRESS_BITMAP: ((generation.to_bytes(4, BYTE_ORDER), _address_bitmap(endpoints)),),
            Map.ENDPOINTS: tuple(
                (_endpoint_key(generation, network), _endpoint_value(ranges, list_of_lock))
                for network, ranges in endpoints.items()
            ),
            Map.LISTS: tuple(
                (((generation - 1) * abi.LISTS + number).to_bytes(4, BYTE_ORDER), _list_record(key))
                for key, number in lists.items()
            ),
            Map.MEMBERS: tuple(item for key, number in lists.items() for item in _members(generation, number, key)),
            Map.GROUPS: tuple(item for key, number in lists.items() for item in _groups(generation, number, key)),
            Map.LOCKS: tuple(
                (
                    abi.SMALL_KEY.pack(generation, number),
                    abi.LOCK.pack(list_of_lock[number], 0, lock.name.encode()),
                )
                for number, lock in enumerate(policy.locks)
            ),
        },
    )


def _list_key(lock: Lock) -> _ListKey:
    return lock.allow, lock.deny, lock.default


def _number_lists(policy: Policy) -> dict[_ListKey, int]:
    """Locks with the same lists share one."""
    numbers: dict[_ListKey, int] = {}
    for lock in policy.locks:
        numbers.setdefault(_list_key(lock), len(numbers))
    return numbers


def _check_sizes(policy: Policy, lists: Mapping[_ListKey, int], endpoints: Mapping[Network, list[Range]]) -> None:
    members = sum(len(a.users | d.users) + len(a.groups | d.groups) for a, d, _ in lists)
    for what, count, most in (
        ("locks", len(policy.locks), abi.LOCKS // 2),
        ("different allowlists", len(lists), abi.LISTS),
        ("users and groups", members, abi.MEMBERS // 2),
        ("endpoints", len(endpoints), abi.ENDPOINTS // 2),
    ):
        if count > most:
            raise Unsupported(f"loading the policy into eBPF maps: it has {count} {what}, and {most} is the most")
    for network, ranges in endpoints.items():
        if len(ranges) > abi.RANGES:
            raise Unsupported(
                f"loading the policy into eBPF maps: {network} has {len(ranges)} ranges of ports, those of the "
                f"prefixes around it included, and {abi.RANGES} is the most"
            )


# --- endpoints ------------------------------------------------------------------------------------------------------

_UNSPECIFIED = ipaddress.IPv4Network("0.0.0.0/32")
_MAPPED_SPACE = ipaddress.IPv4Network("0.0.0.0/0")
_MAPPED_MIDDLE = ipaddress.IPv6Address("::ffff:0:0")


def _endpoint_entries(policy: Policy) -> dict[Network, list[Range]]:
    """The ranges of each prefix, with what it inherits, and the entries that rendering adds."""
    own = _own_ranges(policy)
    entries = _inherit(own)
    if _MAPPED_SPACE not in entries and any(n.version == 6 and _MAPPED_MIDDLE in n for n in entries):
        entries[_MAPPED_SPACE] = []  # ::/0 locks IPv6; IPv4 lies in ::ffff:0:0/96 of the same trie
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
    """Shorter prefixes first: each takes over the ranges of the next shorter prefix around it, less its own ports."""
    entries: dict[Network, list[Range]] = {}
    lengths = {version: sorted({n.prefixlen for n in own if n.version == version}, reverse=True) for version in (4, 6)}
    for network in sorted(own, key=lambda n: n.prefixlen):
        around = _next_shorter(network, entries, lengths[network.version])
        taken = [] if around is None else _remainder(entries[around], own[network])
        entries[network] = _merge_protocols(own[network] + taken)
    return entries


def _next_shorter(network: Network, entries: Mapping[Network, list[Range]], lengths: Iterable[int]) -> Network | None:
    """``lengths`` are those of all prefixes, the longest first."""
    for length in lengths:
        if length < network.prefixlen:
            candidate = network.supernet(new_prefix=length)
            if candidate in entries:
                return candidate
    return None


def _remainder(ranges: Iterable[Range], own: Iterable[Range]) -> list[Range]:
    """``ranges`` as inherited ones, without the ports that ``own`` has for the same protocol."""
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
    """TCP and UDP ranges that are otherwise the same become one."""
    protocols: dict[tuple[int, int, int, bool], int] = {}
    for one in ranges:
        key = (one.low, one.high, one.lock, one.inherited)
        protocols[key] = protocols.get(key, 0) | one.protocols
    return [Range(*key, bits) for key, bits in sorted(protocols.items())]


_NOWHERE = -1


def _locked_anywhere(own: Mapping[Network, list[Range]]) -> list[Range]:
    """What is locked on any IPv4 address: a connect to 0.0.0.0 that leads we can't tell where is denied these."""
    ranges = []
    for protocol in (abi.TCP, abi.UDP):
        ports = normal_ports(
            (r.low, r.high) for n, rs in own.items() if n.version == 4 for r in rs if r.protocols & protocol
        )
        ranges += [Range(low, high, _NOWHERE, True, protocol) for low, high in ports]
    return _merge_protocols(ranges)


def _endpoint_key(generation: int, network: Network) -> bytes:
    bits = network.prefixlen + (96 if network.version == 4 else 0)
    return abi.ENDPOINT_KEY.pack(
        abi.ENDPOINT_KEY_FIXED_BITS + bits, generation, abi.address_bytes(network.network_address)
    )


def _endpoint_value(ranges: list[Range], list_of_lock: list[int]) -> bytes:
    packed = b"".join(
        abi.RANGE.pack(r.low, r.high, 0, abi.NO_LIST, r.protocols, abi.INHERITED)
        if r.lock == _NOWHERE
        else abi.RANGE.pack(r.low, r.high, r.lock, list_of_lock[r.lock], r.protocols, abi.INHERITED * r.inherited)
        for r in ranges
    )
    return (abi.ENDPOINT_HEAD.pack(len(ranges)) + packed).ljust(abi.ENDPOINT_BYTES, b"\0")


def _address_bitmap(entries: Mapping[Network, list[Range]]) -> bytes:
    look = bytearray(abi.ADDRESS_BITMAP_BYTES)
    for network, ranges in entries.items():
        if not ranges:
            continue
        if network.prefixlen == network.max_prefixlen:
            abi.set_bit(look, 0, abi.host_bit(abi.address_bytes(network.network_address)))
            continue
        base = abi.HOST_BYTES + (abi.NETWORK_BYTES if network.version == 6 else 0)
        first = int(network.network_address) >> (network.max_prefixlen - 16)
        for bit in range(first, first + (1 << max(0, 16 - network.prefixlen))):
            abi.set_bit(look, base, bit)
    return bytes(look)


# --- lists ----------------------------------------------------------------------------------------------------------


def _list_record(key: _ListKey) -> bytes:
    allow, deny, default = key
    flags = abi.LIST_VALID | abi.LIST_DEFAULT_ALLOW * (default is Verdict.ALLOW)
    flags |= abi.LIST_GROUPS * bool(allow.groups or deny.groups) | abi.LIST_DENY_GROUPS * bool(deny.groups)
    flags |= abi.LIST_USERS * bool(allow.users or deny.users)
    flags |= abi.LIST_SMALL * (len(allow.groups | deny.groups) <= abi.MAX_SEARCHED_GROUPS)
    words = [0] * abi.GID_BITMAP_WORDS
    for gid in allow.groups | deny.groups:
        words[gid >> 5 & abi.GID_BITMAP_WORDS - 1] |= 1 << (gid & 31)
    return abi.LIST.pack(flags, 0, *words)


def _members(generation: int, number: int, key: _ListKey) -> list[tuple[bytes, bytes]]:
    allow, deny, _ = key
    items = []
    for kind, allowed, denied in ((abi.USER, allow.users, deny.users), (abi.GROUP, allow.groups, deny.groups)):
        for identity in allowed | denied:
            verdict = abi.ALLOW * (identity in allowed) | abi.DENY * (identity in denied)
            items.append((abi.MEMBER.pack(generation, kind, number, identity), abi.MEMBER_VALUE.pack(verdict)))
    return items


def _groups(generation: int, number: int, key: _ListKey) -> list[tuple[bytes, bytes]]:
    """The listed groups in order, denied ones first, for lists that are short enough to be searched."""
    allow, deny, _ = key
    ordered = sorted(deny.groups) + sorted(allow.groups - deny.groups)
    if not ordered or len(ordered) > abi.MAX_SEARCHED_GROUPS:
        return []
    padded = ordered + [0] * (abi.MAX_SEARCHED_GROUPS - len(ordered))
    return [(abi.SMALL_KEY.pack(generation, number), abi.GROUPS.pack(len(deny.groups), len(ordered), *padded))]


# --- and back -------------------------------------------------------------------------------------------------------


def parse_settings(record: bytes) -> tuple[Settings, bytes] | None:
    """Settings and digest, or None for a record that is not valid."""
    valid, mode, containers, version, digest, strict, _ = abi.SETTINGS.unpack(record)
    if not valid or version != abi.ABI or mode not in (abi.MODE_ENFORCE, abi.MODE_AUDIT):
        return None
    chosen = Mode.AUDIT if mode == abi.MODE_AUDIT else Mode.ENFORCE
    return Settings(chosen, Verdict.ALLOW if containers else Verdict.DENY, bool(strict)), digest


def serial_of(record: bytes) -> int:
    """The number of the change that wrote a settings record; 0 when there was none."""
    return int(abi.SETTINGS.unpack(record)[6])


def parse(image: Image, settings: Settings) -> Policy:
    """The policy that the records make the hooks enforce. Raises GuardError when they contradict each other."""
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


def _parse_lists(image: Image) -> dict[int, _ListKey]:
    members: dict[int, dict[tuple[int, int], list[int]]] = {}
    for key, value in image.items[Map.MEMBERS]:
        _, kind, number, identity = abi.MEMBER.unpack(key)
        verdict = abi.MEMBER_VALUE.unpack(value)[0]
        of_list = members.setdefault(number, {})
        for bit in (abi.ALLOW, abi.DENY):
            if verdict & bit:
                of_list.setdefault((kind, bit), []).append(identity)
    lists: dict[int, _ListKey] = {}
    for key, value in image.items[Map.LISTS]:
        number = int.from_bytes(key, BYTE_ORDER) - (image.generation - 1) * abi.LISTS
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
        bits, _, octets = abi.ENDPOINT_KEY.unpack(key)
        network = _network(octets, bits - abi.ENDPOINT_KEY_FIXED_BITS)
        ports: dict[tuple[int, int], Ports] = {}
        for n in range(min(abi.ENDPOINT_HEAD.unpack_from(value)[0], abi.RANGES)):
            low, high, lock, _, protocols, flags = abi.RANGE.unpack_from(
                value, abi.ENDPOINT_HEAD.size + n * abi.RANGE.size
            )
            for protocol in (abi.TCP, abi.UDP):
                if protocols & protocol and not flags & abi.INHERITED:
                    ports[lock, protocol] = (*ports.get((lock, protocol), NO_PORTS), (low, high))
        for lock in {lock for lock, _ in ports}:
            found.setdefault(lock, []).append(
                Endpoint(network, ports.get((lock, abi.TCP), NO_PORTS), ports.get((lock, abi.UDP), NO_PORTS))
            )
    return found


def _network(octets: bytes, bits: int) -> Network:
    address = ipaddress.IPv6Address(octets)
    if bits >= 96 and address.ipv4_mapped is not None:
        return ipaddress.IPv4Network((int(address.ipv4_mapped), bits - 96))
    return ipaddress.IPv6Network((octets, bits))
