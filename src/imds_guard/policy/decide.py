# SPDX-License-Identifier: Apache-2.0
"""The specification: ``decide()`` says whether a caller may connect to a destination, and why.

Every backend is compared with it. Nothing here touches the system.
"""

from __future__ import annotations

import enum
import ipaddress
from typing import NamedTuple

from imds_guard.policy.filter_address import is_filter_address
from imds_guard.policy.filters import FILTER_NETWORK, Filter, Target, targets_of
from imds_guard.policy.model import Address, Lock, Mode, Policy, Protocol, Verdict, unmapped
from imds_guard.policy.ports import has_port

MAX_WALKED_GROUPS = 1024
"""A caller with at most this many supplementary groups is compared with any number of listed groups."""
MAX_SEARCHED_GROUPS = 128
"""A caller with more groups is compared with at most this many listed groups of a lock. Beyond both, it is denied."""


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
    """Strict mode only: a packet of a socket that is not approved (any more). decide() never returns it."""
    FILTERED = 15
    """The caller reaches its filter in place of the endpoint. In audit mode it reaches the endpoint."""
    NOT_SERVED = 16
    """A filter names the caller, and can't serve this port, or a socket that is bound like this one."""
    NO_FILTER = 17
    """Nothing listens where the caller's filter should: it is dead, or in another network namespace."""
    FILTER_ADDRESS = 18
    """The destination is the address of a filter's listener, where nobody may connect to directly."""

    @property
    def permits(self) -> bool:
        """True for the reasons that let a connect through, to the endpoint or to a filter."""
        return self <= Reason.DEFAULT_ALLOW or self is Reason.FILTERED

    @property
    def label(self) -> str:
        """The reason as printed, in text and in JSON: ``not-listed``."""
        return self.name.lower().replace("_", "-")


# --- the question and the answer ------------------------------------------------------------------------------------


class Caller(NamedTuple):
    """The credentials of the connecting task, as IDs of the initial user namespace (credentials(7))."""

    fsuid: int
    fsgid: int
    groups: frozenset[int] = frozenset()
    pid_namespace_is_initial: bool = True
    user_namespace_is_initial: bool = True
    kernel_thread: bool = False
    repeated_groups: int = 0
    """How many entries of the kernel's list of groups repeat another one: setgroups(2) keeps them."""

    @property
    def in_container(self) -> bool:
        """True when the task's PID or user namespace is not the initial one."""
        return not (self.pid_namespace_is_initial and self.user_namespace_is_initial)


class Destination(NamedTuple):
    """Where a connect goes: the address as the caller gave it, the port in host byte order."""

    address: Address
    port: int
    protocol: Protocol = Protocol.TCP


class Source(NamedTuple):
    """The source address of a socket: the kernel sends a connect to 0.0.0.0 there.

    ``address`` is None when the socket is not bound. ``by_device`` is True when the kernel takes the address of an
    interface that the hook can't know: with SO_BINDTODEVICE, and for UDP sockets, whose IP_PKTINFO no hook sees.
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
    filter: str | None = None
    """The name of the caller's filter, for FILTERED, NOT_SERVED and NO_FILTER."""
    matched: tuple[str, int] | None = None
    """The list entry that decided: ("user", uid) or ("group", gid). Not compared by ==."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and tuple(self[:4]) == tuple(other[:4])

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(self[:4]))


# --- the decision ---------------------------------------------------------------------------------------------------


def decide(
    policy: Policy,
    caller: Caller,
    destination: Destination,
    source: Source = UNBOUND,
    *,
    filter_listens: bool = True,
) -> Decision:
    """Whether ``caller`` may connect to ``destination``, and why.

    ``filter_listens``: whether the caller's filter has its listener in the network namespace of the socket. Only the
    kernel knows.
    """
    address = resolve_unspecified(destination.address, source)
    if address is None:
        if is_locked_anywhere(policy, destination):
            return _decision(policy, Reason.UNSPECIFIED_DESTINATION, None)
        return Decision(True, Reason.NOT_LOCKED)
    resolved = destination._replace(address=address)
    if policy.filters and is_filter_address(*resolved):
        return _decision(policy, Reason.FILTER_ADDRESS, None)
    lock = find_lock(policy, resolved)
    if lock is None:
        return Decision(True, Reason.NOT_LOCKED)
    return _at_lock(policy, lock, caller, resolved, source, filter_listens)


def decide_by_rules(policy: Policy, caller: Caller, destination: Destination) -> Decision:
    """decide() under iptables, where nobody is led to a filter by IPv6."""
    found = decide(policy, caller, destination)
    if found.reason is Reason.FILTERED and unmapped(destination.address).version == 6:
        return found._replace(allowed=policy.mode is Mode.AUDIT, reason=Reason.NOT_SERVED)
    return found


def _decision(policy: Policy, reason: Reason, lock: str | None, matched: tuple[str, int] | None = None) -> Decision:
    return Decision(reason.permits or policy.mode is Mode.AUDIT, reason, lock, matched=matched)


def _at_lock(
    policy: Policy, lock: Lock, caller: Caller, destination: Destination, source: Source, filter_listens: bool
) -> Decision:
    """The decision where a lock is known."""
    is_account = caller.fsuid == policy.filter_uid and any(_serves(one, lock, destination) for one in policy.filters)
    reason, matched = _reason(policy, lock, caller, is_account)
    if reason is not None:
        return _decision(policy, reason, lock.name, matched)
    found = _filter_of(policy, lock, caller)
    if found is None:
        return _decision(policy, _default(lock, caller), lock.name)
    if isinstance(found, Reason):
        return _decision(policy, found, lock.name)
    if not _serves(found, lock, destination) or not _can_redirect(source):
        reason = Reason.NOT_SERVED
    else:
        reason = Reason.FILTERED if filter_listens or policy.mode is Mode.AUDIT else Reason.NO_FILTER
    return _decision(policy, reason, lock.name)._replace(filter=found.name)


def resolve_unspecified(destination: Address, source: Source) -> Address | None:
    """The address that a connect to ``destination`` reaches; None when the hook can't know it.

    Only 0.0.0.0 and :: lead to another address. An IPv4-mapped address is returned as IPv4.
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


