# SPDX-License-Identifier: Apache-2.0
"""Lines of mountinfo, and which of PID 1's BPF filesystems has the pins."""

from __future__ import annotations

import os

import pytest

from imds_guard.kernel import bpffs, mounts
from imds_guard.kernel.mounts import Mount

# The optional fields before " - " may be any number (proc_pid_mountinfo(5)).
LINES = (
    (r"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 shared:2 - ext4 /dev/sda1 rw", "ext4", "/mnt1", "/mnt 2"),
    (r"40 35 0:33 /a\134b /x\011y rw - bpf none rw,mode=700", "bpf", "/a\\b", "/x\ty"),
    (r"41 35 8:300 / /bpf rw - tmpfs bpf rw", "tmpfs", "/", "/bpf"),
)


@pytest.mark.parametrize(("line", "kind", "root", "path"), LINES)
def test_a_line_of_mountinfo(line: str, kind: str, root: str, path: str) -> None:
    """The type is not the source, and a space, a tab or a backslash in a path is an octal escape."""
    found = mounts._parse(line + "\n")
    assert (found.kind, found.root, found.path) == (kind, root, path)
    major, minor = line.split()[2].split(":")
    assert found.device == os.makedev(int(major), int(minor))


def test_the_mounts_of_this_process() -> None:
    """The device of a mount is st_dev of its path."""
    (proc, *_) = [mount for mount in mounts.mounts("proc") if mount.path == "/proc"]
    assert (proc.kind, proc.root, proc.device) == ("proc", "/", os.stat("/proc").st_dev)
    assert mounts.mounts("no-such-type") == []


USUAL = bpffs.USUAL_PATH


@pytest.mark.parametrize(
    ("found", "device"),
    [
        ([], None),
        ([(1, "/", "/mnt")], 1),
        ([(1, "/", "/mnt"), (2, "/", USUAL), (3, "/", "/x")], 2),
        ([(1, "/", USUAL), (2, "/", USUAL)], 2),
        ([(1, "/", "/mnt"), (2, "/", "/x")], 2),
        ([(1, "/", USUAL), (2, "/imds-guard", USUAL)], 1),
        ([(2, "/imds-guard", "/mnt")], None),
    ],
    ids=["none", "elsewhere", "usual path", "last hides the first", "last", "bind mount of a folder", "only a folder"],
)
def test_the_bpffs_of_pid_1(
    found: list[tuple[int, str, str]], device: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one mounted at the usual path, else the last one anywhere. A bind mount of a folder does not count."""
    monkeypatch.setattr(bpffs, "mounts", lambda kind, pid: [Mount(*one, kind) for one in found if pid == "1"])
    chosen = bpffs._of_pid1()
    assert (None if chosen is None else chosen.device) == device
