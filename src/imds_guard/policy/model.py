# SPDX-License-Identifier: Apache-2.0
"""What is locked, and for whom: the values of a policy, and the check that makes one valid."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Union

from imds_guard.errors import BadPolicy
from imds_guard.policy.filters import Filter, check_filters, normal_filter
from imds_guard.policy.ports import NO_PORTS, Ports, common_ports, normal_ports

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Protocol(str, enum.Enum):
    """The transport of a connect. MPTCP counts as TCP."""

    TCP = "tcp"
    UDP = "udp"


class Mode(str, enum.Enum):
    """Whether a denial is enforced or only counted."""

    ENFORCE = "enforce"
    AUDIT = "audit"


class Verdict(str, enum.Enum):
    """What happens to callers that no list names (``Lock.default``) or in containers (``Policy.containers``)."""

    DENY = "deny"
    ALLOW = "allow"


def unmapped(address: Address) -> Address:
    """An IPv4-mapped address (``::ffff:a.b.c.d``) as IPv4; any other address without its scope (``%eth0``)."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or ipaddress.IPv6Address(int(address))
    return address


class Endpoint(NamedTuple):
    """A locked address or prefix, with the locked ports of each protocol."""

    network: Network
    tcp: Ports = NO_PORTS
    udp: Ports = NO_PORTS

    def ports(self, protocol: Protocol) -> Ports:
        """The locked ports for one protocol."""
        return self.tcp if protocol is Protocol.TCP else self.udp

    def covers(self, address: Address) -> bool:
        """True when ``address`` is in the prefix. An IPv6 prefix never covers IPv4: pass unmapped() addresses."""
        return address.version == self.network.version and address in self.network

    def sort_key(self) -> tuple[int, int, int]:
        """IPv4 before IPv6, then by address, then the shorter prefix first."""
        return (self.network.version, int(self.network.network_address), self.network.prefixlen)


class Identities(NamedTuple):
    """User IDs and group IDs, as the initial user namespace has them. The two are separate: gid 0 is not uid 0."""

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.users or self.groups)


NOBODY = Identities()


class Lock(NamedTuple):
    """Endpoints, who may reach them, and what happens to everyone else."""

    name: str
    endpoints: tuple[Endpoint, ...]
    allow: Identities = NOBODY
    deny: Identities = NOBODY
    default: Verdict = Verdict.DENY

    @property
    def allows_nobody(self) -> bool:
        """True when the lock denies everyone."""
        return not self.allow and self.default is Verdict.DENY

    @property
    def listed_groups(self) -> frozenset[int]:
        """All groups on the allowlist and the deny list."""
        return self.allow.groups | self.deny.groups


class Policy(NamedTuple):
    """All locks of a machine. Make it with ``make_policy()``, which checks it and brings it into normal form."""

    locks: tuple[Lock, ...]
    mode: Mode = Mode.ENFORCE
    containers: Verdict = Verdict.DENY
    strict: bool = False
    """Also drop packets to locked endpoints from sockets whose connect was not approved."""
    filters: tuple[Filter, ...] = ()
    """In the order of the file: a caller belongs to the first filter that names it."""
    filter_uid: int | None = None
    """The user that runs the filters. It may connect to their targets (policy/filters.py); no list names it."""


def make_policy(
    locks: Iterable[Lock],
    mode: Mode = Mode.ENFORCE,
    containers: Verdict = Verdict.DENY,
    strict: bool = False,
    filters: Iterable[Filter] = (),
    filter_uid: int | None = None,
) -> Policy:
    """A valid policy in normal form: policies that mean the same compare equal. Raises BadPolicy.

    Locks are sorted by name, endpoints of a lock by address. Endpoints of a lock with the same prefix are merged.
    Filters keep their order; a policy without filters has no ``filter_uid``.
    """
    normal = tuple(sorted((_normal_lock(lock) for lock in locks), key=lambda lock: lock.name))
    in_order = tuple(normal_filter(one) for one in filters)
    _check_names(normal)
    _check_ids(normal, in_order)
    _check_overlaps(normal)
    for one in in_order:
        _check_name("filter", one.name)
    check_filters(in_order, normal, filter_uid)
    return Policy(normal, mode, containers, strict, in_order, filter_uid if in_order else None)


MAX_LOCK_NAME_BYTES = 63
MAX_ID = 0xFFFFFFFE
"""The next number, 4294967295, is (uid_t)-1 and means "no user" (setresuid(2))."""


def _normal_lock(lock: Lock) -> Lock:
    merged: dict[Network, Endpoint] = {}
    for endpoint in lock.endpoints:
        network = _normal_network(endpoint.network)
        seen = merged.get(network, Endpoint(network))
        merged[network] = Endpoint(
            network, normal_ports(seen.tcp + endpoint.tcp), normal_ports(seen.udp + endpoint.udp)
        )
    for endpoint in merged.values():
        if endpoint.network.prefixlen == endpoint.network.max_prefixlen and int(endpoint.network.network_address) == 0:
            raise BadPolicy(
                f"lock {lock.name!r}: {endpoint.network.network_address} can't be locked: a connect to it goes to the "
                "socket's own address, and that address is checked"
            )
        if not endpoint.tcp and not endpoint.udp:
            raise BadPolicy(f"lock {lock.name!r}: {endpoint.network} has no ports")
    if not merged:
        raise BadPolicy(f"lock {lock.name!r} has no endpoint")
    return lock._replace(endpoints=tuple(sorted(merged.values(), key=Endpoint.sort_key)))


def _normal_network(network: Network) -> Network:
    """A prefix inside ::ffff:0:0/96 as an IPv4 prefix."""
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((int(mapped), network.prefixlen - 96))
    return network


def _check_names(locks: Sequence[Lock]) -> None:
    for earlier, later in zip(locks, locks[1:]):
        if earlier.name == later.name:
            raise BadPolicy(f"two locks have the name {later.name!r}")
    for lock in locks:
        _check_name("lock", lock.name)


def _check_name(kind: str, name: str) -> None:
    if not 1 <= len(name.encode()) <= MAX_LOCK_NAME_BYTES or not name.isprintable():
        raise BadPolicy(f"{name!r} is not a {kind} name: it takes 1 to {MAX_LOCK_NAME_BYTES} bytes of printable text")


def _check_ids(locks: Sequence[Lock], filters: Sequence[Filter]) -> None:
    listed = [(f"lock {lock.name!r}", ids) for lock in locks for ids in (lock.allow, lock.deny)]
    listed += [(f"filter {one.name!r}", one.who) for one in filters]
    for where, ids in listed:
        for number in (*ids.users, *ids.groups):
            if not 0 <= number <= MAX_ID:
                raise BadPolicy(f"{where}: {number} is not a user or group ID (0 to {MAX_ID})")


def _check_overlaps(locks: Sequence[Lock]) -> None:
    """Two locks must not have the same prefix, protocol and port: neither would be the more specific one."""
    seen: dict[Network, list[tuple[str, Endpoint]]] = {}
    for lock in locks:
        for endpoint in lock.endpoints:
            for name, other in seen.setdefault(endpoint.network, []):
                for protocol in Protocol:
                    both = common_ports(endpoint.ports(protocol), other.ports(protocol))
                    if both:
                        raise BadPolicy(
                            f"locks {name!r} and {lock.name!r} both lock {endpoint.network} "
                            f"{protocol.value} port {both[0][0]}"
                        )
            seen[endpoint.network].append((lock.name, endpoint))
