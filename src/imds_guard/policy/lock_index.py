# SPDX-License-Identifier: Apache-2.0
"""Finds the lock that decides for an address among many: find_lock() of policy/decide.py without a walk. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Optional

from imds_guard.policy.model import Address, Endpoint, Network, Policy, Protocol
from imds_guard.policy.ports import ALL_PORTS, Ports, common_ports, has_port, minus_ports

Deciding = tuple[Optional[str], Ports, Optional[Endpoint]]
"""The name of a lock, the ports for which it decides, and by which endpoint. None where nothing is locked."""


class LockIndex:
    """The endpoints of a policy by prefix."""

    def __init__(self, policy: Policy | None) -> None:
        self.networks: dict[Network, list[tuple[str, Endpoint]]] = {}
        for lock in policy.locks if policy is not None else ():
            for endpoint in lock.endpoints:
                self.networks.setdefault(endpoint.network, []).append((lock.name, endpoint))
        self._lengths = {
            version: sorted({one.prefixlen for one in self.networks if one.version == version}, reverse=True)
            for version in (4, 6)
        }

    def deciding(self, network: Network, protocol: Protocol) -> Iterator[Deciding]:
        """The lock for each port of a prefix: that of the most specific endpoint around it."""
        rest: Ports = ALL_PORTS
        for length in self._lengths[network.version]:
            if length > network.prefixlen:
                continue
            for name, endpoint in self.networks.get(_around(network, length), ()):
                ports = common_ports(rest, endpoint.ports(protocol))
                if ports:
                    yield name, ports, endpoint
                    rest = minus_ports(rest, ports)
        if rest:
            yield None, rest, None

    def find(self, address: Address, port: int, protocol: Protocol) -> tuple[str, Endpoint] | None:
        """The lock that decides for a connect, and its endpoint."""
        for name, ports, endpoint in self.deciding(ipaddress.ip_network(address), protocol):
            if name is not None and endpoint is not None and has_port(ports, port):
                return name, endpoint
        return None


def _around(network: Network, length: int) -> Network:
    """The prefix of that length around a longer one, or the prefix itself."""
    return network.supernet(new_prefix=length) if length < network.prefixlen else network
