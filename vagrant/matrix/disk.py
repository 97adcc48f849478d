# SPDX-License-Identifier: Apache-2.0
"""Makes disk images from folders, without a mount and without root."""

from __future__ import annotations

import os
from pathlib import Path

from vagrant.matrix.process import run

MIB = 1024 * 1024


def make_disk(folder: Path, image: Path, spare_mib: int = 16) -> None:
    """An ext2 file system with the content of a folder. Older kernels do not know the newer defaults of mke2fs."""
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
    """The size of the files in blocks of 4 KiB, and an eighth more for inodes and tables."""
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
    """An empty ext2 file system in a sparse file."""
    run(["mke2fs", "-q", "-t", "ext2", "-b", "4096", "-m", "0", str(image), f"{size_mib}M"])
