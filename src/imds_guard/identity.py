# SPDX-License-Identifier: Apache-2.0
"""Names and numbers of users and groups, and the credentials of running processes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from imds_guard.errors import BadPolicy, GuardError, NotPermitted, Unsupported, system_text
from imds_guard.kernel import accounts
from imds_guard.kernel.name_service import NAME_WITHIN_S, spellings
from imds_guard.kernel.namespaces import INITIAL_PID_NAMESPACE, INITIAL_USER_NAMESPACE, namespace_inode
from imds_guard.kernel.processes import stat_of, status_of
from imds_guard.kernel.run import run
from imds_guard.policy.decide import Caller
from imds_guard.policy.model import MAX_ID
from imds_guard.text import did_you_mean

if TYPE_CHECKING:
    from imds_guard.kernel.abandonable import Limits

PF_KTHREAD = 0x00200000
"""Source: include/linux/sched.h in Linux."""
_STAT_FLAGS = 9 - 3
"""Field 9 in proc_pid_stat(5); stat_of() begins with field 3."""


class NoSuchProcess(GuardError):
    """No process has this ID."""


# --- names and numbers ----------------------------------------------------------------------------------------------


def user_id(name_or_id: str | int) -> int:
    """The user ID for a name or a number, which needs no account. Raises BadPolicy, NoAnswer.

    Digits as text are a number where no account has that name, as for chown(1).
    """
    number = _number(name_or_id, "user")
    if number is not None:
        return _id_of_digits(name_or_id, "user", number)
    name = str(name_or_id)
    user = accounts.user_by_name(name)
    if user is None:
        raise BadPolicy(
            f"there is no user {name!r}{_where()}{_similar(name, 'user')} To make one: useradd --system "
            f"{_plain(name, 'NAME')}; or give a user ID"
        )
    return user.uid


def group_id(name_or_id: str | int) -> int:
    """As user_id(), for groups."""
    number = _number(name_or_id, "group")
    if number is not None:
        return _id_of_digits(name_or_id, "group", number)
    name = str(name_or_id)
    group = accounts.group_by_name(name)
    if group is None:
        raise BadPolicy(
            f"there is no group {name!r}{_where()}{_similar(name, 'group')} To make one: start with --create-group, or "
            f"groupadd --system {_plain(name, 'NAME')}; or give a group ID"
        )
    return group.gid


def id_of_name(name: str, kind: str) -> int | None:
    """The ID of the account or group of that name, None where there is none. ``kind`` is user or group.

    Raises NoAnswer, and GuardError where files can't be used.
    """
    if kind == "user":
        user = accounts.user_by_name(name)
        return None if user is None else user.uid
    group = accounts.group_by_name(name)
    return None if group is None else group.gid


def _id_of_digits(name_or_id: str | int, kind: str, number: int) -> int:
    """Where nobody can say whether there is an account of that name, digits are a number."""
    if isinstance(name_or_id, str):
        with suppress(GuardError):
            found = id_of_name(name_or_id, kind)
            return number if found is None else found
    return number


def notes_on_digits(users: Iterable[str] = (), groups: Iterable[str] = ()) -> list[str]:
    """A sentence for each that looks like an ID and is a name."""
    named = [(name, "user", user_id) for name in users] + [(name, "group", group_id) for name in groups]
    return [
        f"{name!r} was taken as the {kind} of that name, with the ID {id_of(name)}; for the {kind} ID {digits} write "
        f"0{name}, or in the configuration {digits} without quotes"
        for name, kind, id_of in named
        for digits in [_number(name, kind)]
        if digits is not None and id_of(name) != digits
    ]


def _where() -> str:
    """Where names were looked for, unless the name service was asked."""
    root = accounts.other_root()
    return "" if root is None else f" in the passwd and group files below {root} ({accounts.VARIABLE})"


def _similar(name: str, kind: str) -> str:
    return did_you_mean(name, accounts.names_in_files(kind)) or "."


def number_of(name_or_id: str | int, kind: str) -> int | None:
    """The ID that a number or digits stand for; None for other names. ``kind`` is user or group. Raises BadPolicy."""
    return _number(name_or_id, kind)


def is_missing_group(name_or_id: str) -> bool:
    """True for the name of a group that does not exist; a number is never missing. Raises NoAnswer."""
    if _number(name_or_id, "group") is not None:
        return False
    return accounts.group_by_name(name_or_id) is None


def user_name(uid: int) -> str:
    """The name of a user ID, or the number where it has no account, or names can't be read."""
    with suppress(GuardError):
        user = accounts.user_by_id(uid, NAME_WITHIN_S)
        return user.name if user is not None else str(uid)
    return str(uid)


def group_name(gid: int) -> str:
    """The name of a group ID, or the number where it has no entry, or names can't be read."""
    with suppress(GuardError):
        group = accounts.group_by_id(gid, NAME_WITHIN_S)
        return group.name if group is not None else str(gid)
    return str(gid)


def create_group(name: str) -> int:
    """The ID of the group ``name``, which is created as a system group if it does not exist. Raises GuardError."""
    group = accounts.group_by_name(name)
    if group is not None:
        return group.gid
    if accounts.other_root() is not None:
        raise Unsupported(f"creating the group {name!r}: there is none{_where()}; create it there, or give a group ID")
    if os.geteuid() != 0:
        raise NotPermitted(f"only root can create the group {name!r}: run this with sudo")
    done = run(["groupadd", "--system", "--", *spellings(name)[:1]])
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
    by_id = uid == _number(name_or_id, "user")
    user = accounts.user_by_id(uid) if by_id else accounts.user_by_name(str(name_or_id))
    if user is None:
        raise BadPolicy(f"no account has the user ID {uid}, so its groups are not known: name a process")
    return Caller(user.uid, user.gid, frozenset(accounts.groups_of(user)))


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


def callers_of_pids(pids: Iterable[int], limits: Limits) -> dict[int, Caller]:
    """caller_of_pid() of each, by a child that can be abandoned; those that gave none in time are left out."""
    from imds_guard.kernel.abandonable import Worker  # noqa: PLC0415 -- start-up time: few commands look at processes

    with Worker(_caller_or_none) as worker:
        answers = dict(worker.ask_each(pids, limits))
    return {pid: answer for pid, answer in answers.items() if isinstance(answer, Caller)}


def _caller_or_none(pid: int) -> Caller | None:
    """None for a process that has ended or may not be inspected."""
    try:
        return caller_of_pid(pid)
    except (NoSuchProcess, NotPermitted):
        return None


def _filesystem_id(value: bytes) -> int:
    """The last of real, effective, saved and filesystem ID (proc_pid_status(5))."""
    return int(value.split()[3])
