# SPDX-License-Identifier: Apache-2.0
"""Broken versions of ``decide()``, each with a fault that somebody has made or could make.

A mutant is given the whole row, since some faults are in what was looked at: the real ID, the thread's process.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Callable, Dict, FrozenSet, Iterable, Optional

from imds_guard.policy import (
    UNBOUND,
    Caller,
    Decision,
    Destination,
    Endpoint,
    Identities,
    Lock,
    Mode,
    Policy,
    Protocol,
    Reason,
    Source,
    Verdict,
    decide,
    find_lock,
    resolve_unspecified,
)
from tests.conformance.model import (
    USER_NAMESPACE_OFFSET,
    Case,
    Setting,
    model_caller,
    model_destination,
    model_source,
)

Mutant = Callable[[Case], Decision]
MUTANTS: Dict[str, Mutant] = {}


def mutant(function: Mutant) -> Mutant:
    """Puts a broken decide() into the table, by its name."""
    MUTANTS[function.__name__.replace("_", "-")] = function
    return function


def judge(
    case: Case,
    *,
    policy: Optional[Policy] = None,
    caller: Optional[Caller] = None,
    destination: Optional[Destination] = None,
    source: Optional[Source] = None,
) -> Decision:
    """decide() for the row, with what is given in place of what is right."""
    return decide(
        policy or case.policy,
        caller or model_caller(case),
        destination or model_destination(case),
        source or model_source(case),
    )


def with_locks(policy: Policy, change: Callable[[Lock], Lock]) -> Policy:
    """The policy with each lock changed."""
    return replace(policy, locks=tuple(change(lock) for lock in policy.locks))


def with_ids(policy: Policy, change: Callable[[Identities], Identities]) -> Policy:
    """The policy with each list of IDs changed."""
    return with_locks(policy, lambda lock: replace(lock, allow=change(lock.allow), deny=change(lock.deny)))


def with_endpoints(policy: Policy, change: Callable[[Endpoint], Endpoint]) -> Policy:
    """The policy with each endpoint changed."""
    return with_locks(policy, lambda lock: replace(lock, endpoints=tuple(change(one) for one in lock.endpoints)))


def with_groups(case: Case, groups: Iterable[int]) -> Caller:
    """The caller with other supplementary groups."""
    return replace(model_caller(case), groups=frozenset(groups))


# --- who ------------------------------------------------------------------------------------------------------------


@mutant
def uid_from_the_gid_half(case: Case) -> Decision:
    """bpf_get_current_uid_gid() >> 32 taken for the uid."""
    caller = model_caller(case)
    return judge(case, caller=replace(caller, fsuid=caller.fsgid))


@mutant
def gid_from_the_uid_half(case: Case) -> Decision:
    """The low half taken for the gid."""
    caller = model_caller(case)
    return judge(case, caller=replace(caller, fsgid=caller.fsuid))


@mutant
def real_uid(case: Case) -> Decision:
    """The real user ID in place of the fs one."""
    return judge(case, caller=replace(model_caller(case), fsuid=case.who.uids[0] + _offset(case)))


@mutant
def effective_uid(case: Case) -> Decision:
    """The effective user ID in place of the fs one."""
    return judge(case, caller=replace(model_caller(case), fsuid=case.who.uids[1] + _offset(case)))


@mutant
def saved_uid(case: Case) -> Decision:
    """The saved user ID in place of the fs one."""
    return judge(case, caller=replace(model_caller(case), fsuid=case.who.uids[2] + _offset(case)))


@mutant
def real_gid(case: Case) -> Decision:
    """The real group ID in place of the fs one."""
    return judge(case, caller=replace(model_caller(case), fsgid=case.who.gids[0] + _offset(case)))


@mutant
def effective_gid(case: Case) -> Decision:
    """The effective group ID in place of the fs one."""
    return judge(case, caller=replace(model_caller(case), fsgid=case.who.gids[1] + _offset(case)))


def _offset(case: Case) -> int:
    return USER_NAMESPACE_OFFSET if case.who.setting is Setting.USER_NAMESPACE else 0


@mutant
def ids_as_the_user_namespace_shows_them(case: Case) -> Decision:
    """The IDs inside a user namespace in place of the ones outside."""
    caller, offset = model_caller(case), _offset(case)
    return judge(
        case,
        caller=replace(
            caller,
            fsuid=caller.fsuid - offset,
            fsgid=caller.fsgid - offset,
            groups=frozenset(gid - offset for gid in caller.groups),
        ),
    )


@mutant
def the_process_for_its_thread(case: Case) -> Decision:
    """The credentials of the process's first thread in place of the connecting one's."""
    if case.who.setting is not Setting.THREAD:
        return judge(case)
    return judge(case, caller=Caller(fsuid=0, fsgid=0))


@mutant
def the_parents_groups(case: Case) -> Decision:
    """Groups that were looked up when the parent was seen first."""
    return judge(case, caller=with_groups(case, case.who.parent_groups)) if case.who.parent_groups else judge(case)


@mutant
def who_made_the_socket(case: Case) -> Decision:
    """The owner of the socket in place of the caller."""
    return judge(case, caller=replace(model_caller(case), fsuid=0)) if case.who.socket_first else judge(case)


@mutant
def primary_gid_only(case: Case) -> Decision:
    """Supplementary groups forgotten."""
    return judge(case, caller=with_groups(case, ()))


@mutant
def supplementary_gids_only(case: Case) -> Decision:
    """The primary group is looked for among the supplementary ones, where it need not be."""
    return judge(case, caller=replace(model_caller(case), fsgid=0xFFFFFFFF))


@mutant
def first_32_groups(case: Case) -> Decision:
    """A walk that ends after 32 groups."""
    return judge(case, caller=with_groups(case, sorted(model_caller(case).groups)[:32]))


@mutant
def first_1024_groups(case: Case) -> Decision:
    """A walk that ends after 1,024 groups, in silence."""
    return judge(case, caller=with_groups(case, sorted(model_caller(case).groups)[:1024]))


@mutant
def all_but_the_first_group(case: Case) -> Decision:
    """A search that starts at the second group."""
    return judge(case, caller=with_groups(case, sorted(model_caller(case).groups)[1:]))


@mutant
def all_but_the_last_group(case: Case) -> Decision:
    """A search that ends before the last group."""
    return judge(case, caller=with_groups(case, sorted(model_caller(case).groups)[:-1]))


@mutant
def nearest_group(case: Case) -> Decision:
    """A binary search that does not compare what it found."""
    groups = sorted(model_caller(case).groups)
    listed = case.policy.locks[0].allow.groups
    near = {gid for gid in listed if groups and groups[0] < gid < groups[-1]}
    return judge(case, caller=with_groups(case, {*groups, *near}))


@mutant
def filter_without_a_look_up(case: Case) -> Decision:
    """One bit for each gid modulo 512, and no look at the list behind it."""
    listed = {gid for lock in case.policy.locks for gid in lock.listed_groups}
    groups = model_caller(case).groups
    hit = {gid for gid in listed if any(gid % 512 == held % 512 for held in groups)}
    return judge(case, caller=with_groups(case, groups | hit))


@mutant
def too_many_groups_let_through(case: Case) -> Decision:
    """What can't be searched is let through."""
    decision = judge(case)
    return Decision(True, Reason.ALLOWED_GROUP) if decision.reason is Reason.TOO_MANY_GROUPS else decision


