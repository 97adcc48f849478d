# SPDX-License-Identifier: Apache-2.0
"""What ``ip-lockdown IP [USER...]`` makes of a policy: that address for these users too, and no other lock touched."""

from __future__ import annotations

from collections.abc import Iterable

from imds_guard.errors import BadPolicy
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, Verdict, make_policy
from imds_guard.policy.ports import common_ports, minus_ports
from imds_guard.policy.wireserver import split_off_wireserver


def lockdown(policy: Policy | None, ip: str, users: Iterable[int] = ()) -> Policy:
    """``policy`` with the endpoint ``ip`` denied to everyone but ``users`` and whom a lock there lets through already.

    A lock that holds the endpoint among others is split, and both parts keep its lists. Ports of the endpoint that no
    lock holds get one of their own. A lock that allows by default denies by default there afterwards. The same call
    again changes nothing. Raises BadPolicy, also for a user whom a deny list there would still keep out.
    """
    endpoint = parse_endpoint(ip)
    added = frozenset(users)
    old = policy.locks if policy is not None else ()
    names = {lock.name for lock in old}
    locks: list[Lock] = []
    open_yet = endpoint
    for lock in old:
        inside, outside = divide(lock, endpoint)
        open_yet = _without(open_yet, inside)
        if not inside:
            locks.append(lock)
            continue
        _check_not_denied(lock, added)
        name = free_name(endpoint, names) if outside else lock.name
        locks += [lock._replace(endpoints=outside)] if outside else []
        allow = Identities(lock.allow.users | added, lock.allow.groups)
        locks.append(lock._replace(name=name, endpoints=inside, allow=allow, default=Verdict.DENY))
    if open_yet.tcp or open_yet.udp:
        locks += split_off_wireserver(Lock(free_name(endpoint, names), (open_yet,), Identities(added)))
    if policy is None:
        return make_policy(locks)
    return make_policy(locks, policy.mode, policy.containers, policy.strict)


def divide(lock: Lock, endpoint: Endpoint) -> tuple[tuple[Endpoint, ...], tuple[Endpoint, ...]]:
    """The lock's endpoints as what ``endpoint`` covers on the same prefix, and the rest."""
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


def _without(endpoint: Endpoint, taken: Iterable[Endpoint]) -> Endpoint:
    for one in taken:
        endpoint = Endpoint(endpoint.network, minus_ports(endpoint.tcp, one.tcp), minus_ports(endpoint.udp, one.udp))
    return endpoint


def _check_not_denied(lock: Lock, users: Iterable[int]) -> None:
    shut_out = sorted(set(users) & lock.deny.users)
    if shut_out:
        raise BadPolicy(
            f"user {shut_out[0]} is on the deny list of lock {lock.name!r}, which wins: "
            "take the user off that list first"
        )


def free_name(endpoint: Endpoint, names: set[str]) -> str:
    """The address, with a number behind it when a lock is called that; noted in ``names``."""
    network = endpoint.network
    base = str(network if network.prefixlen < network.max_prefixlen else network.network_address)
    name, number = base, 2
    while name in names:
        name, number = f"{base} ({number})", number + 1
    names.add(name)
    return name
