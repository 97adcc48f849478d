# SPDX-License-Identifier: Apache-2.0
"""Mutants that send the wrong caller to a filter, to the wrong one, or past it."""

from __future__ import annotations

from typing import Callable

from imds_guard.policy.decide import Decision, Reason
from imds_guard.policy.filters import Filter
from imds_guard.policy.model import Identities, Lock, Mode, Policy, Protocol
from tests.conformance.model import Case, model_caller, model_destination, model_source
from tests.conformance.mutant import judge, mutant, with_groups, with_locks


def _with_filters(policy: Policy, *filters: Filter) -> Policy:
    return policy._replace(filters=filters)


def _each(policy: Policy, **changes: object) -> Policy:
    return _with_filters(policy, *(one._replace(**changes) for one in policy.filters))  # type: ignore[arg-type]


@mutant
def filters_are_not_known(case: Case) -> Decision:
    """The policy is enforced without its filters."""
    return judge(case, policy=case.policy._replace(filters=(), filter_uid=None))


@mutant
def filters_before_allow_lists(case: Case) -> Decision:
    """A caller that a filter names is filtered, although a list allows it."""
    without = with_locks(case.policy, lambda lock: lock._replace(allow=Identities()))
    decision = judge(case, policy=without)
    return decision if decision.filter else judge(case)


@mutant
def filters_before_deny_lists(case: Case) -> Decision:
    """A caller that a filter names is filtered, although a list denies it."""
    without = with_locks(case.policy, lambda lock: lock._replace(deny=Identities()))
    decision = judge(case, policy=without)
    return decision if decision.filter else judge(case)


@mutant
def filters_before_containers(case: Case) -> Decision:
    """A filter for everyone is for containers, too."""
    caller = model_caller(case)._replace(pid_namespace_is_initial=True, user_namespace_is_initial=True)
    decision = judge(case, caller=caller)
    return decision if decision.filter else judge(case)


@mutant
def default_before_filters(case: Case) -> Decision:
    """Under "default allow" nobody is filtered."""
    decision = judge(case, policy=_with_filters(case.policy))
    return decision if decision.reason is Reason.DEFAULT_ALLOW else judge(case)


@mutant
def the_last_filter_wins(case: Case) -> Decision:
    """A caller belongs to the last filter that names it."""
    return judge(case, policy=_with_filters(case.policy, *reversed(case.policy.filters)))


@mutant
def the_next_filter_serves(case: Case) -> Decision:
    """Where the caller's filter does not serve the port, the next one that names it does."""
    decision = judge(case)
    if decision.reason is not Reason.NOT_SERVED:
        return decision
    others = [one for one in case.policy.filters if one.name != decision.filter]
    return judge(case, policy=_with_filters(case.policy, *others)) if others else decision


@mutant
def the_next_filter_stands_in(case: Case) -> Decision:
    """Where the caller's filter is dead, the next one that names it takes over."""
    decision = judge(case)
    if decision.reason is not Reason.NO_FILTER:
        return decision
    others = [one for one in case.policy.filters if one.name != decision.filter]
    return judge(case, policy=_with_filters(case.policy, *others), filter_listens=True) if others else decision


@mutant
def groups_of_filters_are_left_out(case: Case) -> Decision:
    """Only users of filters count."""
    filters = [one._replace(who=Identities(one.who.users)) for one in case.policy.filters]
    return judge(case, policy=_with_filters(case.policy, *filters))


@mutant
def supplementary_groups_of_filters_are_left_out(case: Case) -> Decision:
    """Only the primary group counts for filters."""
    decision = judge(case, caller=with_groups(case, ()))
    return decision if case.filter else judge(case)


@mutant
def filters_are_of_every_lock(case: Case) -> Decision:
    """A filter serves all locks, and not those alone that it names."""
    return judge(case, policy=_each(case.policy, locks=tuple(lock.name for lock in case.policy.locks)))


@mutant
def a_prefix_is_served(case: Case) -> Decision:
    """Addresses of a locked prefix are served, too."""
    decision = judge(case)
    if decision.reason is not Reason.NOT_SERVED or model_destination(case).port != case.policy.filters[0].port:
        return decision
    return decision._replace(allowed=True, reason=Reason.FILTERED)


