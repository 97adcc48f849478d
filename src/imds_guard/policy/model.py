# SPDX-License-Identifier: Apache-2.0
"""What is locked, for whom, and how a connect is judged.

``decide()`` is the specification: every backend is compared with it. Nothing here touches the system.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Union

from imds_guard.errors import BadPolicy

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

Ports = tuple[tuple[int, int], ...]
"""Disjoint inclusive ranges in ascending order, never adjacent; ports in host byte order."""

NO_PORTS: Ports = ()
ALL_PORTS: Ports = ((0, 65535),)

MAX_WALKED_GROUPS = 1024
"""A caller with at most so many supplementary groups is compared with any number of listed groups."""
MAX_SEARCHED_GROUPS = 128
"""A caller with more is compared with at most so many listed groups of a lock; beyond both, it is denied."""


class Protocol(str, enum.Enum):
    """The transport of a connect. MPTCP counts as TCP."""

    TCP = "tcp"
    UDP = "udp"


class Mode(str, enum.Enum):
    """Whether a denial is enforced or only counted."""

    ENFORCE = "enforce"
    AUDIT = "audit"


class Verdict(str, enum.Enum):
    """What a lock does with callers on none of its lists, and what a policy does with containers."""

    DENY = "deny"
    ALLOW = "allow"


class Reason(enum.IntEnum):
    """Why a connect was let through or denied. The numbers are ABI (bpf/imds_guard.h)."""

    NOT_LOCKED = 0
    ALLOWED_USER = 1
    ALLOWED_GROUP = 2
    DEFAULT_ALLOW = 3
    DENIED_USER = 4
    DENIED_GROUP = 5
    NOT_LISTED = 6
    CONTAINER = 7
    USER_NAMESPACE = 8
    KERNEL_THREAD = 9
    TOO_MANY_GROUPS = 10
    UNSPECIFIED_DESTINATION = 11
    UNREADABLE = 12
    NO_SETTINGS = 13
    UNAPPROVED_SOCKET = 14
    """Under strict: a packet of a socket that no hook approved, or whose right is gone. decide() is about connects."""

    @property
    def permits(self) -> bool:
        """True for the reasons that let a connect through."""
        return self <= Reason.DEFAULT_ALLOW

    @property
    def label(self) -> str:
        """The reason as it is printed and as it stands in JSON: ``not-listed``."""
        return self.name.lower().replace("_", "-")


# --- ports ----------------------------------------------------------------------------------------------------------


def normal_ports(ranges: Iterable[tuple[int, int]]) -> Ports:
    """The same ports as disjoint ascending ranges that do not touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if not 0 <= low <= high <= 65535:
            raise BadPolicy(f"{low}-{high} is not a range of ports")
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def minus_ports(ports: Ports, taken: Ports) -> Ports:
    """The ports of ``ports`` that are not in ``taken``."""
    rest = list(ports)
    for low, high in taken:
        split: list[tuple[int, int]] = []
        for a, b in rest:
            if b < low or a > high:
                split.append((a, b))
                continue
            if a < low:
                split.append((a, low - 1))
            if b > high:
                split.append((high + 1, b))
        rest = split
    return tuple(rest)


def common_ports(one: Ports, other: Ports) -> Ports:
    """The ports that are in both."""
    return minus_ports(one, minus_ports(one, other))


def has_port(ports: Ports, port: int) -> bool:
    """True when ``port`` is in one of the ranges."""
    return any(low <= port <= high for low, high in ports)


# --- the parts of a policy ------------------------------------------------------------------------------------------


