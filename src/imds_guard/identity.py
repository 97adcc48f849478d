# SPDX-License-Identifier: Apache-2.0
"""Names and numbers of users and groups, and the credentials of running processes."""

from __future__ import annotations

import grp
import os
import pwd
import re

from imds_guard.errors import BadPolicy, GuardError, NotPermitted, system_text
from imds_guard.kernel.namespaces import INITIAL_PID_NAMESPACE, INITIAL_USER_NAMESPACE, namespace_inode
from imds_guard.kernel.run import run
from imds_guard.policy.decide import Caller
from imds_guard.policy.model import MAX_ID

PF_KTHREAD = 0x00200000
"""Linux include/linux/sched.h."""


class NoSuchProcess(GuardError):
    """The process has ended, or never was."""


# --- names and numbers ----------------------------------------------------------------------------------------------


def user_id(word: str | int) -> int:
    """The user ID for a name or a number; all digits is a number, and needs no account. Raises BadPolicy."""
    number = _number(word, "user")
    if number is not None:
        return number
    name = str(word)
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        raise BadPolicy(
            f"there is no user {name!r}: make it (useradd --system {_shown(name, 'NAME')}), or give a user ID"
        ) from None


def group_id(word: str | int) -> int:
    """The group ID for a name or a number; all digits is a number, and needs no entry. Raises BadPolicy."""
    number = _number(word, "group")
    if number is not None:
        return number
    name = str(word)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise BadPolicy(
            f"there is no group {name!r}: add --create-group, or make it (groupadd --system {_shown(name, 'NAME')}), "
            "or give a group ID"
        ) from None


def is_missing_group(word: str) -> bool:
    """True for the name of a group that does not exist; a number is never missing."""
    if _number(word, "group") is not None:
        return False
    try:
        grp.getgrnam(word)
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
    """The ID of the group ``name``, which is made (a system group) unless it is there. Raises GuardError."""
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        pass
    if os.geteuid() != 0:
        raise NotPermitted(f"the group {name!r} can be made by root only: run it with sudo")
    done = run(["groupadd", "--system", "--", name])
    if done.status != 0:
        raise BadPolicy(f"groupadd could not make the group {name!r}: {done.complaint}")
    return group_id(name)


def _number(word: str | int, kind: str) -> int | None:
    if isinstance(word, str) and not (word.isascii() and word.isdigit()):
        if not word.strip():
            raise BadPolicy(f"an empty {kind} name means nobody that can be found: give a name or a number")
        return None
    # int() of thousands of digits is refused (CVE-2020-10735), and no ID has more than ten.
    digits = str(word).lstrip("0") or "0"
    number = int(digits) if len(digits) <= 10 else MAX_ID + 1
    if not 0 <= number <= MAX_ID:
        raise BadPolicy(f"{digits[:20]} is not a {kind} ID: they go from 0 to {MAX_ID}")
    return number


def _shown(name: str, otherwise: str) -> str:
    """The name when it can stand in a command line as it is."""
    return name if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) else otherwise


# --- the credentials of callers -------------------------------------------------------------------------------------


def caller_of_user(word: str | int) -> Caller:
    """The credentials that a fresh login of a user has: primary group and every group of the group database."""
    uid = user_id(word)
    try:
        entry = pwd.getpwuid(uid) if _number(word, "user") is not None else pwd.getpwnam(str(word))
    except KeyError:
        raise BadPolicy(f"no account has the user ID {uid}, so its groups are not known: name a process") from None
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Caller(entry.pw_uid, entry.pw_gid, frozenset(groups))


def caller_of_pid(pid: int) -> Caller:
    """The credentials of a running process as its next connect would show them. Raises NoSuchProcess, NotPermitted."""
    folder = f"/proc/{pid}"
    try:
        status = _status_fields(_read(f"{folder}/status"))
        flags = _stat_flags(_read(f"{folder}/stat"))
        pid_ns = namespace_inode("pid", pid)
        user_ns = namespace_inode("user", pid)
    except (FileNotFoundError, ProcessLookupError):
        raise NoSuchProcess(f"there is no process {pid}") from None
    except PermissionError as error:
        raise NotPermitted(
            f"reading the namespaces of process {pid}: {system_text(error)}; that takes root with every capability "
            "that the process has, or CAP_SYS_PTRACE (ptrace(2))"
        ) from error
    return Caller(
        fsuid=_filesystem_id(status["Uid"]),
        fsgid=_filesystem_id(status["Gid"]),
        groups=_groups(status["Groups"]),
        pid_namespace_is_initial=pid_ns == INITIAL_PID_NAMESPACE,
        user_namespace_is_initial=user_ns == INITIAL_USER_NAMESPACE,
        kernel_thread=bool(flags & PF_KTHREAD),
    )


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _status_fields(text: str) -> dict[str, str]:
    lines = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in lines}


def _filesystem_id(value: str) -> int:
    """The last of real, effective, saved and filesystem ID (proc_pid_status(5))."""
    return int(value.split()[3])


def _groups(value: str) -> frozenset[int]:
    return frozenset(int(word) for word in value.split())


def _stat_flags(text: str) -> int:
    """Field 9 of /proc/PID/stat; field 2, the name, may hold blanks and parentheses (proc_pid_stat(5))."""
    after_name: list[str] = text[text.rindex(")") + 1 :].split()
    return int(after_name[6])
