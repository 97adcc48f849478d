# SPDX-License-Identifier: Apache-2.0
"""Who besides root may write."""

from __future__ import annotations

import os
import stat

import pytest

from imds_guard.kernel.ownership import mode_for_root_alone, only_root_can_write

FILE, FOLDER = stat.S_IFREG, stat.S_IFDIR


def found(mode: int, uid: int = 0, gid: int = 0) -> os.stat_result:
    return os.stat_result((mode, 1, 1, 1, uid, gid, 0, 0, 0, 0))


@pytest.mark.parametrize("root_group", [False, True])
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (found(FILE | 0o644), True),
        (found(FOLDER | 0o755, gid=50), True),
        (found(FOLDER | 0o2755), True),
        (found(FILE | 0o644, uid=1000), False),
        (found(FILE | 0o400, uid=1000), False),
        (found(FILE | 0o646), False),
        (found(FOLDER | 0o777), False),
        (found(FOLDER | 0o1777), False),
        (found(FILE | 0o664, gid=50), False),
    ],
)
def test_only_root_can_write(status: os.stat_result, expected: bool, root_group: bool) -> None:
    """Also with the group root trusted: mode 0777 of root:root is open to everybody, and so is a sticky 1777."""
    assert only_root_can_write(status, root_group=root_group) is expected


@pytest.mark.parametrize("root_group", [False, True])
def test_the_group_root_may_write_only_where_it_is_trusted(root_group: bool) -> None:
    assert only_root_can_write(found(FILE | 0o664), root_group=root_group) is root_group


@pytest.mark.parametrize(("mode", "expected"), [(0o1777, 0o1755), (0o770, 0o750), (0o2755, 0o2755)])
def test_write_bits_are_taken_away_and_no_other(mode: int, expected: int) -> None:
    assert mode_for_root_alone(found(FOLDER | mode)) == expected