@mutant
def too_many_groups_cut_off(case: Case) -> Decision:
    """What can't be searched is taken for groups that are not listed."""
    caller = model_caller(case)
    decision = judge(case)
    return judge(case, caller=replace(caller, groups=frozenset())) if _too_many(decision) else decision


def _too_many(decision: Decision) -> bool:
    return decision.reason is Reason.TOO_MANY_GROUPS


@mutant
def too_many_groups_whatever_is_listed(case: Case) -> Decision:
    """More than 1,024 groups are denied, be the list short or long."""
    decision = judge(case)
    many = len(model_caller(case).groups) > 1024
    return Decision(False, Reason.TOO_MANY_GROUPS) if many and decision.lock else decision


@mutant
def too_many_groups_before_the_user(case: Case) -> Decision:
    """Groups beyond the bounds deny a listed user, too."""
    decision = judge(case)
    lock = find_lock(case.policy, model_destination(case))
    beyond = lock and len(lock.listed_groups) > 128 and len(model_caller(case).groups) > 1024
    return Decision(False, Reason.TOO_MANY_GROUPS) if beyond else decision


@mutant
def sixteen_bit_ids(case: Case) -> Decision:
    """IDs cut to 16 bits."""
    caller = model_caller(case)
    policy = with_ids(case.policy, lambda ids: Identities(_low(ids.users), _low(ids.groups)))
    cut = replace(caller, fsuid=caller.fsuid & 0xFFFF, fsgid=caller.fsgid & 0xFFFF, groups=_low(caller.groups))
    return judge(case, policy=policy, caller=cut)


