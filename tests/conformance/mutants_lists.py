# SPDX-License-Identifier: Apache-2.0
"""Mutants that misread lists, modes and containers."""

from __future__ import annotations

from imds_guard.policy.decide import Decision, Reason
from imds_guard.policy.model import Identities, Mode, Verdict
from tests.conformance.model import Case, Setting, model_caller
from tests.conformance.mutant import judge, mutant, with_locks


@mutant
def empty_list_means_everyone(case: Case) -> Decision:
    """A lock without an allowlist is open."""
    policy = with_locks(case.policy, lambda lock: lock if lock.allow else lock._replace(default=Verdict.ALLOW))
    return judge(case, policy=policy)


@mutant
def groups_restrict_nobody(case: Case) -> Decision:
    """An allowlist of groups alone is not enforced."""
    policy = with_locks(
        case.policy,
        lambda lock: lock._replace(default=Verdict.ALLOW) if lock.allow.groups and not lock.allow.users else lock,
    )
    return judge(case, policy=policy)


@mutant
def deny_after_allow(case: Case) -> Decision:
    """The allowlist is checked before the deny list."""
    decision = judge(case)
    without = judge(case, policy=with_locks(case.policy, lambda lock: lock._replace(deny=Identities())))
    if decision.reason in (Reason.DENIED_USER, Reason.DENIED_GROUP) and without.matched:
        return without
    return decision


@mutant
def deny_lists_ignored(case: Case) -> Decision:
    """Deny lists are not checked."""
    return judge(case, policy=with_locks(case.policy, lambda lock: lock._replace(deny=Identities())))


@mutant
def default_always_deny(case: Case) -> Decision:
    """A lock with only a deny list denies everyone."""
    return judge(case, policy=with_locks(case.policy, lambda lock: lock._replace(default=Verdict.DENY)))


@mutant
def one_list_for_all_locks(case: Case) -> Decision:
    """The allowlists of all locks are merged."""
    users = frozenset(uid for lock in case.policy.locks for uid in lock.allow.users)
    groups = frozenset(gid for lock in case.policy.locks for gid in lock.allow.groups)
    return judge(case, policy=with_locks(case.policy, lambda lock: lock._replace(allow=Identities(users, groups))))


@mutant
def one_deny_list_for_all_locks(case: Case) -> Decision:
    """The deny lists of all locks are merged."""
    users = frozenset(uid for lock in case.policy.locks for uid in lock.deny.users)
    return judge(case, policy=with_locks(case.policy, lambda lock: lock._replace(deny=lock.deny._replace(users=users))))


@mutant
def audit_enforced(case: Case) -> Decision:
    """Audit mode denies."""
    return judge(case, policy=case.policy._replace(mode=Mode.ENFORCE))


@mutant
def enforce_audited(case: Case) -> Decision:
    """Enforce mode is an unknown word, and treated as audit."""
    return judge(case, policy=case.policy._replace(mode=Mode.AUDIT))


@mutant
def audit_has_no_reason(case: Case) -> Decision:
    """Audit mode allows without recording that enforce mode would have denied."""
    return Decision(True, Reason.NOT_LOCKED) if case.policy.mode is Mode.AUDIT else judge(case)


# --- containers -----------------------------------------------------------------------------------------------------


@mutant
def containers_ignored(case: Case) -> Decision:
    """A caller in a container is judged as if it were on the host."""
    return judge(case, policy=case.policy._replace(containers=Verdict.ALLOW))


@mutant
def containers_never_allowed(case: Case) -> Decision:
    """containers = "allow" has no effect."""
    return judge(case, policy=case.policy._replace(containers=Verdict.DENY))


@mutant
def pid_namespaces_ignored(case: Case) -> Decision:
    """A PID namespace does not count as a container."""
    return judge(case, caller=model_caller(case)._replace(pid_namespace_is_initial=True))


@mutant
def user_namespaces_ignored(case: Case) -> Decision:
    """A user namespace does not count as a container, so a mapped ID is missed by a deny list."""
    return judge(case, caller=model_caller(case)._replace(user_namespace_is_initial=True))


@mutant
def user_namespace_with_default_allow_forgotten(case: Case) -> Decision:
    """Where containers are allowed, a mapped ID is missed by a deny list."""
    decision = judge(case)
    return Decision(True, Reason.DEFAULT_ALLOW) if decision.reason is Reason.USER_NAMESPACE else decision


@mutant
def the_pid_namespace_of_the_children(case: Case) -> Decision:
    """The PID namespace in nsproxy is used. It is the one for children; the task's own may be another."""
    here = case.who.setting not in (Setting.UNSHARED_PID, Setting.PID_NAMESPACE)
    return judge(case, caller=model_caller(case)._replace(pid_namespace_is_initial=here))


@mutant
def network_namespaces_are_containers(case: Case) -> Decision:
    """A network namespace counts as a container."""
    if case.who.setting is not Setting.NETWORK_NAMESPACE:
        return judge(case)
    return judge(case, caller=model_caller(case)._replace(pid_namespace_is_initial=False))


@mutant
def new_network_namespaces_not_covered(case: Case) -> Decision:
    """Network namespaces that were made after the start are not guarded."""
    return Decision(True, Reason.NOT_LOCKED) if case.who.setting is Setting.NETWORK_NAMESPACE else judge(case)


@mutant
def containers_judged_without_a_lock(case: Case) -> Decision:
    """A caller in a container is denied at every destination, locked or not."""
    deny = model_caller(case).in_container and case.policy.containers is Verdict.DENY
    return Decision(False, Reason.CONTAINER) if deny else judge(case)


@mutant
def kernel_threads_forgotten(case: Case) -> Decision:
    """A kernel thread is judged as user 0."""
    return judge(case, caller=model_caller(case)._replace(kernel_thread=False))