def is_locked_anywhere(policy: Policy, destination: Destination) -> bool:
    """True when some IPv4 endpoint locks this protocol and port, whatever its address."""
    if policy.filters and is_filter_address(FILTER_NETWORK[0], destination.port, destination.protocol):
        return True
    return any(
        endpoint.network.version == 4 and has_port(endpoint.ports(destination.protocol), destination.port)
        for lock in policy.locks
        for endpoint in lock.endpoints
    )


def _reason(
    policy: Policy, lock: Lock, caller: Caller, is_account: bool
) -> tuple[Reason | None, tuple[str, int] | None]:
    """The reason, and the list entry that gave it. Checked in this order; the first rule that matches decides.

    None: no list decides. ``is_account``: the filters run as this user, and connect to what they serve.
    """
    if caller.kernel_thread:
        return Reason.KERNEL_THREAD, None
    if caller.in_container and policy.containers is Verdict.DENY:
        return Reason.CONTAINER, None
    if caller.fsuid in lock.deny.users:
        return Reason.DENIED_USER, ("user", caller.fsuid)
    denied = _match_groups(lock, lock.deny.groups, caller)
    if denied is not None:
        return (denied, None) if isinstance(denied, Reason) else (Reason.DENIED_GROUP, ("group", denied[0]))
    if caller.fsuid in lock.allow.users:
        return Reason.ALLOWED_USER, ("user", caller.fsuid)
    allowed = _match_groups(lock, lock.allow.groups, caller)
    if allowed is not None:
        return (allowed, None) if isinstance(allowed, Reason) else (Reason.ALLOWED_GROUP, ("group", allowed[0]))
    return (Reason.ALLOWED_USER, ("user", caller.fsuid)) if is_account else (None, None)


def _match_groups(lock: Lock, wanted: frozenset[int], caller: Caller) -> Reason | tuple[int] | None:
    """A group of the caller that is among ``wanted``, in a tuple; None when there is none; or TOO_MANY_GROUPS.

    TOO_MANY_GROUPS means that a backend can't search them all; repeated ones count. The primary group need not be a
    supplementary one too: in_group_p() in Linux kernel/groups.c looks at both.
    """
    if caller.fsgid in wanted:
        return (caller.fsgid,)
    if not wanted:
        return None
    if _has_many_groups(caller) and len(lock.listed_groups) > MAX_SEARCHED_GROUPS:
        return Reason.TOO_MANY_GROUPS
    found = wanted & caller.groups
    return (min(found),) if found else None


def _has_many_groups(caller: Caller) -> bool:
    return len(caller.groups) + caller.repeated_groups > MAX_WALKED_GROUPS


def _filter_of(policy: Policy, lock: Lock, caller: Caller) -> Filter | Reason | None:
    """The first filter of a lock that names the caller, or the reason to deny it.

    Groups of filters are never searched: with many groups nobody can tell which filter is the first. "Everyone" is
    everyone in the initial user namespace: in another one, a user of an earlier filter can take an ID that it does not
    list.
    """
    serving = [one for one in policy.filters if lock.name in one.locks]
    if _has_many_groups(caller) and any(one.who.groups for one in serving):
        return Reason.TOO_MANY_GROUPS
    groups = caller.groups | {caller.fsgid}
    for one in serving:
        if caller.fsuid in one.who.users or groups & one.who.groups:
            return one
        if one.everyone:
            return one if caller.user_namespace_is_initial else Reason.USER_NAMESPACE
    return None


def _serves(one: Filter, lock: Lock, destination: Destination) -> bool:
    """Whether a filter passes on what is sent to this endpoint of the lock."""
    target = Target(destination.address, destination.port)
    return destination.protocol is Protocol.TCP and target in targets_of(one, (lock,))


def _can_redirect(source: Source) -> bool:
    """False for a socket that can't connect to an IPv4 address on loopback, by its interface or its own address."""
    return not source.by_device and (source.address is None or _is_unspecified_or_ipv4(source.address))


def _is_unspecified_or_ipv4(address: Address) -> bool:
    return unmapped(address).version == 4 or int(address) == 0


def _default(lock: Lock, caller: Caller) -> Reason:
    """The outcome for a caller on no list.

    "Allow" holds only in the initial user namespace: in another one, a listed user can take an ID that is not listed.
    """
    if lock.default is Verdict.DENY:
        return Reason.NOT_LISTED
    if not caller.user_namespace_is_initial:
        return Reason.USER_NAMESPACE
    return Reason.DEFAULT_ALLOW
