# SPDX-License-Identifier: Apache-2.0
"""Groups as the user IDs of their members (--resolve-groups), where the owner match sees the primary group alone.

The rules have the members that the name service lists now. After a change of membership they must be made again.
"""

from __future__ import annotations

from collections.abc import Iterable

from imds_guard.backends.iptables.render import Members
from imds_guard.kernel import accounts
from imds_guard.policy.model import Identities, Policy


def resolve(policy: Policy) -> Members:
    """The members of each list's groups, without the users that are on the list themselves."""
    users = accounts.primary_groups()
    members: dict[tuple[str, str], frozenset[int]] = {}
    for lock in policy.locks:
        for which, identities in (("allow", lock.allow), ("deny", lock.deny)):
            members[lock.name, which] = _of_list(identities, users)
    return members


def _of_list(identities: Identities, users: Iterable[tuple[int, int]]) -> frozenset[int]:
    primary = {uid for uid, gid in users if gid in identities.groups}
    supplementary = {uid for gid in identities.groups for uid in members_of(gid)}
    return frozenset(primary | supplementary) - identities.users


def members_of(gid: int) -> frozenset[int]:
    """User IDs of the accounts that the group database lists for a group. Names without an account are left out."""
    group = accounts.group_by_id(gid)
    found = map(accounts.user_by_name, group.members if group is not None else ())
    return frozenset(user.uid for user in found if user is not None)
