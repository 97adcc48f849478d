# SPDX-License-Identifier: Apache-2.0
"""Mutants that check the wrong credentials, or too few of them."""

from __future__ import annotations

from imds_guard.policy.decide import Caller, Decision, Reason, find_lock
from imds_guard.policy.model import Identities
from tests.conformance.model import USER_NAMESPACE_OFFSET, Case, Setting, model_caller, model_destination
from tests.conformance.mutant import judge, mutant, with_groups, with_ids, with_locks


@mutant
def uid_from_the_gid_half(case: Case) -> Decision:
    """bpf_get_current_uid_gid() >> 32 is used as the uid; it is the gid."""
    caller = model_caller(case)
    return judge(case, caller=caller._replace(fsuid=caller.fsgid))


@mutant
def gid_from_the_uid_half(case: Case) -> Decision:
    """The low half of bpf_get_current_uid_gid() is used as the gid; it is the uid."""
    caller = model_caller(case)
    return judge(case, caller=caller._replace(fsgid=caller.fsuid))


@mutant
def real_uid(case: Case) -> Decision:
    """The real user ID is used in place of the fsuid."""
    return judge(case, caller=model_caller(case)._replace(fsuid=case.who.uids[0] + _offset(case)))


@mutant
def effective_uid(case: Case) -> Decision:
    """The effective user ID is used in place of the fsuid."""
    return judge(case, caller=model_caller(case)._replace(fsuid=case.who.uids[1] + _offset(case)))


@mutant
def saved_uid(case: Case) -> Decision:
    """The saved user ID is used in place of the fsuid."""
    return judge(case, caller=model_caller(case)._replace(fsuid=case.who.uids[2] + _offset(case)))


@mutant
def real_gid(case: Case) -> Decision:
    """The real group ID is used in place of the fsgid."""
    return judge(case, caller=model_caller(case)._replace(fsgid=case.who.gids[0] + _offset(case)))


@mutant
def effective_gid(case: Case) -> Decision:
    """The effective group ID is used in place of the fsgid."""
    return judge(case, caller=model_caller(case)._replace(fsgid=case.who.gids[1] + _offset(case)))


def _offset(case: Case) -> int:
    return USER_NAMESPACE_OFFSET if case.who.setting is Setting.USER_NAMESPACE else 0


@mutant
def ids_as_the_user_namespace_shows_them(case: Case) -> Decision:
    """IDs are used as the user namespace shows them, in place of the initial namespace's."""
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
    """The credentials of the process's first thread are used in place of the connecting thread's."""
    if case.who.setting is not Setting.THREAD:
        return judge(case)
    return judge(case, caller=Caller(fsuid=0, fsgid=0))


@mutant
def the_parents_groups(case: Case) -> Decision:
    """The groups of the parent are used, from a cache that was filled when it was first seen."""
    return judge(case, caller=with_groups(case, case.who.parent_groups)) if case.who.parent_groups else judge(case)


@mutant
def who_made_the_socket(case: Case) -> Decision:
    """The owner of the socket is used in place of the caller."""
    return judge(case, caller=model_caller(case)._replace(fsuid=0)) if case.who.socket_first else judge(case)


@mutant
def primary_gid_only(case: Case) -> Decision:
    """Supplementary groups are left out."""
    return judge(case, caller=with_groups(case, ()))


@mutant
def supplementary_gids_only(case: Case) -> Decision:
    """Only supplementary groups are checked. The primary group need not be among them."""
    return judge(case, caller=model_caller(case)._replace(fsgid=0xFFFFFFFF))


@mutant
def first_32_groups(case: Case) -> Decision:
    """Only the first 32 groups are checked."""
    return judge(case, caller=with_groups(case, sorted(model_caller(case).groups)[:32]))


@mutant
def first_1024_groups(case: Case) -> Decision:
    """Only the first 1,024 groups are checked, without an error."""
    return judge(case, caller=with_groups(case, sorted(model_caller(case).groups)[:1024]))


@mutant
def all_but_the_first_group(case: Case) -> Decision:
    """The search starts at the second group."""
    return judge(case, caller=with_groups(case, sorted(model_caller(case).groups)[1:]))


@mutant
def all_but_the_last_group(case: Case) -> Decision:
    """The search ends before the last group."""
    return judge(case, caller=with_groups(case, sorted(model_caller(case).groups)[:-1]))


