# SPDX-License-Identifier: Apache-2.0
"""Random policies, callers and destinations from a ``random.Random``, for tests that compare with ``decide()``.

Values are biased to where faults are: prefixes nest, ports touch, lists overlap, a gid equals a uid, and callers and
destinations are at the edges of what the policy lists, on both sides. The same seed gives the same values.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from random import Random

from imds_guard.errors import BadPolicy
from imds_guard.policy.decide import Caller, Destination
from imds_guard.policy.filters import FILTER_NETWORK, FILTER_PORT, Filter, FilterRules, targets
from imds_guard.policy.model import (
    MAX_ID,
    Address,
    Endpoint,
    Identities,
    Lock,
    Mode,
    Network,
    Policy,
    Protocol,
    Verdict,
    make_policy,
)
from imds_guard.policy.ports import ALL_PORTS, Ports, minus_ports, normal_ports

_IPV4 = (
    *("169.254.169.254", "169.254.169.253", "169.254.169.255", "169.254.170.2", "168.63.129.16", "100.100.100.200"),
    *("10.1.2.3", "10.1.2.4", "10.1.3.0", "10.1.255.255", "10.2.0.0", "127.0.0.1", "127.0.0.2", "0.0.0.1"),
    *("128.0.0.1", "254.169.254.169", "255.255.255.255"),
)
_IPV6 = (
    *("fd00:ec2::254", "fd00:ec2::255", "fd00:ec2::23", "fd00:ec2:0:1::254", "fe80::a9fe:a9fe", "::1", "::2"),
    *("::fffe:ffff:ffff", "::1:0:0:0", "::a9fe:a9fe", "64:ff9b::a9fe:a9fe", "8000::", "2001:db8::1"),
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
)
_LENGTHS = {4: (32, 32, 32, 32, 31, 30, 24, 17, 16, 15, 8, 1, 0), 6: (128, 128, 128, 128, 127, 97, 95, 64, 16, 8, 1, 0)}
_PORTS = (0, 1, 52, 53, 54, 79, 80, 81, 443, 8080, 20480, 32768, 65534, 65535)
"""20480 is 80 in the other byte order."""
_IDS = (0, 1, 2, 33, 511, 512, 513, 1001, 1002, 65534, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**31 + 1, MAX_ID)
_NAMES = ("imds", "a b", "Zürich", "10.0.0.0/8", "%20", "it's", "back\\slash", "-j ACCEPT")

MAX_WALKED = 1024
"""Callers with this many groups, one fewer and one more are made. Source: MAX_WALKED_GROUPS of decide()."""


# --- policies -------------------------------------------------------------------------------------------------------


def policy(random: Random, *, strict: bool | None = None, filters: bool = False) -> Policy:
    """A valid policy in normal form with at least one lock, and with some ``filters`` if that can be.

    ``strict`` None: in one of three.
    """
    while True:
        locks = _locks(random)
        if not locks:
            continue
        mode = Mode.AUDIT if random.random() < 0.12 else Mode.ENFORCE
        wanted = random.random() < 0.33 if strict is None else strict
        containers, some = random.choice(tuple(Verdict)), _filters(random, locks) if filters else []
        account = _id(random) if some and random.random() < 0.7 else None
        try:
            return make_policy(locks, mode, containers, wanted, some, account)
        except BadPolicy:
            continue  # 0.0.0.0 and :: can't be locked; a filter has nothing to serve


def _filters(random: Random, locks: Sequence[Lock]) -> list[Filter]:
    """Filters for locks that have an address of one host: they serve a port of one."""
    served = [
        (lock.name, port)
        for lock in locks
        for endpoint in lock.endpoints
        if endpoint.network.prefixlen == endpoint.network.max_prefixlen
        for port in {port for ports in endpoint.tcp for port in ports if port}
    ]
    made = []
    for number in range(random.choice((1, 1, 2, 3, 24)) if served else 0):
        name, port = random.choice(served)
        others = [lock.name for lock in locks if random.random() < 0.3]
        everyone = random.random() < 0.25
        listed = Identities() if everyone else Identities(_ids(random), _ids(random))
        rules = FilterRules(allow=("GET /**",), audit=random.random() < 0.5)
        made.append(Filter(f"filter {number}", (name, *others), listed, everyone, rules, port))
    return made


def _locks(random: Random) -> list[Lock]:
    count = random.choice((1, 1, 2, 2, 3, 4, 6)) if random.random() < 0.98 else 40
    lists = [_lists(random) for _ in range(random.randint(1, min(count, 4)))]
    claimed: dict[Network, dict[Protocol, Ports]] = {}
    locks = []
    for number in range(count):
        endpoints = [_claim(claimed, _endpoint(random, list(claimed))) for _ in range(random.randint(1, 4))]
        left = tuple(endpoint for endpoint in endpoints if endpoint.tcp or endpoint.udp)
        if left:
            name = f"{random.choice(_NAMES)} {number}" if random.random() < 0.3 else f"lock {number}"
            locks.append(Lock(name, left, *random.choice(lists)))
    return locks


def _lists(random: Random) -> tuple[Identities, Identities, Verdict]:
    allow = Identities(_ids(random), _ids(random))
    deny = Identities(_ids(random), _ids(random)) if random.random() < 0.45 else Identities()
    if random.random() < 0.1:
        deny = Identities(allow.users, deny.groups)  # deny lists come first
    return allow, deny, Verdict.ALLOW if random.random() < 0.25 else Verdict.DENY


def _ids(random: Random) -> frozenset[int]:
    share = random.random()
    if share < 0.3:
        return frozenset()
    if share < 0.9:
        return frozenset(_id(random) for _ in range(random.randint(1, 5)))
    # Around the 128 groups that eBPF searches; with a step of 1 they are one range.
    count = random.choice((9, 17, 64, 127, 128, 129, 130, 300))
    step = random.choice((1, 2, 3))
    first = random.choice((0, 1000, 2**31 - count, MAX_ID - count * step))
    return frozenset(first + number * step for number in range(count))


def _id(random: Random) -> int:
    return random.choice(_IDS) if random.random() < 0.9 else random.randint(0, MAX_ID)


def _endpoint(random: Random, others: Sequence[Network]) -> Endpoint:
    tcp, udp = _ports(random), _ports(random)
    return Endpoint(_network(random, others), tcp, tcp if random.random() < 0.3 else udp)


def _network(random: Random, others: Sequence[Network]) -> Network:
    """A prefix; in half of the cases inside or around one of ``others``, or beside it."""
    if others and random.random() < 0.5:
        other = random.choice(others)
        first = int(other.network_address) ^ (random.getrandbits(1) << random.randrange(other.max_prefixlen))
        length = min(other.max_prefixlen, max(0, other.prefixlen + random.choice((-16, -8, -1, 0, 1, 2, 8, 128))))
        return _prefix(other.version, first, length)
    version = 4 if random.random() < 0.6 else 6
    length = (
        random.choice(_LENGTHS[version]) if random.random() < 0.8 else random.randint(0, 32 if version == 4 else 128)
    )
    if length < 8 and random.random() < 0.7:
        length = 32 if version == 4 else 128  # few of the shortest: they would cover everything
    found = _prefix(version, int(ipaddress.ip_address(random.choice(_IPV4 if version == 4 else _IPV6))), length)
    if version == 4 and random.random() < 0.1:
        mapped = (0xFFFF << 32) + int(found.network_address)
        return ipaddress.IPv6Network((mapped, 96 + found.prefixlen))  # means the same as the IPv4 prefix
    return found


def _prefix(version: int, first: int, length: int) -> Network:
    kind = ipaddress.IPv4Network if version == 4 else ipaddress.IPv6Network
    return kind((first, length), strict=False)


def _ports(random: Random) -> Ports:
    share = random.random()
    if share < 0.12:
        return ()
    if share < 0.35:
        return ALL_PORTS
    if share < 0.5:
        return ((0, 52), (54, 65535))
    if share < 0.95:
        return normal_ports(_range(random) for _ in range(random.choice((1, 1, 1, 2, 3))))
    first = random.choice((0, 70, 65000))
    return normal_ports((first + 2 * number, first + 2 * number) for number in range(random.choice((6, 11, 12, 23))))


def _range(random: Random) -> tuple[int, int]:
    low, high = random.choice(_PORTS), random.choice(_PORTS)
    if random.random() < 0.5:
        high = min(65535, low + random.choice((0, 0, 1, 2)))
    return min(low, high), max(low, high)


def _claim(claimed: dict[Network, dict[Protocol, Ports]], endpoint: Endpoint) -> Endpoint:
    """The part of an endpoint that no earlier one has: two locks can't have the same prefix and port."""
    used = claimed.setdefault(_plain(endpoint.network), {protocol: () for protocol in Protocol})
    left = {protocol: minus_ports(endpoint.ports(protocol), used[protocol]) for protocol in Protocol}
    for protocol in Protocol:
        used[protocol] = normal_ports(used[protocol] + left[protocol])
    return Endpoint(endpoint.network, left[Protocol.TCP], left[Protocol.UDP])


