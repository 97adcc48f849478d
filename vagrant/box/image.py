# SPDX-License-Identifier: Apache-2.0
"""Makes disks of partitions and changes ext2 images, by programs that need neither a mount nor root."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from vagrant.matrix.disk import blank
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.process import run

MIB = 1024 * 1024
GIB = 1024 * MIB
SECTOR = 512
BOOT_MIB = 96
MBR = (Path("/usr/lib/syslinux/mbr/mbr.bin"), Path("/usr/share/syslinux/mbr.bin"))
"""The paths on Debian and on Fedora."""

_CONFIG = """\
DEFAULT row
PROMPT 0
LABEL row
  LINUX vmlinuz
  INITRD initrd
  APPEND {cmdline}
"""


def make_boot(target: Path, vmlinuz: Path, initrd: Path, cmdline: str) -> None:
    """A FAT file system with syslinux, a kernel, its initramfs and its command line."""
    config = target.with_name("syslinux.cfg")
    config.write_text(_CONFIG.format(cmdline=cmdline), encoding="ascii")
    blank(target, BOOT_MIB)
    # -H: the first sector of the partition (join()), which the boot sector of syslinux adds to its addresses.
    _mtools("mformat", "-i", str(target), "-H", str(MIB // SECTOR), "-T", str(BOOT_MIB * MIB // SECTOR), "::")
    for path, name in ((vmlinuz, "vmlinuz"), (initrd, "initrd"), (config, "syslinux.cfg")):
        _mtools("mcopy", "-i", str(target), str(path), f"::{name}")
    run(["syslinux", "--install", str(target)])


def _mtools(*argv: str) -> None:
    if shutil.which(argv[0]) is None:
        raise MatrixError(f"{argv[0]} is not installed: apt-get install mtools")
    run(argv)


def join(disk: Path, partitions: Sequence[Path]) -> None:
    """A disk with an MBR and the given images as partitions, each at a whole MiB. The first one is active."""
    entries, offset = b"", MIB
    with open(disk, "wb") as out:
        for number, partition in enumerate(partitions):
            size = -(-partition.stat().st_size // MIB) * MIB
            # Status, CHS (not used), type (FAT16 with LBA, Linux), CHS, first sector, sectors.
            kind, active = (0x0E, 0x80) if number == 0 else (0x83, 0)
            entries += struct.pack(
                "<B3sB3sII", active, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", offset // SECTOR, size // SECTOR
            )
            _copy(partition, out, offset)
            offset += size
        out.truncate(offset)
        out.seek(0)
        out.write(_mbr().ljust(446, b"\0")[:446] + entries.ljust(64, b"\0") + b"\x55\xaa")


def _copy(source: Path, out: BinaryIO, offset: int) -> None:
    """Copies an image without its blocks of zeros: the disk stays sparse."""
    out.seek(offset)
    with open(source, "rb") as image:
        while chunk := image.read(MIB):
            if chunk.count(0) == len(chunk):
                out.seek(len(chunk), 1)
            else:
                out.write(chunk)


def _mbr() -> bytes:
    for path in MBR:
        if path.exists():
            return path.read_bytes()
    raise MatrixError(f"there is no {MBR[0]}: apt-get install syslinux-common")


def grow(image: Path, size: int) -> None:
    """Enlarges an ext2 image and gives it a journal: a machine that is switched off must boot again."""
    with open(image, "r+b") as handle:
        handle.truncate(size)
    run(["e2fsck", "-f", "-p", str(image)])
    run(["resize2fs", str(image)])
    run(["tune2fs", "-j", str(image)])


def to_qcow2(disk: Path, target: Path) -> None:
    """Converts the disk to qcow2, the only format of vagrant-libvirt."""
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(target)])


def virtual_size(disk: Path) -> int:
    """The size of the disk that a guest sees, in bytes."""
    return int(json.loads(run(["qemu-img", "info", "--output=json", str(disk)]))["virtual-size"])
