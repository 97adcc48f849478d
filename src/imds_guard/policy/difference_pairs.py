# SPDX-License-Identifier: Apache-2.0
"""Which lock decided for an endpoint under one policy, and which one decides under another. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Optional

from imds_guard.policy.lock_index import LockIndex
from imds_guard.policy.model import Endpoint, Network, Policy, Protocol
from imds_guard.policy.ports import Ports, common_ports, normal_ports

Endpoints = tuple[Endpoint, ...]
Pair = tuple[Optional[str], Optional[str]]
"""The names of the lock before and the lock after; None where nothing was locked."""
Pairs = dict[Pair, dict[Network, Endpoint]]


def pairs_of(before: Policy | None, after: Policy | None) -> Pairs:
    """Every port of every prefix in either policy, by the two locks that decide for it."""
    old, new = LockIndex(before), LockIndex(after)
    found: Pairs = {}
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


def endpoints_at(pairs: Pairs, keys: Iterable[Pair]) -> Endpoints:
    """The endpoints of several pairs, in order."""
    merged: dict[Network, Endpoint] = {}
    for key in keys:
        for network, endpoint in pairs[key].items():
            for protocol in Protocol:
                if endpoint.ports(protocol):
                    _add(merged, network, protocol, endpoint.ports(protocol))
    return tuple(sorted(merged.values(), key=Endpoint.sort_key))
