# SPDX-License-Identifier: Apache-2.0
"""Changes the credentials of the calling thread alone (credentials(7))."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable

from imds_guard.kernel import syscalls

Triple = tuple[int, int, int]
"""Real, effective and saved ID."""


def become(
    uids: Triple | None = None,
    gids: Triple | None = None,
    groups: Iterable[int] | None = None,
    fsuid: int | None = None,
    fsgid: int | None = None,
) -> None:
    """Sets IDs of the calling thread. An ID that is None stays, but an effective ID also sets its filesystem ID.

    Groups are set first and user IDs last, while the thread still has the privilege. Without the privilege ``fsuid``
    must be one of ``uids`` (setfsuid(2)). Raises OSError.
    """
    if groups is not None:
        syscalls.setgroups(tuple(groups))
    if gids is not None:
        syscalls.setresgid(*gids)
    if fsgid is not None:
        _set_filesystem_id(syscalls.setfsgid, fsgid)
    if uids is not None:
        syscalls.setresuid(*uids)
    if fsuid is not None:
        _set_filesystem_id(syscalls.setfsuid, fsuid)


def _set_filesystem_id(call: Callable[[int], int], wanted: int) -> None:
    """The call never fails: it returns the ID before it, so a second call shows whether the first one worked."""
    call(wanted)
    if call(-1) != wanted:
        raise PermissionError(f"{call.__name__}({wanted}) did not change the ID")
