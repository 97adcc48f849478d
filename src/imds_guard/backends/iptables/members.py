# SPDX-License-Identifier: Apache-2.0
"""Groups as the user IDs of their members (--resolve-groups), where the owner match sees the primary group alone.

The rules have the members that the name service lists now. After a change of membership they must be made again.
"""

from __future__ import annotations

import grp
import pwd
from collections.abc import Iterable

from imds_guard.backends.iptables.render import Members
from imds_guard.policy.model import Identities, Policy


def resolve(policy: Policy) -> Members:
    """The members of each list's groups, without the users that are on the list themselves."""
    accounts = [(account.pw_uid, account.pw_gid) for account in pwd.getpwall()]
    members: dict[tuple[str, str], frozenset[int]] = {}
    for lock in policy.locks:
        for which, identities in (("allow", lock.allow), ("deny", lock.deny)):
            members[lock.name, which] = _of_list(identities, accounts)
    return members


def _of_list(identities: Identities, accounts: Iterable[tuple[int, int]]) -> frozenset[int]:
    primary = {uid for uid, gid in accounts if gid in identities.groups}
    supplementary = {uid for gid in identities.groups for uid in members_of(gid)}
    return frozenset(primary | supplementary) - identities.users


def members_of(gid: int) -> frozenset[int]:
    """User IDs of the accounts that the group database lists for a group. Names without an account are left out."""
    try:
        names = grp.getgrgid(gid).gr_mem
    except KeyError:
        return frozenset()
    return frozenset(uid for name in names for uid in _uid(name))


def _uid(name: str) -> tuple[int, ...]:
    try:
        return (pwd.getpwnam(name).pw_uid,)
    except KeyError:
        return ()