def _low(ids: FrozenSet[int]) -> FrozenSet[int]:
    return frozenset(number & 0xFFFF for number in ids)


@mutant
def signed_ids(case: Case) -> Decision:
    """IDs above 2**31 are taken for negative ones and found in no list."""
    policy = with_ids(
        case.policy,
        lambda ids: Identities(
            frozenset(uid for uid in ids.users if uid < 2**31), frozenset(gid for gid in ids.groups if gid < 2**31)
        ),
    )
    return judge(case, policy=policy)


@mutant
def ids_in_one_map(case: Case) -> Decision:
    """Users and groups share a map."""
    policy = with_ids(case.policy, lambda ids: Identities(ids.users | ids.groups, ids.users | ids.groups))
    return judge(case, policy=policy)


@mutant
def denied_groups_in_the_user_map(case: Case) -> Decision:
    """The deny list's groups are written where its users belong."""
    policy = with_locks(
        case.policy, lambda lock: replace(lock, deny=Identities(lock.deny.users | lock.deny.groups, frozenset()))
    )
    return judge(case, policy=policy)


@mutant
def root_always_passes(case: Case) -> Decision:
    """uid 0 need not be listed."""
    decision = judge(case)
    return Decision(True, Reason.ALLOWED_USER) if model_caller(case).fsuid == 0 and decision.lock else decision


@mutant
def group_0_always_passes(case: Case) -> Decision:
    """gid 0 is taken for root."""
    decision = judge(case)
    return Decision(True, Reason.ALLOWED_GROUP) if model_caller(case).fsgid == 0 and decision.lock else decision


# --- what the lists mean --------------------------------------------------------------------------------------------


@mutant
def empty_list_means_everyone(case: Case) -> Decision:
    """A lock without an allowlist is open."""
    policy = with_locks(case.policy, lambda lock: lock if lock.allow else replace(lock, default=Verdict.ALLOW))
    return judge(case, policy=policy)


@mutant
def groups_restrict_nobody(case: Case) -> Decision:
    """An allowlist of groups alone is not enforced."""
    policy = with_locks(
        case.policy,
        lambda lock: replace(lock, default=Verdict.ALLOW) if lock.allow.groups and not lock.allow.users else lock,
    )
    return judge(case, policy=policy)


@mutant
def deny_after_allow(case: Case) -> Decision:
    """The allowlist is looked at first."""
    decision = judge(case)
    without = judge(case, policy=with_locks(case.policy, lambda lock: replace(lock, deny=Identities())))
    if decision.reason in (Reason.DENIED_USER, Reason.DENIED_GROUP) and without.matched:
        return without
    return decision


