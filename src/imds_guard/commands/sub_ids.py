# SPDX-License-Identifier: Apache-2.0
"""Deny lists and sub-IDs: what a deny list can't hold.

A user with sub-IDs (subuid(5)) can make a set-user-ID program that belongs to one of them, in a user namespace, and run
it outside: it is a user whom no list names. useradd(8) gives everybody a range of 65,536.
"""

from __future__ import annotations

from imds_guard.errors import GuardError
from imds_guard.kernel import accounts
from imds_guard.kernel.name_service import User
from imds_guard.policy.model import Lock, Policy, Verdict
from imds_guard.text import some_of

_MAX_SHOWN = 3


def sub_id_warnings(policy: Policy) -> list[str]:
    """A warning for each lock whose deny list does not hold some users. Accounts of a name service are not known."""
    try:
        return [warning for lock in policy.locks for warning in _of(lock)]
    except GuardError:
        return []  # the files can't be used; names are no reason to stop anything here


def _of(lock: Lock) -> list[str]:
    if lock.default is Verdict.DENY or not lock.deny:
        return []
    members = accounts.members_in_files(lock.deny.groups)  # once: there may be 100,000 users
    users = [user.name for user in accounts.users_with_sub_ids() if _is_denied(lock, user, members)]
    if not users:
        return []
    return [
        f"the deny list of lock {lock.name!r} does not hold {some_of(sorted(users), _MAX_SHOWN)}: who has sub-IDs "
        "(/etc/subuid) can act as a user whom no list names; an allowlist (--group, --user) stops that"
    ]


def _is_denied(lock: Lock, user: User, members: set[str]) -> bool:
    return user.uid in lock.deny.users or user.gid in lock.deny.groups or user.name in members
