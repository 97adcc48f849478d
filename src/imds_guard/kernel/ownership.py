# SPDX-License-Identifier: Apache-2.0
"""Whether root alone may write a file or a folder."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress

_MAX_LINKS = 40
"""The kernel follows no more (path_resolution(7))."""
_ACL = "system.posix_acl_access"
"""The extended attribute of an access control list (acl(5)). Its mask is what the mode shows as the group's bits."""

_WRITE_BITS_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def is_owned_by_root(found: os.stat_result) -> bool:
    """An owner other than root may write, whatever the mode is: chmod(2) is theirs."""
    return found.st_uid == 0


def mode_for_root_alone(found: os.stat_result) -> int:
    """The mode without the write bits of group and others."""
    return stat.S_IMODE(found.st_mode) & ~_WRITE_BITS_OF_OTHERS


def only_root_can_write(found: os.stat_result, *, root_group: bool = False) -> bool:
    """True when root is the owner and nobody else may write. With ``root_group`` members of the group root may, too.

    A sticky folder (1777) that everybody may write counts as writable: others can make names in it.
    """
    group_counts_as_root = root_group and found.st_gid == 0
    others = stat.S_IWOTH if group_counts_as_root else _WRITE_BITS_OF_OTHERS
    return is_owned_by_root(found) and not found.st_mode & others


# --- paths ------------------------------------------------------------------------------------------------------------


def others_can_change(path: str, *, lasting: bool = False) -> str | None:
    """Says where others than root can change what ``path`` leads to; None where only root can. Raises OSError.

    All folders and symbolic links on the way count: whoever can write to a folder can put another file in its place. In
    a sticky folder that is root's others can't replace what is root's. With ``lasting`` such a folder counts, too,
    since it may be emptied, and then anybody can take the name. A read-only mount is changed by nobody (but see
    _is_read_only()).
    """
    return next((_described(step) for step in _steps(path) if _is_open_to_others(step, lasting)), None)


def others_can_change_entry(path: str, *, lasting: bool = False) -> str | None:
    """others_can_change() for an entry of a folder for which that is None: the way to it is known. Raises OSError."""
    if os.path.islink(path):
        return others_can_change(path, lasting=lasting)
    return _described(path) if _is_open_to_others(path, lasting) else None


def _steps(path: str) -> Iterator[str]:
    """Every folder, symbolic link and file that the look-up of ``path`` goes through (path_resolution(7))."""
    done, links = "/", 0
    remaining = _parts(path if os.path.isabs(path) else os.path.join(os.getcwd(), path))
    yield done
    while remaining:
        name = remaining.pop()
        if name == "..":
            done = os.path.dirname(done)
            continue
        done = os.path.join(done, name)
        yield done
        if os.path.islink(done):
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink(done)
            done = "/" if os.path.isabs(target) else os.path.dirname(done)
            remaining += _parts(target)


def _parts(path: str) -> list[str]:
    """The names in a path, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _is_open_to_others(step: str, lasting: bool) -> bool:
    found, folder = os.lstat(step), os.stat(os.path.dirname(step))
    if not _is_open_by_mode(step, found, folder, lasting):
        return False
    return not _is_read_only(os.path.dirname(step) if stat.S_ISLNK(found.st_mode) else step)


def _is_open_by_mode(step: str, found: os.stat_result, folder: os.stat_result, lasting: bool) -> bool:
    if _is_sticky(folder) and not is_owned_by_root(found):
        return True  # its owner can replace it
    if stat.S_ISLNK(found.st_mode):
        return False  # nobody can write to a link; who can replace it is a matter of its folder
    if only_root_can_write(found) or (only_root_can_write(found, root_group=True) and not _has_acl(step)):
        return False
    return lasting or not (stat.S_ISDIR(found.st_mode) and is_owned_by_root(found) and _is_sticky(found))


def _is_read_only(path: str) -> bool:
    """True for a file or folder on a read-only mount.

    ProtectSystem=strict of our own units makes every mount read-only, for the unit alone (systemd.exec(5)). So where
    PID 1 sees the same file, its mount has to be read-only there, too.
    """
    if not _mount_is_read_only(path):
        return False
    from imds_guard.kernel.mounts import window_to_pid1  # noqa: PLC0415 -- start-up time: few mounts are read-only

    outside = f"/proc/{window_to_pid1()}/root{path}"
    try:
        return not os.path.samestat(os.lstat(path), os.lstat(outside)) or _mount_is_read_only(outside)
    except OSError:
        return True  # PID 1 has no such file, or may not be inspected: it is the machine's, and this a container


def _mount_is_read_only(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _is_sticky(found: os.stat_result) -> bool:
    return bool(found.st_mode & stat.S_ISVTX)


def _has_acl(path: str) -> bool:
    with suppress(OSError):  # a filesystem without extended attributes
        return _ACL in os.listxattr(path)
    return False


def _described(path: str) -> str:
    found = os.lstat(path)
    mode = f"{stat.S_IMODE(found.st_mode):04o}"
    acl = " and an access control list" if _has_acl(path) else ""
    return f"{path} (owner {found.st_uid}, group {found.st_gid}, mode {mode}{acl})"