@mutant
def deny_lists_ignored(case: Case) -> Decision:
    """Nobody looks at deny lists."""
    return judge(case, policy=with_locks(case.policy, lambda lock: replace(lock, deny=Identities())))


@mutant
def default_always_deny(case: Case) -> Decision:
    """A lock with only a deny list denies everyone."""
    return judge(case, policy=with_locks(case.policy, lambda lock: replace(lock, default=Verdict.DENY)))


@mutant
def one_list_for_all_locks(case: Case) -> Decision:
    """The allowlists of all locks are thrown together."""
    users = frozenset(uid for lock in case.policy.locks for uid in lock.allow.users)
    groups = frozenset(gid for lock in case.policy.locks for gid in lock.allow.groups)
    return judge(case, policy=with_locks(case.policy, lambda lock: replace(lock, allow=Identities(users, groups))))


@mutant
def one_deny_list_for_all_locks(case: Case) -> Decision:
    """The deny lists of all locks are thrown together."""
    users = frozenset(uid for lock in case.policy.locks for uid in lock.deny.users)
    return judge(case, policy=with_locks(case.policy, lambda lock: replace(lock, deny=replace(lock.deny, users=users))))


@mutant
def audit_enforced(case: Case) -> Decision:
    """Audit mode denies."""
    return judge(case, policy=replace(case.policy, mode=Mode.ENFORCE))


@mutant
def enforce_audited(case: Case) -> Decision:
    """The mode is not known and taken for audit."""
    return judge(case, policy=replace(case.policy, mode=Mode.AUDIT))


@mutant
def audit_has_no_reason(case: Case) -> Decision:
    """Audit mode lets through without saying what it would have done."""
    return Decision(True, Reason.NOT_LOCKED) if case.policy.mode is Mode.AUDIT else judge(case)


# --- containers -----------------------------------------------------------------------------------------------------


@mutant
def containers_ignored(case: Case) -> Decision:
    """Root of a container is root."""
    return judge(case, policy=replace(case.policy, containers=Verdict.ALLOW))


@mutant
def containers_never_allowed(case: Case) -> Decision:
    """containers = "allow" has no effect."""
    return judge(case, policy=replace(case.policy, containers=Verdict.DENY))


@mutant
def pid_namespaces_ignored(case: Case) -> Decision:
    """Only user namespaces make a container."""
    return judge(case, caller=replace(model_caller(case), pid_namespace_is_initial=True))


@mutant
def user_namespaces_ignored(case: Case) -> Decision:
    """Only PID namespaces make a container, and a mapped ID slips past a deny list."""
    return judge(case, caller=replace(model_caller(case), user_namespace_is_initial=True))


@mutant
def user_namespace_with_default_allow_forgotten(case: Case) -> Decision:
    """A mapped ID slips past a deny list where containers are allowed."""
    decision = judge(case)
    return Decision(True, Reason.DEFAULT_ALLOW) if decision.reason is Reason.USER_NAMESPACE else decision


@mutant
def the_pid_namespace_of_the_children(case: Case) -> Decision:
    """nsproxy's PID namespace, which is the one that children get, in place of the task's own."""
    here = case.who.setting not in (Setting.UNSHARED_PID, Setting.PID_NAMESPACE)
    return judge(case, caller=replace(model_caller(case), pid_namespace_is_initial=here))


@mutant
def network_namespaces_are_containers(case: Case) -> Decision:
    """A namespace of its own makes a process somebody else's."""
    if case.who.setting is not Setting.NETWORK_NAMESPACE:
        return judge(case)
    return judge(case, caller=replace(model_caller(case), pid_namespace_is_initial=False))


@mutant
def new_network_namespaces_not_covered(case: Case) -> Decision:
    """What was made after start is not judged."""
    return Decision(True, Reason.NOT_LOCKED) if case.who.setting is Setting.NETWORK_NAMESPACE else judge(case)


