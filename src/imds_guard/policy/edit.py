# SPDX-License-Identifier: Apache-2.0
"""Changes the allowlists of a policy, for ``allow`` and ``revoke``. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable

from imds_guard.errors import UsageError
from imds_guard.policy.builtin import WIRESERVER, host_network
from imds_guard.policy.endpoint_syntax import format_endpoint
from imds_guard.policy.filters import Filter, follow_split
from imds_guard.policy.lockdown import divide, free_name, inside_prefixes
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, Verdict, make_policy

Change = Callable[[Lock], Lock]


def without_ipv6(policy: Policy) -> Policy:
    """The policy where no IPv6 exists. May have no locks."""
    kept = {lock: tuple(one for one in lock.endpoints if one.network.version == 4) for lock in policy.locks}
    return policy._replace(locks=tuple(lock._replace(endpoints=found) for lock, found in kept.items() if found))


def allow(policy: Policy, who: Identities, endpoint: Endpoint | None = None) -> Policy:
    """The policy with ``who`` on the allowlist of every lock, or only at ``endpoint``. Raises UsageError, BadPolicy."""

    def change(lock: Lock) -> Lock:
        return lock._replace(allow=Identities(lock.allow.users | who.users, lock.allow.groups | who.groups))

    return _change(policy, endpoint, change)


def revoke(policy: Policy, who: Identities, endpoint: Endpoint | None = None) -> Policy:
    """The policy without ``who`` on the allowlist of every lock, or only at ``endpoint``. Raises UsageError, BadPolicy.

    User 0 stays on the WireServer's list. A lock that allows by default is refused: ``who`` would still be allowed.
    """

    def change(lock: Lock) -> Lock:
        if lock.default is Verdict.ALLOW:
            raise UsageError(
                f"revoking under lock {lock.name!r}: it allows everyone who is not on its deny list, so this would "
                "deny nobody; start again with --deny-user or --deny-group"
            )
        users = lock.allow.users - who.users
        if _is_wireserver(lock):
            users |= lock.allow.users & {0}
        return lock._replace(allow=Identities(users, lock.allow.groups - who.groups))

    return _change(policy, endpoint, change)


def take_back(policy: Policy, endpoints: Iterable[Endpoint], who: Identities) -> Policy:
    """The policy without ``who`` on the allowlists at these endpoints. What nobody locks there any more is left out.

    A lock with other endpoints too is split. The policy may have become another one since ``who`` was allowed.
    """
    asked = tuple(endpoints)
    names = {lock.name for lock in policy.locks}
    filters = policy.filters
    locks: list[Lock] = []
    for lock in policy.locks:
        allow = Identities(lock.allow.users - who.users, lock.allow.groups - who.groups)
        inside, outside = _parts(lock, asked)
        if allow == lock.allow or not inside:
            locks.append(lock)
        elif not outside:
            locks.append(lock._replace(allow=allow))
        else:
            name = free_name(inside[0], names)
            filters = follow_split(filters, lock.name, name)
            locks += [lock._replace(endpoints=outside), lock._replace(name=name, endpoints=inside, allow=allow)]
    return make_policy(locks, policy.mode, policy.containers, policy.strict, filters, policy.filter_uid)


def _parts(lock: Lock, endpoints: Iterable[Endpoint]) -> tuple[tuple[Endpoint, ...], tuple[Endpoint, ...]]:
    """divide() by several endpoints."""
    found: tuple[Endpoint, ...] = ()
    rest = lock
    for endpoint in endpoints:
        inside, outside = divide(rest, endpoint)
        found, rest = found + inside, rest._replace(endpoints=outside)
    return found, rest.endpoints


def _change(policy: Policy, endpoint: Endpoint | None, change: Change) -> Policy:
    """The policy with other allowlists. Filters serve what they served before."""
    filters = policy.filters
    if endpoint is None:
        _check_alike(policy)
        locks = [change(lock) for lock in policy.locks]
    else:
        locks, filters = _change_at(policy, endpoint, change)
    return make_policy(locks, policy.mode, policy.containers, policy.strict, filters, policy.filter_uid)


def _check_alike(policy: Policy) -> None:
    """Without --ip all locks change. That is clear only when they have the same allowlist."""
    if not are_alike(policy):
        names = "; ".join(f"{lock.name!r}: --ip {format_endpoint(lock.endpoints[0])[0]}" for lock in policy.locks)
        raise UsageError(f"the locks have different allowlists: choose one ({names})")


def are_alike(policy: Policy) -> bool:
    """True when all allowlists are equal, apart from user 0, who is always on the WireServer's."""
    others = {lock.allow for lock in policy.locks if not _is_wireserver(lock)}
    with_root = {Identities(lock.allow.users | {0}, lock.allow.groups) for lock in policy.locks}
    return len(others) <= 1 and len(with_root) <= 1


def _is_wireserver(lock: Lock) -> bool:
    """True for a lock with the WireServer's address. Its name can be any."""
    return any(endpoint.network == host_network(WIRESERVER) for endpoint in lock.endpoints)


def _change_at(policy: Policy, endpoint: Endpoint, change: Change) -> tuple[list[Lock], tuple[Filter, ...]]:
    """The locks with ``change`` applied at ``endpoint`` only, and the filters.

    A lock with other endpoints too is split in two. Both parts keep its lists and filters, apart from the change.
    """
    filters = policy.filters
    names = {lock.name for lock in policy.locks}
    locks: list[Lock] = []
    found = False
    for lock in policy.locks:
        inside, outside = divide(lock, endpoint)
        if not inside or not outside:
            found = found or bool(inside)
            locks.append(change(lock) if inside else lock)
            continue
        found = True
        changed = change(lock._replace(endpoints=inside))
        if changed.allow == lock.allow:
            locks.append(lock)  # The two parts would be equal.
            continue
        changed = changed._replace(name=free_name(endpoint, names))
        filters = follow_split(filters, lock.name, changed.name)
        locks += [lock._replace(endpoints=outside), changed]
    if not found:
        locks, found = _change_within(policy, endpoint, change, names)
    if not found:
        raise UsageError(f"no lock contains {format_endpoint(endpoint)[0]}: imds-guard status lists the endpoints")
    return locks, filters


def _change_within(policy: Policy, endpoint: Endpoint, change: Change, names: set[str]) -> tuple[list[Lock], bool]:
    """The locks with one added for ``endpoint`` inside the prefixes around it; False when there is no prefix.

    The new lock takes effect because the most specific endpoint decides.
    """
    inherited, _ = inside_prefixes(policy.locks, endpoint)
    changed = [(lock, change(lock)) for lock in inherited]
    added = [new._replace(name=free_name(endpoint, names)) for old, new in changed if new.allow != old.allow]
    return [*policy.locks, *added], bool(inherited)
