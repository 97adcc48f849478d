# SPDX-License-Identifier: Apache-2.0
"""Groups as the user IDs of their members, for kernels whose owner match sees primary groups alone (--resolve-groups).

What the name service says now is what the rules hold: a later change of membership needs a reload.
"""

from __future__ import annotations

import grp
import pwd
from collections.abc import Iterable

from imds_guard.backends.iptables.render import Members
from imds_guard.policy.model import Identities, Policy


def resolve(policy: Policy) -> Members:
    """The members of each list's groups, without the users that the list names itself."""
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
    """User IDs of the accounts that the group database lists under a group; a name without an account is nobody."""
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
