# SPDX-License-Identifier: Apache-2.0
"""Lines of /proc/PID/mountinfo."""

from __future__ import annotations

import os

import pytest

from imds_guard.kernel.mounts import Mount, _parse, mounts


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n",
            Mount(os.makedev(98, 0), "/mnt1", "/mnt2", "ext3"),
        ),
        (
            "42 25 0:37 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
            Mount(os.makedev(0, 37), "/", "/sys/fs/cgroup", "cgroup2"),
        ),
        (
            "50 25 0:4 net:[4026532000] /run/netns/a\\040b\\134 rw shared:3 master:4 - nsfs nsfs rw\n",
            Mount(os.makedev(0, 4), "net:[4026532000]", "/run/netns/a b\\", "nsfs"),
        ),
        ("51 25 0:5 / /none rw - tmpfs  rw\n", Mount(os.makedev(0, 5), "/", "/none", "tmpfs")),
    ],
)
def test_a_line(line: str, expected: Mount) -> None:
    """Optional fields and the source may be missing; the kernel escapes blanks and backslashes."""
    assert _parse(line) == expected


def test_the_mounts_of_one_type() -> None:
    assert "/proc" in [mount.path for mount in mounts("proc")]
