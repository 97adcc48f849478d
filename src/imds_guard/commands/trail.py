# SPDX-License-Identifier: Apache-2.0
"""The audit trail: one line in the journal for each change of policy. Who changed it, by which command, and what.

The line is written while the commands' lock is held, right after the change. So names come from /etc/passwd and
/etc/group alone: a name service may hang.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from imds_guard.errors import GuardError
from imds_guard.kernel import accounts, journal
from imds_guard.policy.difference_text import Names, difference_lines
from imds_guard.text import key_value

if TYPE_CHECKING:
    from imds_guard.policy.difference import Difference

UNSET = 0xFFFFFFFF
"""The login uid of a process that no login has started: (uid_t)-1, see pam_loginuid(8)."""
_MAX_CLAIM = 64
"""Characters of SUDO_USER, which root may set to anything."""
_SHOWN_ENDPOINTS = 12
_UNKNOWN = "what was in force before could not be read"


def record(command: str, cgroup: str | None, found: Difference | None, more: str = "") -> list[str]:
    """Logs a change that is in force. Returns warnings. Without a journal or a syslog daemon nothing is logged.

    ``found`` is None where what was in force before can't be read; an empty difference is no change.
    """
    if found is not None and not found and not more:
        return []
    lines = [_UNKNOWN] if found is None else difference_lines(found, FILE_NAMES, _SHOWN_ENDPOINTS)
    what = "; ".join([*lines, *([more] if more else [])])
    words = {"command": command, "guard": cgroup or "machine", **who()}
    message = f"policy changed: {' '.join(f'{key}={key_value(value)}' for key, value in words.items())}: {what}"
    fields = {f"IMDS_GUARD_{key.upper()}": value for key, value in words.items()}
    try:
        journal.log(message, {**fields, "IMDS_GUARD_CHANGE": what})
    except GuardError as error:
        return [f"the change is in force, and is missing in the log: {error}"]
    return []


def who() -> dict[str, str]:
    """The user of the login, what sudo(8) says, and the user that this process runs as."""
    found = {"login": _login(), "uid": _user(os.getuid())}
    for key, variable in (("sudo_uid", "SUDO_UID"), ("sudo_user", "SUDO_USER")):
        claim = os.environ.get(variable)
        if claim:
            found[key] = claim[:_MAX_CLAIM]
    return found


def _login() -> str:
    """The kernel keeps it through sudo and su. ``none`` for a service, ``unknown`` without CONFIG_AUDIT."""
    try:
        with open("/proc/self/loginuid", encoding="ascii") as file:
            uid = int(file.read(16))
    except (OSError, ValueError):
        return "unknown"
    return "none" if uid == UNSET else _user(uid)


def _user(uid: int) -> str:
    with suppress(GuardError):
        user = accounts.user_in_files_by_id(uid)
        if user is not None:
            return f"{user.name} ({uid})"
    return str(uid)


def _group(gid: int) -> str:
    with suppress(GuardError):
        group = accounts.group_in_files_by_id(gid)
        if group is not None:
            return f"{group.name} ({gid})"
    return str(gid)


FILE_NAMES = Names(_user, _group)