def _plain(network: Network) -> Network:
    """A prefix of IPv4-mapped addresses as an IPv4 prefix."""
    if network.version == 6 and network.prefixlen >= 96 and int(network.network_address) >> 32 == 0xFFFF:
        return ipaddress.IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


# --- callers --------------------------------------------------------------------------------------------------------


def caller(random: Random, under: Policy) -> Caller:
    """A caller whose IDs are often on a list of the policy, or next to one, or on the list of the other kind."""
    users = [uid for lock in under.locks for uid in sorted(lock.allow.users | lock.deny.users)]
    groups = [gid for lock in under.locks for gid in sorted(lock.listed_groups)]
    for one in under.filters:
        users += sorted(one.who.users)
        groups += sorted(one.who.groups)
    users += [] if under.filter_uid is None else [under.filter_uid]
    fsuid = _near(random, groups if random.random() < 0.1 else users, 0.5)
    fsgid = fsuid if random.random() < 0.1 else _near(random, users if random.random() < 0.2 else groups, 0.25)
    return Caller(
        fsuid,
        fsgid,
        _supplementary(random, groups),
        pid_namespace_is_initial=random.random() < 0.85,
        user_namespace_is_initial=random.random() < 0.85,
        kernel_thread=random.random() < 0.04,
    )


