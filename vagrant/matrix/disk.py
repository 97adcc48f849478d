# SPDX-License-Identifier: Apache-2.0
"""Disk images from folders, without a mount and without root."""

from __future__ import annotations

import os
from pathlib import Path

from vagrant.matrix.process import run

MIB = 1024 * 1024


def make_disk(folder: Path, image: Path, spare_mib: int = 16) -> None:
    """An ext2 file system with a folder's content. Plain ext2: mke2fs' newer defaults are unknown to older kernels."""
    run(
        [
            "mke2fs",
            "-q",
            "-t",
            "ext2",
            "-b",
            "4096",
            "-m",
            "0",
            "-d",
            str(folder),
            str(image),
            f"{_needed_mib(folder) + spare_mib}M",
        ]
    )


def _needed_mib(folder: Path) -> int:
    """Room for the files in blocks of 4 KiB, and for inodes and tables: an eighth more."""
    total = 0
    for top, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            total += (os.lstat(os.path.join(top, name)).st_size + 4095) // 4096 * 4096 + 512
    return total * 9 // 8 // MIB + 1


def blank(image: Path, size_mib: int) -> None:
    """A sparse file of zeros."""
    with open(image, "wb") as handle:
        handle.truncate(size_mib * MIB)


def format_blank(image: Path, size_mib: int) -> None:
    """An empty file system of the same plain kind; the file is sparse."""
    run(["mke2fs", "-q", "-t", "ext2", "-b", "4096", "-m", "0", str(image), f"{size_mib}M"])