def unmapped(address: Address) -> Address:
    """``::ffff:a.b.c.d`` as the IPv4 address that it means, without a scope; any other address as it is."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or ipaddress.IPv6Address(int(address))
    return address


class Endpoint(NamedTuple):
    """A locked address or prefix, with its locked ports for each protocol."""

    network: Network
    tcp: Ports = NO_PORTS
    udp: Ports = NO_PORTS

    def ports(self, protocol: Protocol) -> Ports:
        """The locked ports for one protocol."""
        return self.tcp if protocol is Protocol.TCP else self.udp

    def covers(self, address: Address) -> bool:
        """True when ``address`` (not a mapped one) lies in the prefix. An IPv6 prefix never covers IPv4."""
        return address.version == self.network.version and address in self.network

    def sort_key(self) -> tuple[int, int, int]:
        """IPv4 first, then by address, then the shorter prefix."""
        return (self.network.version, int(self.network.network_address), self.network.prefixlen)


class Identities(NamedTuple):
    """User IDs and group IDs of the initial user namespace. gid 0 is not uid 0."""

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
        """Every group that one of the lists names."""
        return self.allow.groups | self.deny.groups


class Policy(NamedTuple):
    """All locks of a machine. Make one with ``make_policy()``, which checks it and gives it its normal form."""

    locks: tuple[Lock, ...]
    mode: Mode = Mode.ENFORCE
    containers: Verdict = Verdict.DENY
    strict: bool = False
    """Packets, too, are held to it: those of sockets whose connect nobody approved are dropped."""


def make_policy(
    locks: Iterable[Lock], mode: Mode = Mode.ENFORCE, containers: Verdict = Verdict.DENY, strict: bool = False
) -> Policy:
    """A checked policy in normal form: equal policies compare equal.

    Locks are sorted by name, endpoints of a lock by address, and endpoints of one lock with the same prefix are merged.
    Raises BadPolicy.
    """
    normal = tuple(sorted((_normal_lock(lock) for lock in locks), key=lambda lock: lock.name))
    _check_names(normal)
    _check_ids(normal)
    _check_overlaps(normal)
    return Policy(normal, mode, containers, strict)


MAX_LOCK_NAME_BYTES = 63
MAX_ID = 0xFFFFFFFE
"""4294967295 is (uid_t)-1, "no user" (setresuid(2))."""


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
                f"lock {lock.name!r}: {endpoint.network.network_address} is no address that a connect can reach; one "
                "that names it is judged as going to the socket's own address"
            )
        if not endpoint.tcp and not endpoint.udp:
            raise BadPolicy(f"lock {lock.name!r}: {endpoint.network} has no ports")
    if not merged:
        raise BadPolicy(f"lock {lock.name!r} has no endpoint")
    return lock._replace(endpoints=tuple(sorted(merged.values(), key=Endpoint.sort_key)))


def _normal_network(network: Network) -> Network:
    """A prefix inside ::ffff:0:0/96 as the IPv4 prefix that it means."""
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((int(mapped), network.prefixlen - 96))
    return network


def _check_names(locks: Sequence[Lock]) -> None:
    for earlier, later in zip(locks, locks[1:]):
        if earlier.name == later.name:
            raise BadPolicy(f"two locks are called {later.name!r}")
    for lock in locks:
        length = len(lock.name.encode())
        if not 1 <= length <= MAX_LOCK_NAME_BYTES or not lock.name.isprintable():
            raise BadPolicy(f"{lock.name!r} is no lock name: 1 to {MAX_LOCK_NAME_BYTES} printable octets")


def _check_ids(locks: Sequence[Lock]) -> None:
    for lock in locks:
        for number in (*lock.allow.users, *lock.allow.groups, *lock.deny.users, *lock.deny.groups):
            if not 0 <= number <= MAX_ID:
                raise BadPolicy(f"lock {lock.name!r}: {number} is not a user or group ID (0 to {MAX_ID})")


def _check_overlaps(locks: Sequence[Lock]) -> None:
    """Two locks may not claim the same prefix, protocol and port: neither would be the more specific one."""
    claimed: dict[Network, list[tuple[str, Endpoint]]] = {}
    for lock in locks:
        for endpoint in lock.endpoints:
            for name, other in claimed.setdefault(endpoint.network, []):
                for protocol in Protocol:
                    both = common_ports(endpoint.ports(protocol), other.ports(protocol))
                    if both:
                        raise BadPolicy(
                            f"locks {name!r} and {lock.name!r} both claim {endpoint.network} "
                            f"{protocol.value} port {both[0][0]}"
                        )
            claimed[endpoint.network].append((lock.name, endpoint))


# --- who connects where ---------------------------------------------------------------------------------------------


class Caller(NamedTuple):
    """The credentials of the connecting task, as IDs of the initial user namespace (credentials(7))."""

    fsuid: int
    fsgid: int
    groups: frozenset[int] = frozenset()
    pid_namespace_is_initial: bool = True
    user_namespace_is_initial: bool = True
    kernel_thread: bool = False

    @property
    def in_container(self) -> bool:
        """True when the task lives in a PID or user namespace other than the host's."""
        return not (self.pid_namespace_is_initial and self.user_namespace_is_initial)


class Destination(NamedTuple):
    """Where a connect goes: address as it was given, port in host byte order."""

    address: Address
    port: int
    protocol: Protocol = Protocol.TCP


class Source(NamedTuple):
    """What the kernel would take as a socket's source, which is where 0.0.0.0 leads.

    ``address`` is None when the socket is not bound. ``by_device`` is True when the kernel picks the address of an
    interface that the hook can't know: SO_BINDTODEVICE, or a UDP socket, whose IP_PKTINFO no hook sees.
    Source: ip_route_output_key_hash_rcu() in Linux net/ipv4/route.c, "if (!fl4->daddr)".
    """

    address: Address | None = None
    by_device: bool = False


UNBOUND = Source()