@mutant
def containers_judged_without_a_lock(case: Case) -> Decision:
    """A container is denied wherever it goes."""
    deny = model_caller(case).in_container and case.policy.containers is Verdict.DENY
    return Decision(False, Reason.CONTAINER) if deny else judge(case)


@mutant
def kernel_threads_forgotten(case: Case) -> Decision:
    """A kernel thread is uid 0."""
    return judge(case, caller=replace(model_caller(case), kernel_thread=False))


# --- where ----------------------------------------------------------------------------------------------------------


@mutant
def ipv4_only(case: Case) -> Decision:
    """IPv6 endpoints forgotten."""
    return Decision(True, Reason.NOT_LOCKED) if _written_as_ipv6(case) and not _mapped(case) else judge(case)


@mutant
def mapped_addresses_forgotten(case: Case) -> Decision:
    """::ffff:a.b.c.d is an IPv6 address that nobody locked."""
    return Decision(True, Reason.NOT_LOCKED) if _mapped(case) else judge(case)


@mutant
def link_local_forgotten(case: Case) -> Decision:
    """fe80:: is nobody's metadata service."""
    return (
        Decision(True, Reason.NOT_LOCKED)
        if model_destination(case).address.is_link_local and _written_as_ipv6(case) and not _mapped(case)
        else judge(case)
    )


def _written_as_ipv6(case: Case) -> bool:
    return ":" in case.attempt.to


def _mapped(case: Case) -> bool:
    address = model_destination(case).address
    return isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None


@mutant
def all_of_ipv6_covers_ipv4(case: Case) -> Decision:
    """In one trie of 16 octets, ::/0 is a prefix of ::ffff:0:0/96, too."""
    decision = judge(case)
    if decision.lock or case.attempt.protocol is Protocol.UDP:
        return decision
    short = [lock for lock in case.policy.locks for one in lock.endpoints if one.network.version == 6
             and one.network.prefixlen <= 96 and ipaddress.ip_address("::ffff:0:0") in one.network]  # fmt: skip
    address = resolve_unspecified(model_destination(case).address, model_source(case))
    if short and address is not None and address.version == 4:
        return Decision(False, Reason.NOT_LISTED)
    return decision


@mutant
def prefixes_forgotten(case: Case) -> Decision:
    """Only single addresses are looked up."""
    locks = tuple(lock for lock in case.policy.locks if all(_single(one) for one in lock.endpoints))
    return judge(case, policy=replace(case.policy, locks=locks))


def _single(endpoint: Endpoint) -> bool:
    return endpoint.network.prefixlen == endpoint.network.max_prefixlen


@mutant
def least_specific(case: Case) -> Decision:
    """The widest prefix decides."""
    return _by_lock(case, lambda lock: min(one.network.prefixlen for one in lock.endpoints))


@mutant
def first_lock_by_name(case: Case) -> Decision:
    """The first lock that matches decides."""
    return _by_lock(case, lambda lock: 0)


def _by_lock(case: Case, order: Callable[[Lock], int]) -> Decision:
    """Asks the locks one by one, each as if it were alone."""
    for lock in sorted(case.policy.locks, key=order):
        alone = judge(case, policy=replace(case.policy, locks=(lock,)))
        if alone.reason is not Reason.NOT_LOCKED:
            return alone
    return judge(case)


@mutant
def most_specific_whatever_its_ports(case: Case) -> Decision:
    """The most specific endpoint decides for all ports: those that it does not have are open."""
    address = resolve_unspecified(model_destination(case).address, model_source(case))
    inner = [
        (one.network.prefixlen, lock)
        for lock in case.policy.locks
        for one in lock.endpoints
        if address is not None and one.covers(address)
    ]
    if not inner:
        return judge(case)
    longest = max(length for length, _ in inner)
    return judge(case, policy=replace(case.policy, locks=tuple(lock for length, lock in inner if length == longest)))