def _near(random: Random, listed: Sequence[int], share: float) -> int:
    """With this probability one of the listed IDs or a neighbour of one, else any."""
    if not listed or random.random() >= share:
        return _id(random)
    return min(MAX_ID, max(0, random.choice(listed) + random.choice((0, 0, 0, 0, 0, 1, -1))))


def _supplementary(random: Random, listed: Sequence[int]) -> frozenset[int]:
    share = random.random()
    if share < 0.3:
        return frozenset()
    few = frozenset(_near(random, listed, 0.35) for _ in range(random.choice((1, 2, 3, 8, 16, 17, 33))))
    if share < 0.96:
        return few
    # As many as decide() compares, and some more and some less. In half of them none is listed.
    first = random.choice((3000, 2**31 - 500, MAX_ID - 2100))
    many = range(first, first + MAX_WALKED + random.choice((-1, 0, 1, 500)) - len(few))
    return few.union(many) if random.random() < 0.5 else frozenset(many) - frozenset(listed)


# --- destinations ---------------------------------------------------------------------------------------------------


def destination(random: Random, under: Policy) -> Destination:
    """A destination at an edge of an endpoint, on either side of it, or anywhere. IPv4 is sometimes mapped.

    Under a policy with filters it is often what they serve, or where they listen.
    """
    if under.filters and random.random() < 0.5:
        return _of_filters(random, under)
    endpoint = random.choice([endpoint for lock in under.locks for endpoint in lock.endpoints])
    protocol = random.choice([one for one in Protocol if endpoint.ports(one)])
    if random.random() < 0.2:
        protocol = random.choice(tuple(Protocol))
    near = [port for low, high in endpoint.ports(protocol) for port in (low, low, high, high, low - 1, high + 1)]
    port = random.choice(near) if near and random.random() < 0.8 else random.choice(_PORTS)
    network = endpoint.network if random.random() < 0.8 else None
    return Destination(address(random, network), min(65535, max(0, port)), protocol)


def _of_filters(random: Random, under: Policy) -> Destination:
    if random.random() < 0.75:
        served = random.choice(targets(under))
        return Destination(address(random, ipaddress.ip_network(served.address)), served.port)
    listening = FILTER_NETWORK if random.random() < 0.9 else None
    port = FILTER_PORT if random.random() < 0.8 else random.choice(_PORTS)
    return Destination(address(random, listening), port, random.choice((Protocol.TCP, *Protocol)))


def address(random: Random, near: Network | None) -> Address:
    """An address at an edge of a prefix, in it, or one bit away from it; without a prefix any. Sometimes mapped."""
    found: Address = ipaddress.ip_address(random.choice(_IPV4 + _IPV6))
    if near is not None:
        first, last = int(near.network_address), int(near.broadcast_address)
        flipped = first ^ 1 << random.randrange(near.max_prefixlen)
        inside = (first, first, first, last, last, random.randint(first, last))
        number = random.choice((*inside, first - 1, last + 1, flipped))
        if 0 <= number < 1 << near.max_prefixlen:
            found = (ipaddress.IPv4Address if near.version == 4 else ipaddress.IPv6Address)(number)
    if found.version == 4 and random.random() < 0.2:
        return ipaddress.IPv6Address((0xFFFF << 32) + int(found))
    return found
