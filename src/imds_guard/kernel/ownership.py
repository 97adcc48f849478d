# SPDX-License-Identifier: Apache-2.0
"""Whether root alone may write a file or a folder."""

from __future__ import annotations

import os
import stat

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