@mutant
def any_port_is_served(case: Case) -> Decision:
    """The port of the filter is not compared."""
    return judge(case, policy=_each(case.policy, port=case.attempt.port))


@mutant
def udp_is_served(case: Case) -> Decision:
    """A datagram is redirected, too."""
    decision = judge(case)
    is_udp = decision.reason is Reason.NOT_SERVED and case.attempt.protocol is Protocol.UDP
    return decision._replace(allowed=True, reason=Reason.FILTERED) if is_udp else decision


@mutant
def a_filter_for_everyone_is_for_user_namespaces(case: Case) -> Decision:
    """Everyone is everyone in every user namespace, where anybody can take an ID that no earlier filter lists."""
    decision = judge(case)
    if decision.reason is not Reason.USER_NAMESPACE:
        return decision
    return judge(case, caller=model_caller(case)._replace(user_namespace_is_initial=True))


@mutant
def a_dead_filter_lets_through(case: Case) -> Decision:
    """Where the filter is dead the caller reaches the endpoint."""
    decision = judge(case)
    return Decision(True, Reason.DEFAULT_ALLOW) if decision.reason is Reason.NO_FILTER else decision


@mutant
def a_number_is_an_identity(case: Case) -> Decision:
    """Whatever listens at the address of the filter is taken for the filter."""
    return judge(case, filter_listens=True)


@mutant
def many_groups_are_searched_for_filters(case: Case) -> Decision:
    """A caller with more than 1,024 groups is filtered by the groups that were found."""
    caller = model_caller(case)
    some = frozenset(gid for gid in caller.groups if gid < 100_000)
    decision = judge(case, caller=caller._replace(groups=some, repeated_groups=0))
    return decision if decision.filter else judge(case)


@mutant
def many_groups_skip_the_filters(case: Case) -> Decision:
    """A caller with too many groups for the filters counts as one that no filter names."""
    decision = judge(case)
    if decision.reason is not Reason.TOO_MANY_GROUPS or not case.policy.filters:
        return decision
    return judge(case, policy=_with_filters(case.policy))


@mutant
def many_groups_whatever_the_filters_list(case: Case) -> Decision:
    """A caller with more than 1,024 groups is denied, although no filter lists a group."""
    decision = judge(case)
    many = len(model_caller(case).groups) > 1024
    return Decision(False, Reason.TOO_MANY_GROUPS) if many and decision.filter else decision


@mutant
def many_groups_before_the_lists(case: Case) -> Decision:
    """A caller with too many groups for the filters is denied, although a list decides."""
    decision = judge(case)
    many = len(model_caller(case).groups) > 1024 and any(one.who.groups for one in case.policy.filters)
    return Decision(False, Reason.TOO_MANY_GROUPS) if many else decision


@mutant
def audit_mode_redirects(case: Case) -> Decision:
    """In audit mode a dead filter is a denial."""
    return judge(case, policy=case.policy._replace(mode=Mode.ENFORCE))


@mutant
def audit_mode_hides_filters(case: Case) -> Decision:
    """In audit mode a caller of a filter counts as one on no list."""
    if case.policy.mode is Mode.ENFORCE:
        return judge(case)
    return judge(case, policy=_with_filters(case.policy))


@mutant
def bound_sockets_are_redirected(case: Case) -> Decision:
    """A socket that is bound to an interface or to an IPv6 address is redirected, too."""
    source = model_source(case)._replace(address=None, by_device=False)
    decision = judge(case, source=source)
    return decision if decision.filter else judge(case)


@mutant
def no_bound_socket_is_redirected(case: Case) -> Decision:
    """A socket that is bound to any address is refused."""
    decision = judge(case)
    bound = decision.reason is Reason.FILTERED and case.attempt.bind is not None
    return decision._replace(allowed=False, reason=Reason.NOT_SERVED) if bound else decision


@mutant
def direct_connects_pass(case: Case) -> Decision:
    """Anybody may connect to the address of a filter, and so to any filter."""
    return Decision(True, Reason.NOT_LOCKED) if _is_direct(case) else judge(case)


