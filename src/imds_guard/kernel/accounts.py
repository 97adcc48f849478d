# SPDX-License-Identifier: Apache-2.0
"""Accounts and groups: of the name service, or of the files below IMDS_GUARD_NAMES_ROOT.

In a container with a root of its own, the name service knows the accounts of the container. The node image sets the
variable to /proc/1/root, so that names are those of the node (passwd(5), group(5)).

A name is text that was decoded as UTF-8, in every locale, with surrogates for other bytes.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Container, Iterator

from imds_guard.errors import GuardError, NotPermitted, system_text
from imds_guard.kernel import name_service, ownership, syscalls
from imds_guard.kernel.name_service import ID_WITHIN_S, Group, User, parsed_group, parsed_user

VARIABLE = "IMDS_GUARD_NAMES_ROOT"
FOLDERS = ("etc", "usr/lib", "usr/share/baselayout")
"""Where passwd and group are looked for. The first entry counts, as with ``passwd: files altfiles``.

/usr/lib is the default of nss-altfiles, which ostree systems use; /usr/share/baselayout is Flatcar's.
"""
MAX_BYTES = 16 * 1024 * 1024
"""The largest file that is read: some 200,000 accounts."""


def other_root() -> str | None:
    """The root whose files are read in place of the name service; None where the name service is asked."""
    return os.environ.get(VARIABLE) or None


def user_by_name(name: str) -> User | None:
    """The account of that name. Raises GuardError where files can't be used, NoAnswer."""
    root = other_root()
    if root is not None:
        return _users_by_name(root).get(name)
    return name_service.user(name)


def user_by_id(uid: int, within_s: float = ID_WITHIN_S) -> User | None:
    """The first account with that ID. Raises GuardError where files can't be used, NoAnswer."""
    root = other_root()
    if root is not None:
        return _users_by_id(root).get(uid)
    return name_service.user(uid, within_s)


def user_in_files(name: str) -> User | None:
    """The account of that name in the files alone. Raises GuardError where they can't be used."""
    return _users_by_name(other_root() or "/").get(name)


def group_in_files(name: str) -> Group | None:
    """The group of that name in the files alone. Raises GuardError where they can't be used."""
    return _groups_by_name(other_root() or "/").get(name)


def user_in_files_by_id(uid: int) -> User | None:
    """The first account with that ID in the files alone. Raises GuardError where they can't be used."""
    return _users_by_id(other_root() or "/").get(uid)


def group_in_files_by_id(gid: int) -> Group | None:
    """The first group with that ID in the files alone. Raises GuardError where they can't be used."""
    return _groups_by_id(other_root() or "/").get(gid)


def groups_in_files(user: User) -> list[int]:
    """The primary group, and every group of the files that lists the user. Raises GuardError."""
    return [user.gid, *(group.gid for group in _groups(other_root() or "/") if user.name in group.members)]


def names_in_files(kind: str) -> list[str]:
    """All names of users or groups in the files, to look for a similar one; empty where they can't be used."""
    try:
        return list(_users_by_name(other_root() or "/") if kind == "user" else _groups_by_name(other_root() or "/"))
    except GuardError:
        return []


def primary_groups() -> list[tuple[int, int]]:
    """The user ID and primary group ID of all accounts that can be listed. Raises as user_by_name()."""
    root = other_root()
    if root is not None:
        return [(user.uid, user.gid) for user in _users(root)]
    return name_service.primary_groups()


def group_by_name(name: str) -> Group | None:
    """The group of that name. Raises GuardError where files can't be used, NoAnswer."""
    root = other_root()
    if root is not None:
        return _groups_by_name(root).get(name)
    return name_service.group(name)


def group_by_id(gid: int, within_s: float = ID_WITHIN_S) -> Group | None:
    """The first group with that ID. Raises GuardError where files can't be used, NoAnswer."""
    root = other_root()
    if root is not None:
        return _groups_by_id(root).get(gid)
    return name_service.group(gid, within_s)


def groups_of(user: User) -> list[int]:
    """The primary group, and every group that lists the user. Raises as user_by_name()."""
    root = other_root()
    if root is None:
        return name_service.groups_of(user)
    return groups_in_files(user)


def users_with_sub_ids() -> list[User]:
    """The accounts in files that have sub-IDs (subuid(5), subgid(5)). Raises GuardError where files can't be used."""
    root = other_root() or "/"
    names = {fields[0] for file in ("subuid", "subgid") for fields in _entries(root, file, 3)}
    return [user for user in _users(root) if user.name in names or str(user.uid) in names]


def members_in_files(gids: Container[int]) -> set[str]:
    """The names that these groups list in the files alone. Raises GuardError where they can't be used."""
    return {name for group in _groups(other_root() or "/") if group.gid in gids for name in group.members}


# --- the files of another root: each is read once in the life of a process ------------------------------------------


@functools.cache
def _users(root: str) -> tuple[User, ...]:
    return tuple(filter(None, map(parsed_user, _entries(root, "passwd", 4))))


@functools.cache
def _groups(root: str) -> tuple[Group, ...]:
    return tuple(filter(None, map(parsed_group, _entries(root, "group", 4))))


@functools.cache
def _users_by_name(root: str) -> dict[str, User]:
    return {user.name: user for user in reversed(_users(root))}


@functools.cache
def _users_by_id(root: str) -> dict[int, User]:
    return {user.uid: user for user in reversed(_users(root))}


@functools.cache
def _groups_by_name(root: str) -> dict[str, Group]:
    return {group.name: group for group in reversed(_groups(root))}


@functools.cache
def _groups_by_id(root: str) -> dict[int, Group]:
    return {group.gid: group for group in reversed(_groups(root))}


def _entries(root: str, file: str, wanted: int) -> Iterator[list[str]]:
    """The fields of each line. The C library, too, skips lines that are no entries (nss_files)."""
    for folder in FOLDERS:
        for line in _read(root, f"{folder}/{file}").decode("utf-8", "surrogateescape").split("\n"):
            fields = line.split(":")
            if len(fields) >= wanted and fields[0] and fields[0][0] not in "#+-":
                yield fields


def _read(root: str, path: str) -> bytes:
    """Empty where there is no such file. Symbolic links are followed as a process of that root would follow them."""
    what = f"reading {os.path.join(root, path)} for the names of users and groups ({VARIABLE})"
    try:
        with open(_opened(root, path), "rb") as file:
            _check(os.fstat(file.fileno()), what)
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except PermissionError as error:
        raise NotPermitted(f"{what}: {system_text(error)}; run the container privileged, with hostPID") from error
    except OSError as error:
        raise GuardError(f"{what}: {system_text(error)}; give IDs in place of names") from error
    if len(content) > MAX_BYTES:
        raise GuardError(f"{what}: it has more than {MAX_BYTES // 1024 // 1024} MiB; give IDs in place of names")
    return content


def _opened(root: str, path: str) -> int:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a FIFO must not make this wait
    if root == "/":
        # openat2(2) has nothing to add, and is ENOSYS in the units: RestrictSUIDSGID= can't look at its mode.
        return os.open(f"/{path}", flags)
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return syscalls.open_in_root(top, path, flags)
    finally:
        os.close(top)


def _check(found: os.stat_result, what: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise GuardError(f"{what}: it is not a regular file; give IDs in place of names")
    if not ownership.only_root_can_write(found, root_group=True):
        raise GuardError(f"{what}: others than root may write it; take that right from them, or give IDs")