@mutant
def nearest_group(case: Case) -> Decision:
    """The binary search does not compare the group that it ends at."""
    groups = sorted(model_caller(case).groups)
    listed = case.policy.locks[0].allow.groups
    near = {gid for gid in listed if groups and groups[0] < gid < groups[-1]}
    return judge(case, caller=with_groups(case, {*groups, *near}))


@mutant
def bitmap_without_a_look_up(case: Case) -> Decision:
    """The bitmap of gid % 512 decides alone; the list behind it is not checked."""
    listed = {gid for lock in case.policy.locks for gid in lock.listed_groups}
    groups = model_caller(case).groups
    hit = {gid for gid in listed if any(gid % 512 == held % 512 for held in groups)}
    return judge(case, caller=with_groups(case, groups | hit))


@mutant
def too_many_groups_let_through(case: Case) -> Decision:
    """A caller with too many groups to search is allowed."""
    decision = judge(case)
    return Decision(True, Reason.ALLOWED_GROUP) if decision.reason is Reason.TOO_MANY_GROUPS else decision


@mutant
def too_many_groups_cut_off(case: Case) -> Decision:
    """A caller with too many groups to search counts as a member of none."""
    caller = model_caller(case)
    decision = judge(case)
    return judge(case, caller=caller._replace(groups=frozenset())) if _too_many(decision) else decision


def _too_many(decision: Decision) -> bool:
    return decision.reason is Reason.TOO_MANY_GROUPS


@mutant
def too_many_groups_whatever_is_listed(case: Case) -> Decision:
    """A caller with more than 1,024 groups is denied, however short the list is."""
    decision = judge(case)
    many = len(model_caller(case).groups) > 1024
    return Decision(False, Reason.TOO_MANY_GROUPS) if many and decision.lock else decision


@mutant
def repeated_groups_counted_once(case: Case) -> Decision:
    """A group that the caller has many times counts as one: the kernel's list is taken for a set."""
    return judge(case, caller=model_caller(case)._replace(repeated_groups=0))


@mutant
def too_many_groups_before_the_user(case: Case) -> Decision:
    """A caller with too many groups to search is denied, although its user is listed."""
    decision = judge(case)
    lock = find_lock(case.policy, model_destination(case))
    beyond = lock and len(lock.listed_groups) > 128 and len(model_caller(case).groups) > 1024
    return Decision(False, Reason.TOO_MANY_GROUPS) if beyond else decision


@mutant
def sixteen_bit_ids(case: Case) -> Decision:
    """IDs are cut to 16 bits."""
    caller = model_caller(case)
    policy = with_ids(case.policy, lambda ids: Identities(_low(ids.users), _low(ids.groups)))
    cut = caller._replace(fsuid=caller.fsuid & 0xFFFF, fsgid=caller.fsgid & 0xFFFF, groups=_low(caller.groups))
    return judge(case, policy=policy, caller=cut)


def _low(ids: frozenset[int]) -> frozenset[int]:
    return frozenset(number & 0xFFFF for number in ids)


@mutant
def signed_ids(case: Case) -> Decision:
    """IDs above 2**31 are read as negative numbers, which are in no list."""
    policy = with_ids(
        case.policy,
        lambda ids: Identities(
            frozenset(uid for uid in ids.users if uid < 2**31), frozenset(gid for gid in ids.groups if gid < 2**31)
        ),
    )
    return judge(case, policy=policy)


@mutant
def ids_in_one_map(case: Case) -> Decision:
    """Users and groups share one map, without a mark of which is which."""
    policy = with_ids(case.policy, lambda ids: Identities(ids.users | ids.groups, ids.users | ids.groups))
    return judge(case, policy=policy)


@mutant
def denied_groups_in_the_user_map(case: Case) -> Decision:
    """The groups of the deny list are written into the map of users."""
    policy = with_locks(
        case.policy, lambda lock: lock._replace(deny=Identities(lock.deny.users | lock.deny.groups, frozenset()))
    )
    return judge(case, policy=policy)


@mutant
def root_always_passes(case: Case) -> Decision:
    """User 0 is allowed without being listed."""
    decision = judge(case)
    return Decision(True, Reason.ALLOWED_USER) if model_caller(case).fsuid == 0 and decision.lock else decision


@mutant
def group_0_always_passes(case: Case) -> Decision:
    """Group 0 is allowed without being listed."""
    decision = judge(case)
    return Decision(True, Reason.ALLOWED_GROUP) if model_caller(case).fsgid == 0 and decision.lock else decision
