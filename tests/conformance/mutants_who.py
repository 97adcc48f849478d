# SPDX-License-Identifier: Apache-2.0
"""Mutants that look at the wrong credentials, or at too few of them."""

from __future__ import annotations

from imds_guard.policy.model import (
    Caller,
    Decision,
    Identities,
    Reason,
    find_lock,
)
from tests.conformance.model import USER_NAMESPACE_OFFSET, Case, Setting, model_caller, model_destination
from tests.conformance.mutant import judge, mutant, with_groups, with_ids, with_locks


@mutant
def uid_from_the_gid_half(case: Case) -> Decision:
    """bpf_get_current_uid_gid() >> 32 taken for the uid."""
    caller = model_caller(case)
    return judge(case, caller=caller._replace(fsuid=caller.fsgid))


@mutant
def gid_from_the_uid_half(case: Case) -> Decision:
    """The low half taken for the gid."""
    caller = model_caller(case)
    return judge(case, caller=caller._replace(fsgid=caller.fsuid))


@mutant
def real_uid(case: Case) -> Decision:
    """The real user ID in place of the fs one."""
    return judge(case, caller=model_caller(case)._replace(fsuid=case.who.uids[0] + _offset(case)))


@mutant
def effective_uid(case: Case) -> Decision:
    """The effective user ID in place of the fs one."""
    return judge(case, caller=model_caller(case)._replace(fsuid=case.who.uids[1] + _offset(case)))


@mutant
def saved_uid(case: Case) -> Decision:
    """The saved user ID in place of the fs one."""
    return judge(case, caller=model_caller(case)._replace(fsuid=case.who.uids[2] + _offset(case)))


@mutant
def real_gid(case: Case) -> Decision:
    """The real group ID in place of the fs one."""
    return judge(case, caller=model_caller(case)._replace(fsgid=case.who.gids[0] + _offset(case)))


@mutant
def effective_gid(case: Case) -> Decision:
    """The effective group ID in place of the fs one."""
    return judge(case, caller=model_caller(case)._replace(fsgid=case.who.gids[1] + _offset(case)))


def _offset(case: Case) -> int:
    return USER_NAMESPACE_OFFSET if case.who.setting is Setting.USER_NAMESPACE else 0


@mutant
def ids_as_the_user_namespace_shows_them(case: Case) -> Decision:
    """The IDs inside a user namespace in place of the ones outside."""
    caller, offset = model_caller(case), _offset(case)
    return judge(
        case,
        caller=caller._replace(
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
    return judge(case, caller=model_caller(case)._replace(fsuid=0)) if case.who.socket_first else judge(case)


@mutant
def primary_gid_only(case: Case) -> Decision:
    """Supplementary groups forgotten."""
    return judge(case, caller=with_groups(case, ()))


@mutant
def supplementary_gids_only(case: Case) -> Decision:
    """The primary group is looked for among the supplementary ones, where it need not be."""
    return judge(case, caller=model_caller(case)._replace(fsgid=0xFFFFFFFF))


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
    return judge(case, caller=caller._replace(groups=frozenset())) if _too_many(decision) else decision


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
    cut = caller._replace(fsuid=caller.fsuid & 0xFFFF, fsgid=caller.fsgid & 0xFFFF, groups=_low(caller.groups))
    return judge(case, policy=policy, caller=cut)


def _low(ids: frozenset[int]) -> frozenset[int]:
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
        case.policy, lambda lock: lock._replace(deny=Identities(lock.deny.users | lock.deny.groups, frozenset()))
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