@mutant
def ports_ignored(case: Case) -> Decision:
    """A lock with ports locks them all."""
    everything = ((0, 65535),)
    policy = with_endpoints(
        case.policy, lambda one: replace(one, tcp=one.tcp and everything, udp=one.udp and everything)
    )
    return judge(case, policy=policy)


@mutant
def port_octets_swapped(case: Case) -> Decision:
    """The port is compared in network byte order."""
    destination = model_destination(case)
    swapped = int.from_bytes(destination.port.to_bytes(2, "big"), "little")
    return judge(case, destination=replace(destination, port=swapped))


@mutant
def first_range_of_ports(case: Case) -> Decision:
    """Only the first range of a lock's ports is looked at."""
    return judge(case, policy=with_endpoints(case.policy, lambda one: replace(one, tcp=one.tcp[:1], udp=one.udp[:1])))


@mutant
def hull_of_the_ports(case: Case) -> Decision:
    """From the lowest to the highest port, without the gaps."""
    policy = with_endpoints(
        case.policy,
        lambda one: replace(
            one,
            tcp=one.tcp and ((one.tcp[0][0], one.tcp[-1][1]),),
            udp=one.udp and ((one.udp[0][0], one.udp[-1][1]),),
        ),
    )
    return judge(case, policy=policy)


@mutant
def protocol_ignored(case: Case) -> Decision:
    """What is locked for TCP is locked for UDP."""
    policy = with_endpoints(case.policy, lambda one: replace(one, tcp=one.tcp or one.udp, udp=one.udp or one.tcp))
    return judge(case, policy=policy)


@mutant
def tcp_only(case: Case) -> Decision:
    """UDP is not looked at."""
    return Decision(True, Reason.NOT_LOCKED) if case.attempt.protocol is Protocol.UDP else judge(case)


@mutant
def everything_is_locked(case: Case) -> Decision:
    """What nobody locked is denied, too."""
    decision = judge(case)
    return Decision(False, Reason.NOT_LISTED) if decision.lock is None else decision


# --- 0.0.0.0 --------------------------------------------------------------------------------------------------------


@mutant
def unspecified_forgotten(case: Case) -> Decision:
    """0.0.0.0 is an address that nobody locked."""
    unspecified = int(model_destination(case).address) & 0xFFFFFFFF == 0
    return Decision(True, Reason.NOT_LOCKED) if unspecified else judge(case)


@mutant
def unspecified_ipv6_forgotten(case: Case) -> Decision:
    """:: is an address that nobody locked."""
    return Decision(True, Reason.NOT_LOCKED) if case.attempt.to == "::" else judge(case)


@mutant
def unspecified_is_loopback(case: Case) -> Decision:
    """0.0.0.0 is loopback, whatever the socket is bound to."""
    return judge(case, source=UNBOUND)


@mutant
def devices_forgotten(case: Case) -> Decision:
    """0.0.0.0 on a socket that is bound to an interface is loopback."""
    return judge(case, source=replace(model_source(case), by_device=False))


@mutant
def devices_before_the_bound_address(case: Case) -> Decision:
    """An interface makes the destination unknown, whatever the socket is bound to."""
    source = model_source(case)
    return judge(case, source=replace(source, address=None)) if source.by_device else judge(case)


@mutant
def packet_info_forgotten(case: Case) -> Decision:
    """The socket's own address counts, not the one that an IP_PKTINFO puts in its place."""
    bind = case.attempt.bind
    return judge(case, source=replace(model_source(case), address=None if bind is None else ipaddress.ip_address(bind)))


@mutant
def any_unspecified_is_denied(case: Case) -> Decision:
    """0.0.0.0 is denied, locked or not."""
    decision = judge(case)
    unspecified = int(model_destination(case).address) & 0xFFFFFFFF == 0
    return Decision(False, Reason.UNSPECIFIED_DESTINATION) if unspecified and decision.lock is None else decision
