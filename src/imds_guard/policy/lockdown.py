# SPDX-License-Identifier: Apache-2.0
"""Adds one locked address to a policy, for ``ip-lockdown IP [USER...]``. No other lock changes. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from imds_guard.errors import BadPolicy
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.filters import follow_split
from imds_guard.policy.model import Endpoint, Identities, Lock, Network, Policy, Verdict, make_policy
from imds_guard.policy.ports import common_ports, minus_ports
from imds_guard.policy.wireserver import split_off_wireserver


def lockdown(policy: Policy | None, ip: str, users: Iterable[int] = ()) -> Policy:
    """The policy that denies ``ip`` to everyone but ``users`` and those on the allowlist of a lock there.

    A lock with other endpoints too is split in two, and both parts keep its lists. Ports that a prefix around the
    endpoint locks get a lock with the prefix's lists, ports that are not locked yet one with ``users`` alone. A lock
    there that allows by default denies by default afterwards. A second call changes nothing. Raises BadPolicy, also
    when a deny list there contains one of ``users``.
    """
    endpoint = parse_endpoint(ip)
    added = frozenset(users)
    old = policy.locks if policy is not None else ()
    names = {lock.name for lock in old}
    locks: list[Lock] = []
    filters = policy.filters if policy is not None else ()
    unlocked = endpoint
    for lock in old:
        inside, outside = divide(lock, endpoint)
        unlocked = _without(unlocked, inside)
        if not inside:
            locks.append(lock)
            continue
        _check_not_denied(lock, added)
        name = free_name(endpoint, names) if outside else lock.name
        if outside:
            locks.append(lock._replace(endpoints=outside))
            filters = follow_split(filters, lock.name, name)
        allow = Identities(lock.allow.users | added, lock.allow.groups)
        locks.append(lock._replace(name=name, endpoints=inside, allow=allow, default=Verdict.DENY))
    inherited, unlocked = inside_prefixes(old, unlocked)
    for lock in inherited:
        _check_not_denied(lock, added)
        allow = Identities(lock.allow.users | added, lock.allow.groups)
        locks.append(lock._replace(name=free_name(endpoint, names), allow=allow, default=Verdict.DENY))
    if unlocked.tcp or unlocked.udp:
        locks += split_off_wireserver(Lock(free_name(endpoint, names), (unlocked,), Identities(added)))
    if policy is None:
        return make_policy(locks)
    return make_policy(locks, policy.mode, policy.containers, policy.strict, filters, policy.filter_uid)


def inside_prefixes(locks: Iterable[Lock], endpoint: Endpoint) -> tuple[list[Lock], Endpoint]:
    """The ports of ``endpoint`` that prefixes around it lock, with the lists there; and the rest.

    The most specific endpoint decides. Without these lists, whoever the prefix lets through would lose that right, and
    whoever it denies could be allowed.
    """
    around = [(lock, one) for lock in locks for one in lock.endpoints if _is_around(one.network, endpoint.network)]
    around.sort(key=lambda pair: pair[1].network.prefixlen, reverse=True)
    found: list[Lock] = []
    for lock, one in around:
        common = Endpoint(endpoint.network, common_ports(one.tcp, endpoint.tcp), common_ports(one.udp, endpoint.udp))
        if common.tcp or common.udp:
            found.append(lock._replace(endpoints=(common,)))
            endpoint = _without(endpoint, [common])
    return found, endpoint


def _is_around(network: Network, inner: Network) -> bool:
    """True for the same prefix, too."""
    return network.version == inner.version and inner.subnet_of(network)  # type: ignore[arg-type]


def divide(lock: Lock, endpoint: Endpoint) -> tuple[tuple[Endpoint, ...], tuple[Endpoint, ...]]:
    """The lock's endpoints in two parts: the ports of ``endpoint`` on the same prefix, and the rest."""
    inside: list[Endpoint] = []
    outside: list[Endpoint] = []
    for one in lock.endpoints:
        if one.network != endpoint.network:
            outside.append(one)
            continue
        common = Endpoint(one.network, common_ports(one.tcp, endpoint.tcp), common_ports(one.udp, endpoint.udp))
        inside += [common] if common.tcp or common.udp else []
        rest = _without(one, [common])
        outside += [rest] if rest.tcp or rest.udp else []
    return tuple(inside), tuple(outside)


def _without(endpoint: Endpoint, removed: Iterable[Endpoint]) -> Endpoint:
    for one in removed:
        endpoint = Endpoint(endpoint.network, minus_ports(endpoint.tcp, one.tcp), minus_ports(endpoint.udp, one.udp))
    return endpoint


def _check_not_denied(lock: Lock, users: Iterable[int]) -> None:
    denied = sorted(set(users) & lock.deny.users)
    if denied:
        raise BadPolicy(
            f"user {denied[0]} is on the deny list of lock {lock.name!r}, and deny lists win: "
            "take the user off that list first"
        )


def free_name(endpoint: Endpoint, names: set[str]) -> str:
    """A name for a lock of ``endpoint``, which is added to ``names``: its address, with a number when that is taken."""
    network = endpoint.network
    base = str(network if network.prefixlen < network.max_prefixlen else network.network_address)
    name, number = base, 2
    while name in names:
        name, number = f"{base} ({number})", number + 1
    names.add(name)
    return name