class Decision(NamedTuple):
    """The outcome for one connect. ``lock`` is None when nothing is locked there."""

    allowed: bool
    reason: Reason
    lock: str | None = None
    matched: tuple[str, int] | None = None
    """The list entry that decided: ("user", uid) or ("group", gid). Decisions that differ in it alone are equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and tuple(self[:3]) == tuple(other[:3])

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(self[:3]))


# --- the decision ---------------------------------------------------------------------------------------------------


def decide(policy: Policy, caller: Caller, destination: Destination, source: Source = UNBOUND) -> Decision:
    """Whether ``caller`` may connect to ``destination``, and why."""
    address = resolve_unspecified(destination.address, source)
    if address is None:
        if _claimed_anywhere(policy, destination):
            return _decision(policy, Reason.UNSPECIFIED_DESTINATION, None)
        return Decision(True, Reason.NOT_LOCKED)
    lock = find_lock(policy, destination._replace(address=address))
    if lock is None:
        return Decision(True, Reason.NOT_LOCKED)
    reason, matched = _judge(policy, lock, caller)
    return _decision(policy, reason, lock.name, matched)


def _decision(policy: Policy, reason: Reason, lock: str | None, matched: tuple[str, int] | None = None) -> Decision:
    return Decision(reason.permits or policy.mode is Mode.AUDIT, reason, lock, matched)


def resolve_unspecified(destination: Address, source: Source) -> Address | None:
    """Where a connect to 0.0.0.0 or :: leads; None when that can't be told. Any other address is itself.

    Mapped addresses come out as IPv4.
    """
    address = unmapped(destination)
    if int(address) != 0:
        return address
    if source.address is not None and int(unmapped(source.address)) != 0:
        return unmapped(source.address)
    if source.by_device and address.version == 4:
        return None
    return ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")


def find_lock(policy: Policy, destination: Destination) -> Lock | None:
    """The lock with the most specific endpoint that matches address, protocol and port."""
    best: Lock | None = None
    best_length = -1
    for lock in policy.locks:
        for endpoint in lock.endpoints:
            if endpoint.network.prefixlen <= best_length or not endpoint.covers(destination.address):
                continue
            if has_port(endpoint.ports(destination.protocol), destination.port):
                best, best_length = lock, endpoint.network.prefixlen
    return best


def _claimed_anywhere(policy: Policy, destination: Destination) -> bool:
    """True when some IPv4 endpoint locks this protocol and port, whatever its address."""
    return any(
        endpoint.network.version == 4 and has_port(endpoint.ports(destination.protocol), destination.port)
        for lock in policy.locks
        for endpoint in lock.endpoints
    )


def _judge(policy: Policy, lock: Lock, caller: Caller) -> tuple[Reason, tuple[str, int] | None]:
    """Kernel threads, containers, deny lists, allow lists, default: the first that speaks decides."""
    if caller.kernel_thread:
        return Reason.KERNEL_THREAD, None
    if caller.in_container and policy.containers is Verdict.DENY:
        return Reason.CONTAINER, None
    if caller.fsuid in lock.deny.users:
        return Reason.DENIED_USER, ("user", caller.fsuid)
    refused = _match_groups(lock, lock.deny.groups, caller)
    if refused is not None:
        return (refused, None) if isinstance(refused, Reason) else (Reason.DENIED_GROUP, ("group", refused[0]))
    if caller.fsuid in lock.allow.users:
        return Reason.ALLOWED_USER, ("user", caller.fsuid)
    listed = _match_groups(lock, lock.allow.groups, caller)
    if listed is not None:
        return (listed, None) if isinstance(listed, Reason) else (Reason.ALLOWED_GROUP, ("group", listed[0]))
    return _default(lock, caller), None


def _match_groups(lock: Lock, wanted: frozenset[int], caller: Caller) -> Reason | tuple[int] | None:
    """The caller's group that is wanted, in a tuple; TOO_MANY_GROUPS when that is more than can be searched; or None.

    The primary group need not be among the supplementary ones: in_group_p() in Linux kernel/groups.c looks at both.
    """
    if caller.fsgid in wanted:
        return (caller.fsgid,)
    if not wanted:
        return None
    if len(caller.groups) > MAX_WALKED_GROUPS and len(lock.listed_groups) > MAX_SEARCHED_GROUPS:
        return Reason.TOO_MANY_GROUPS
    found = wanted & caller.groups
    return (min(found),) if found else None


def _default(lock: Lock, caller: Caller) -> Reason:
    """A mapped ID would slip past a deny list, so "allow by default" holds in the initial user namespace alone."""
    if lock.default is Verdict.DENY:
        return Reason.NOT_LISTED
    if not caller.user_namespace_is_initial:
        return Reason.USER_NAMESPACE
    return Reason.DEFAULT_ALLOW
