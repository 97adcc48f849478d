# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: valid policies, callers, and destinations.

Values come from small pools that contain neighbours, so that prefixes nest, ports touch and lists overlap.
"""

from __future__ import annotations

import ipaddress

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from imds_guard.policy.decide import Caller, Destination
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
from imds_guard.policy.ports import Ports, minus_ports, normal_ports

patient = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
"""Settings for slow strategies: the time of an example means nothing on a busy machine."""

_ADDRESSES = (
    *("169.254.169.254", "169.254.170.2", "10.1.2.3", "10.1.2.4", "10.200.0.1", "127.0.0.1", "255.255.255.255"),
    *("0.0.0.1", "fd00:ec2::254", "fd00:ec2::255", "fd00:ffff::1", "fe80::a9fe:a9fe", "::1", "::fffe:0:1"),
    *("::ffff:10.1.2.3", "64:ff9b::a9fe:a9fe"),
)
_PORTS = (0, 1, 52, 53, 54, 79, 80, 81, 443, 8080, 65534, 65535)
_NAMES = ("default", "imds", "task credentials", "wireserver", "Zürich", "a", "b", "10.0.0.0/8")


def ids() -> st.SearchStrategy[int]:
    """User and group IDs: mostly from a few, so that a gid often equals a uid; sometimes any."""
    return st.one_of(st.sampled_from((0, 1, 512, 1001, 2002, 2514, 65534, MAX_ID)), st.integers(0, MAX_ID))


def identities() -> st.SearchStrategy[Identities]:
    """Up to five users and five groups."""
    some = st.frozensets(ids(), max_size=5)
    return st.builds(Identities, some, some)


def ports() -> st.SearchStrategy[Ports]:
    """All ports, or up to two ranges in normal form, which may be none."""
    one = st.one_of(st.sampled_from(_PORTS), st.integers(0, 65535))
    ranges = st.tuples(one, one).map(lambda pair: (min(pair), max(pair)))
    return st.one_of(st.just(((0, 65535),)), st.lists(ranges, max_size=2).map(normal_ports))


def addresses() -> st.SearchStrategy[Address]:
    """Addresses that are close to each other, and any other, IPv4-mapped and unspecified ones included."""
    return st.one_of(st.sampled_from(_ADDRESSES).map(ipaddress.ip_address), st.ip_addresses())


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Single addresses and prefixes, often with 15 to 17 bits, where the address bitmap changes."""
    address = draw(addresses())
    maximum = address.max_prefixlen
    usual = st.sampled_from((maximum, maximum, maximum - 1, 0, 1, 8, 15, 16, 17, 24))
    length = draw(st.one_of(usual, st.integers(0, maximum)))
    return ipaddress.ip_network((int(address).to_bytes(maximum // 8, "big"), length), strict=False)


def _can_be_locked(network: Network) -> bool:
    """False for 0.0.0.0, :: and ::ffff:0.0.0.0, which make_policy() refuses."""
    mapped = network.version == 6 and network.network_address == ipaddress.IPv6Address("::ffff:0:0")
    return network.prefixlen < network.max_prefixlen or (int(network.network_address) != 0 and not mapped)


def _claim(claimed: dict[Network, dict[Protocol, Ports]], endpoint: Endpoint) -> Endpoint:
    """The part of an endpoint that no earlier lock has claimed."""
    used = claimed.setdefault(plain(endpoint.network), {protocol: () for protocol in Protocol})
    left = {protocol: minus_ports(endpoint.ports(protocol), used[protocol]) for protocol in Protocol}
    for protocol in Protocol:
        used[protocol] = normal_ports(used[protocol] + left[protocol])
    return Endpoint(endpoint.network, left[Protocol.TCP], left[Protocol.UDP])


def plain(network: Network) -> Network:
    """A prefix of IPv4-mapped addresses as an IPv4 prefix."""
    inside = ipaddress.IPv6Network("::ffff:0:0/96")
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(inside):
        return ipaddress.IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


@st.composite
def policies(draw: st.DrawFn, max_locks: int = 4, *, also_strict: bool = False) -> Policy:
    """Valid policies in normal form, some without a lock. ``also_strict``: some are strict, for eBPF only."""
    claimed: dict[Network, dict[Protocol, Ports]] = {}
    # A few lists for all locks: equal ones are stored once.
    lists = draw(st.lists(st.tuples(identities(), identities(), st.sampled_from(Verdict)), min_size=1, max_size=3))
    endpoints = st.builds(Endpoint, networks().filter(_can_be_locked), ports(), ports())
    locks: list[Lock] = []
    for name in draw(st.lists(st.sampled_from(_NAMES), unique=True, max_size=max_locks)):
        drawn = draw(st.lists(endpoints, min_size=1, max_size=3))
        free = tuple(one for one in (_claim(claimed, endpoint) for endpoint in drawn) if one.tcp or one.udp)
        if free:
            allow, deny, default = draw(st.sampled_from(lists))
            locks.append(Lock(name, free, allow, deny, default))
    strict = also_strict and draw(st.booleans())
    return make_policy(locks, draw(st.sampled_from(Mode)), draw(st.sampled_from(Verdict)), strict)


def destinations(policy: Policy) -> st.SearchStrategy[Destination]:
    """Destinations at the edges of the policy's endpoints, just outside them, and anywhere."""
    edges = [edge for lock in policy.locks for endpoint in lock.endpoints for edge in _edges(endpoint.network)]
    near = [st.sampled_from(edges)] if edges else []
    known = sorted({port for lock in policy.locks for endpoint in lock.endpoints for port in _port_edges(endpoint)})
    port = st.one_of(st.sampled_from(known or [80]), st.sampled_from(_PORTS), st.integers(0, 65535))
    return st.builds(Destination, st.one_of(*near, addresses()), port, st.sampled_from(Protocol))


def _edges(network: Network) -> list[Address]:
    first, last = int(network[0]), int(network[-1])
    kind = ipaddress.IPv4Address if network.version == 4 else ipaddress.IPv6Address
    return [kind(n) for n in (first - 1, first, last, last + 1) if 0 <= n < 1 << network.max_prefixlen]


def _port_edges(endpoint: Endpoint) -> tuple[int, ...]:
    ranges = endpoint.tcp + endpoint.udp
    near = {port for low, high in ranges for port in (low - 1, low, high, high + 1)}
    return tuple(port for port in near if 0 <= port <= 65535)


def callers() -> st.SearchStrategy[Caller]:
    """Processes of the host, processes in containers, and kernel threads; up to five supplementary groups."""
    likely = st.sampled_from((True, True, True, False))
    return st.builds(
        Caller,
        fsuid=ids(),
        fsgid=ids(),
        groups=st.frozensets(ids(), max_size=5),
        pid_namespace_is_initial=likely,
        user_namespace_is_initial=likely,
        kernel_thread=likely.map(lambda initial: not initial),
    )
