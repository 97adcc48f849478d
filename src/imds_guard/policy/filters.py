# SPDX-License-Identifier: Apache-2.0
"""Filters: who may send which requests to a lock's endpoints without being let through, and what is served for that.

A filter is a service that connects in place of the caller (docs/filter.md). policy/requests.py judges a request.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from imds_guard.errors import BadPolicy
from imds_guard.policy.ports import has_port

if TYPE_CHECKING:
    from imds_guard.policy.model import Address, Identities, Lock, Network, Policy

FILTER_USER = "imds-guard-filter"
"""The account of the service."""
FILTER_SOCKET = "filter.sock"
"""Where it listens for the commands, in /run/imds-guard."""
MAX_FILTERS = 24
"""A member's verdict word has bits 8 to 31 for filters."""
MAX_TARGETS = 254
"""The number of a target is the third byte of 127.169.T.F."""
MAX_RULES_BYTES = 64 * 1024
"""Of one filter. Each request is compared with all of them."""
PLAIN_HTTP = 80
FILTER_NETWORK = ipaddress.IPv4Network("127.169.0.0/16")
"""Filters listen in it: policy/filter_address.py."""
FILTER_PORT = 169


class FilterRules(NamedTuple):
    """Which requests a filter passes on. The grammar of a pattern is in policy/path_pattern.py."""

    allow: tuple[str, ...] = ()
    """``GET /*/meta-data/placement/**``. A request that no entry matches is refused."""
    deny: tuple[str, ...] = ()
    """These beat ``allow``."""
    headers: str | None = None
    """The name of a built-in check of headers, ``ec2-metadata-filter``."""
    user_agents: tuple[str, ...] = ()
    """Beginnings of User-Agent, in place of those that ``headers`` accepts."""
    require_imdsv2: bool = False
    audit: bool = False
    """Pass on what the rules refuse, and record it."""
    sets: tuple[str, ...] = ()
    """Names of built-in rules (``no-credentials``). They are added to ``allow`` and ``deny``."""


class Filter(NamedTuple):
    """Callers that no list of a lock lets through, and the requests that they may send there."""

    name: str
    locks: tuple[str, ...]
    """Names of locks, sorted."""
    who: Identities
    everyone: bool = False
    rules: FilterRules = FilterRules()
    port: int = PLAIN_HTTP
    """The port at which the endpoints speak plain HTTP. Their other locked ports stay denied."""


class Target(NamedTuple):
    """One address with one port, to which the service connects for a caller."""

    address: Address
    port: int

    def sort_key(self) -> tuple[int, int, int]:
        """IPv4 before IPv6, then by address and port."""
        return (self.address.version, int(self.address), self.port)


def targets(policy: Policy) -> tuple[Target, ...]:
    """What all filters of a policy serve, sorted."""
    found = {target for one in policy.filters for target in targets_of(one, policy.locks)}
    return tuple(sorted(found, key=Target.sort_key))


def targets_of(one: Filter, locks: Iterable[Lock]) -> tuple[Target, ...]:
    """What one filter serves: the single addresses of its locks whose locked TCP ports have the filter's, sorted.

    Link-local IPv6 addresses are left out: the service does not know on which interface they are. Callers of the filter
    stay denied there.
    """
    found = {
        Target(endpoint.network.network_address, one.port)
        for lock in locks
        if lock.name in one.locks
        for endpoint in lock.endpoints
        if endpoint.network.prefixlen == endpoint.network.max_prefixlen
        and has_port(endpoint.tcp, one.port)
        and not (endpoint.network.version == 6 and endpoint.network.is_link_local)
    }
    return tuple(sorted(found, key=Target.sort_key))


def normal_filter(one: Filter) -> Filter:
    """The filter with its locks sorted. The order of rules does not count either."""
    rules = one.rules._replace(
        allow=tuple(sorted(set(one.rules.allow))),
        deny=tuple(sorted(set(one.rules.deny))),
        user_agents=tuple(sorted(set(one.rules.user_agents))),
        sets=tuple(sorted(set(one.rules.sets))),
    )
    return one._replace(locks=tuple(sorted(set(one.locks))), rules=rules)


def follow_split(filters: Iterable[Filter], old: str, new: str) -> tuple[Filter, ...]:
    """The filters after endpoints of the lock ``old`` became a lock ``new``: they serve what they served before."""
    return tuple(one._replace(locks=(*one.locks, new)) if old in one.locks else one for one in filters)


def check_filters(filters: Sequence[Filter], locks: Sequence[Lock], filter_uid: int | None) -> None:
    """Raises BadPolicy, with the filter's name in quotes, for filters that can't be enforced."""
    seen: set[str] = set()
    served: set[Target] = set()
    for one in filters:
        if one.name in seen:
            raise BadPolicy(f"two filters have the name {one.name!r}")
        seen.add(one.name)
        if len(seen) > MAX_FILTERS:
            raise BadPolicy(f"filter {one.name!r} is one too many: there can be {MAX_FILTERS}")
        _check_who(one, filter_uid)
        _check_locks(one, locks)
        _check_length(one)
        served.update(targets_of(one, locks))
        if len(served) > MAX_TARGETS:
            raise BadPolicy(
                f"filter {one.name!r}: the filters have more than {MAX_TARGETS} addresses and ports to serve"
            )
    for lock in locks:
        if filters and filter_uid in lock.deny.users:
            raise BadPolicy(f"lock {lock.name!r} denies user {filter_uid}, which runs the filters")
        for endpoint in lock.endpoints:
            if filters and _is_inside(endpoint.network) and has_port(endpoint.tcp, FILTER_PORT):
                raise BadPolicy(
                    f"lock {lock.name!r}: {endpoint.network} port {FILTER_PORT} is where filters listen: it is "
                    "locked for everyone while there are filters"
                )


def _is_inside(network: Network) -> bool:
    """A prefix inside that of the listeners, or the same, would win over it in the kernel."""
    return isinstance(network, ipaddress.IPv4Network) and network.subnet_of(FILTER_NETWORK)


def _check_who(one: Filter, filter_uid: int | None) -> None:
    if one.everyone and one.who:
        raise BadPolicy(f"filter {one.name!r} is for everyone, which contradicts its users and groups")
    if filter_uid in one.who.users:
        raise BadPolicy(f"filter {one.name!r} names user {filter_uid}, which runs the filters")


def _check_length(one: Filter) -> None:
    rules = one.rules
    length = sum(len(text) + 1 for texts in (rules.allow, rules.deny, rules.user_agents) for text in texts)
    if length > MAX_RULES_BYTES:
        raise BadPolicy(f"filter {one.name!r}: its rules have {length} bytes, and the maximum is {MAX_RULES_BYTES}")


def _check_locks(one: Filter, locks: Sequence[Lock]) -> None:
    if not 1 <= one.port <= 65535:
        raise BadPolicy(f"filter {one.name!r}: {one.port} is not a port (1 to 65535)")
    known = {lock.name for lock in locks}
    unknown = next((name for name in one.locks if name not in known), None)
    if unknown is not None:
        from imds_guard.text import did_you_mean  # noqa: PLC0415 -- start-up time

        raise BadPolicy(f"filter {one.name!r}: there is no lock {unknown!r}{did_you_mean(unknown, known)}")
    if not targets_of(one, locks):
        raise BadPolicy(
            f"filter {one.name!r}: its locks have no address of one host with TCP port {one.port}, so there is nothing "
            "to filter"
        )