@mutant
def direct_connects_by_unspecified_pass(case: Case) -> Decision:
    """A connect to 0.0.0.0 is not resolved before it is compared with the addresses of filters."""
    is_unspecified = int(model_destination(case).address) & 0xFFFFFFFF == 0
    return Decision(True, Reason.NOT_LOCKED) if _is_direct(case) and is_unspecified else judge(case)


@mutant
def allowed_users_may_connect_directly(case: Case) -> Decision:
    """The address of a filter is an endpoint of the lock that it serves."""
    lock = case.policy.locks[0]
    if _is_direct(case) and model_caller(case).fsuid in lock.allow.users:
        return Decision(True, Reason.ALLOWED_USER, lock.name)
    return judge(case)


@mutant
def every_port_at_the_addresses_of_filters_is_locked(case: Case) -> Decision:
    """127.169.0.0/16 is locked as a whole."""
    at_filters = case.policy.filters and case.attempt.to.endswith("127.169.200.7")
    return Decision(False, Reason.FILTER_ADDRESS) if at_filters else judge(case)


@mutant
def the_port_of_filters_is_locked_everywhere(case: Case) -> Decision:
    """Port 169 is locked at every address."""
    at_port = case.policy.filters and case.attempt.port == 169
    return Decision(False, Reason.FILTER_ADDRESS) if at_port else judge(case)


@mutant
def a_longer_prefix_is_needed_for_filters(case: Case) -> Decision:
    """A locked prefix around 127.169.0.0/16 decides there."""
    inside = _is_direct(case) and len(case.policy.locks) > 1
    return judge(case, policy=_with_filters(case.policy)) if inside else judge(case)


@mutant
def the_account_is_not_known(case: Case) -> Decision:
    """The filter itself is denied."""
    return judge(case, policy=case.policy._replace(filter_uid=None))


@mutant
def the_account_is_a_group_too(case: Case) -> Decision:
    """The ID of the filter's account is taken for a group."""

    def allow(lock: Lock) -> Identities:
        return Identities(lock.allow.users, lock.allow.groups | _uid(case))

    return judge(case, policy=_allow(case.policy, allow))


@mutant
def the_account_may_do_all(case: Case) -> Decision:
    """The account of the filter is on the allowlist of every lock."""

    def allow(lock: Lock) -> Identities:
        return Identities(lock.allow.users | _uid(case), lock.allow.groups)

    return judge(case, policy=_allow(case.policy, allow))


@mutant
def the_account_may_use_every_port(case: Case) -> Decision:
    """The account of the filter is on the allowlist of the locks that it serves, for every port."""
    served = {name for one in case.policy.filters for name in one.locks}

    def allow(lock: Lock) -> Identities:
        return Identities(lock.allow.users | _uid(case), lock.allow.groups) if lock.name in served else lock.allow

    return judge(case, policy=_allow(case.policy, allow))


@mutant
def the_account_before_deny_lists(case: Case) -> Decision:
    """The account of the filter is allowed before the deny lists are read."""
    decision = judge(case)
    is_account = model_caller(case).fsuid == case.policy.filter_uid and decision.reason is Reason.DENIED_GROUP
    return Decision(True, Reason.ALLOWED_USER) if is_account else decision


@mutant
def the_account_in_containers(case: Case) -> Decision:
    """The account of the filter is allowed in containers, too."""
    decision = judge(case)
    is_account = model_caller(case).fsuid == case.policy.filter_uid and decision.reason is Reason.CONTAINER
    return Decision(True, Reason.ALLOWED_USER) if is_account else decision


def _is_direct(case: Case) -> bool:
    return judge(case).reason is Reason.FILTER_ADDRESS


def _uid(case: Case) -> frozenset[int]:
    return frozenset() if case.policy.filter_uid is None else frozenset((case.policy.filter_uid,))


def _allow(policy: Policy, allow: Callable[[Lock], Identities]) -> Policy:
    return with_locks(policy, lambda lock: lock._replace(allow=allow(lock)))
