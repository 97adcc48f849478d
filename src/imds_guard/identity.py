# SPDX-License-Identifier: Apache-2.0
"""Names and numbers of users and groups, and the credentials of running processes."""

from __future__ import annotations

import grp
import os
import pwd
import re

from imds_guard.errors import BadPolicy, GuardError, NotPermitted, system_text
from imds_guard.kernel.namespaces import INITIAL_PID_NAMESPACE, INITIAL_USER_NAMESPACE, namespace_inode
from imds_guard.kernel.processes import stat_of, status_of
from imds_guard.kernel.run import run
from imds_guard.policy.decide import Caller
from imds_guard.policy.model import MAX_ID

PF_KTHREAD = 0x00200000
"""Source: include/linux/sched.h in Linux."""
_STAT_FLAGS = 9 - 3
"""Field 9 in proc_pid_stat(5); stat_of() begins with field 3."""


class NoSuchProcess(GuardError):
    """No process has this ID."""


# --- names and numbers ----------------------------------------------------------------------------------------------


def user_id(name_or_id: str | int) -> int:
    """The user ID for a name or a number. Digits alone are a number, which needs no account. Raises BadPolicy."""
    number = _number(name_or_id, "user")
    if number is not None:
        return number
    name = str(name_or_id)
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        raise BadPolicy(
            f"there is no user {name!r}: make it (useradd --system {_plain(name, 'NAME')}), or give a user ID"
        ) from None


def group_id(name_or_id: str | int) -> int:
    """The group ID for a name or a number. Digits alone are a number, which needs no entry. Raises BadPolicy."""
    number = _number(name_or_id, "group")
    if number is not None:
        return number
    name = str(name_or_id)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise BadPolicy(
            f"there is no group {name!r}: add --create-group, or make it (groupadd --system {_plain(name, 'NAME')}), "
            "or give a group ID"
        ) from None


def is_missing_group(name_or_id: str) -> bool:
    """True for the name of a group that does not exist; a number is never missing."""
    if _number(name_or_id, "group") is not None:
        return False
    try:
        grp.getgrnam(name_or_id)
    except (KeyError, ValueError):
        return True
    return False


def user_name(uid: int) -> str:
    """The name of a user ID, or the number where it has no account."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """The name of a group ID, or the number where it has no entry."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def create_group(name: str) -> int:
    """The ID of the group ``name``, which is created as a system group if it does not exist. Raises GuardError."""
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        pass
    if os.geteuid() != 0:
        raise NotPermitted(f"only root can create the group {name!r}: run this with sudo")
    done = run(["groupadd", "--system", "--", name])
    if done.status != 0:
        raise BadPolicy(f"groupadd could not make the group {name!r}: {done.complaint}")
    return group_id(name)


def _number(name_or_id: str | int, kind: str) -> int | None:
    if isinstance(name_or_id, str) and not (name_or_id.isascii() and name_or_id.isdigit()):
        if not name_or_id.strip():
            raise BadPolicy(f"an empty {kind} name names nobody: give a name or a number")
        return None
    # int() refuses thousands of digits (CVE-2020-10735), and no ID has more than ten.
    digits = str(name_or_id).lstrip("0") or "0"
    number = int(digits) if len(digits) <= 10 else MAX_ID + 1
    if not 0 <= number <= MAX_ID:
        raise BadPolicy(f"{digits[:20]} is not a {kind} ID: they go from 0 to {MAX_ID}")
    return number


def _plain(name: str, otherwise: str) -> str:
    """``name`` where a shell needs no quotes for it, else ``otherwise``."""
    return name if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) else otherwise


# --- the credentials of callers -------------------------------------------------------------------------------------


def caller_of_user(name_or_id: str | int) -> Caller:
    """The credentials of a new login of a user: the primary group and every group of the group database."""
    uid = user_id(name_or_id)
    try:
        entry = pwd.getpwuid(uid) if _number(name_or_id, "user") is not None else pwd.getpwnam(str(name_or_id))
    except KeyError:
        raise BadPolicy(f"no account has the user ID {uid}, so its groups are not known: name a process") from None
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Caller(entry.pw_uid, entry.pw_gid, frozenset(groups))


def caller_of_pid(pid: int) -> Caller:
    """The credentials with which a running process would connect now. Raises NoSuchProcess, NotPermitted."""
    try:
        status = status_of(pid)
        flags = int(stat_of(pid)[_STAT_FLAGS])
        pid_ns = namespace_inode("pid", pid)
        user_ns = namespace_inode("user", pid)
    except (FileNotFoundError, ProcessLookupError):
        raise NoSuchProcess(f"there is no process {pid}") from None
    except PermissionError as error:
        raise NotPermitted(
            f"reading the namespaces of process {pid}: {system_text(error)}; this needs root with every capability "
            "of the process, or CAP_SYS_PTRACE (ptrace(2))"
        ) from error
    groups = [int(gid) for gid in status[b"Groups"].split()]
    return Caller(
        fsuid=_filesystem_id(status[b"Uid"]),
        fsgid=_filesystem_id(status[b"Gid"]),
        groups=frozenset(groups),
        pid_namespace_is_initial=pid_ns == INITIAL_PID_NAMESPACE,
        user_namespace_is_initial=user_ns == INITIAL_USER_NAMESPACE,
        kernel_thread=bool(flags & PF_KTHREAD),
        repeated_groups=len(groups) - len(set(groups)),
    )


def _filesystem_id(value: bytes) -> int:
    """The last of real, effective, saved and filesystem ID (proc_pid_status(5))."""
    return int(value.split()[3])
