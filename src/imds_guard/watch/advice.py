# SPDX-License-Identifier: Apache-2.0
"""What would let a denied caller through: one table, for the lines of ``watch`` and the notes of ``report``."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from imds_guard.policy.decide import Reason
from imds_guard.text import escaped, some_of
from imds_guard.watch.process_info import NameCache

HELPED_BY_ALLOW = frozenset((Reason.NOT_LISTED, Reason.TOO_MANY_GROUPS))
"""Reasons that no longer apply once the user is on the allowlist."""

_MAX_GROUPS = 3
_ANY_USER = "the user"

_ADVICE: dict[Reason, str] = {
    Reason.DENIED_USER: "take {user} off the deny list",
    Reason.DENIED_GROUP: "take {user} out of the denied group, or the group off the deny list",
    Reason.CONTAINER: 'set containers = "allow" (--containers allow), which judges processes in containers by ID',
    Reason.USER_NAMESPACE: "put {user} on an allowlist: the default does not let user namespaces through",
    Reason.TOO_MANY_GROUPS: "allow {user} by user ID (imds-guard allow --user {name}), or list at most 128 groups in "
    "the lock",
    Reason.UNSPECIFIED_DESTINATION: "connect to the address itself, not to 0.0.0.0",
    Reason.NO_SETTINGS: "run imds-guard start, which repairs the policy",
    Reason.UNREADABLE: "run imds-guard status to see what is wrong, and imds-guard start to repair it",
    Reason.UNAPPROVED_SOCKET: "connect as an allowed user: under --strict nothing else approves a socket",
    Reason.NOT_SERVED: "allow {user}: a filter serves one plain-HTTP port of single addresses, and no socket that is "
    "bound to an interface or to an IPv6 address",
    Reason.NO_FILTER: "start the filter (systemctl start imds-guard-filter); outside the host's network namespace "
    "there is none",
    Reason.FILTER_ADDRESS: "connect to the endpoint, not to the address of its filter",
}
"""Reason -> advice. NOT_LISTED is in _allow(), which names groups. Nothing lets a kernel thread through."""


def place(endpoint: str | None, cgroup: str | None) -> str:
    """The end of a command for one endpoint (None: all), and for the guard of a cgroup (None: the machine's)."""
    words = ["", *([] if endpoint is None else ["--ip", endpoint]), *([] if cgroup is None else ["--cgroup", cgroup])]
    return " ".join(shlex.quote(escaped(word)) if word else "" for word in words)


def would_allow(
    reason: Reason, uid: int, allowed_groups: Collection[int], names: NameCache, where: str = ""
) -> str | None:
    """What would let a denied caller through; None where nothing would. The groups are those that the lock allows.

    ``where`` is place(), for the commands in it.
    """
    user = escaped(names.user(uid))
    if reason is Reason.NOT_LISTED:
        return _allow(user, allowed_groups, names, where)
    return _ADVICE[reason].format(user=f"user {user}", name=user + where) if reason in _ADVICE else None


def _allow(user: str, allowed_groups: Collection[int], names: NameCache, where: str) -> str:
    by_user = f"imds-guard allow --user {user}{where}"
    if not allowed_groups or user.isdecimal():  # a user without an account can't be put into a group
        return by_user
    groups = [escaped(names.group(gid)) for gid in sorted(allowed_groups)]
    group = f"group {groups[0]}" if len(groups) == 1 else f"one of the groups {some_of(groups, _MAX_GROUPS)}"
    return f"add {user} to {group}, or {by_user}"


def note(reason: Reason) -> str:
    """The advice for all callers that were denied for this reason."""
    advice = _ADVICE.get(reason, "nothing lets such a caller through").format(user=_ANY_USER, name="NAME")
    return f"{reason.label}: {advice}"
