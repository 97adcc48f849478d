# SPDX-License-Identifier: Apache-2.0
"""Makes the initramfs: busybox, modules for the root disk, our init. The cpio archive is written without root."""

from __future__ import annotations

import gzip
import lzma
import stat
from collections.abc import Mapping
from pathlib import Path

from vagrant.matrix.errors import MatrixError

INIT = Path(__file__).resolve().parent.parent / "guest" / "initramfs-init"

NEEDED = ("virtio_pci", "virtio_blk", "ext4", "overlay")
"""Modules that the root disk needs. One that is built into a kernel is not loaded."""


def expand_modules(folder: Path) -> None:
    """Unpacks .ko.xz in place (Debian compresses modules since 6.12). The signature is part of the module and stays."""
    for packed in folder.rglob("*.ko.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()


def load_order(folder: Path) -> list[Path]:
    """The files of NEEDED and of their dependencies, in an order for insmod."""
    dependencies = {path: needs.split() for path, needs in _lines(folder / "modules.dep", ":")}
    by_name = {_name(path): path for path in dependencies}
    builtin = {_name(path) for path, _ in _lines(folder / "modules.builtin", " ")}
    ordered: list[str] = []
    for name in NEEDED:
        if name in by_name:
            for first in _soft_dependencies(folder, name, by_name):
                ordered += _after_dependencies(by_name[first], dependencies)
            ordered += _after_dependencies(by_name[name], dependencies)
        elif name not in builtin:
            raise MatrixError(f"the kernel in {folder.name} has no {name}, neither as a module nor built in")
    return [folder / path for path in dict.fromkeys(ordered)]


def _name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


def _lines(path: Path, separator: str) -> list[tuple[str, str]]:
    """The lines of a file of depmod without comments, each split at the first separator."""
    lines = path.read_text(encoding="ascii").splitlines()
    split = (line.partition(separator) for line in lines if line and not line.startswith("#"))
    return [(before, after.strip()) for before, _, after in split]


def _after_dependencies(path: str, dependencies: Mapping[str, list[str]]) -> list[str]:
    # modules.dep lists dependencies from the nearest to the deepest (modules.dep(5)).
    return [*reversed(dependencies[path]), path]


def _soft_dependencies(folder: Path, name: str, by_name: Mapping[str, str]) -> list[str]:
    """The modules that a module asks modprobe to load before it (softdep in modprobe.d(5)).

    ext4 asks for crypto-crc32c, without which it mounts nothing. Of several implementations the generic one works on
    every processor.
    """
    aliases = [after.rpartition(" ") for word, after in _lines(folder / "modules.alias", " ") if word == "alias"]
    found = []
    for _, softdep in _lines(folder / "modules.softdep", " "):
        of, *words = softdep.split()
        wanted = words[words.index("pre:") + 1 :] if of == name and "pre:" in words else []
        for word in wanted[: wanted.index("post:")] if "post:" in wanted else wanted:
            modules = [module for alias, _, module in aliases if alias == word and module in by_name]
            modules.sort(key=lambda module: not module.endswith("_generic"))
            found += [module for module in (word.replace("-", "_"), *modules) if module in by_name][:1]
    return found


def write(target: Path, busybox: Path, modules: list[Path]) -> None:
    """Writes the gzipped cpio archive that QEMU passes to the kernel."""
    archive = _Cpio()
    for folder in ("bin", "dev", "modules"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, INIT.read_bytes())
    for position, module in enumerate(modules):
        archive.add(f"modules/{position:02}-{module.name}", stat.S_IFREG | 0o644, module.read_bytes())
    target.write_bytes(gzip.compress(archive.finish(), compresslevel=5, mtime=0))


class _Cpio:
    """A "newc" archive in memory. The format: Documentation/driver-api/early-userspace/buffer-format.rst in Linux."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        numbers = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(raw), 0)
        self._put(b"070701" + b"".join(b"%08X" % number for number in numbers) + raw)
        self._put(content)

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._bytes)

    def _put(self, chunk: bytes) -> None:
        self._bytes += chunk
        self._bytes += b"\0" * (-len(self._bytes) % 4)
