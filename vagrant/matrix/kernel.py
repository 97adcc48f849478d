# SPDX-License-Identifier: Apache-2.0
"""Prepares a kernel of the archive for QEMU as three files: the kernel, an initramfs, a disk with its modules."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vagrant.matrix import cache, initramfs
from vagrant.matrix.architecture import Architecture
from vagrant.matrix.archive import Suite
from vagrant.matrix.disk import make_disk
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.process import run
from vagrant.matrix.table import Archive, Kernel

BUSYBOX_SUITE = "bookworm"
RECIPE_VERSION = 1
"""Part of the cache key: add one when _build() makes something else."""


@dataclass(frozen=True)
class KernelFiles:
    """The files that a guest boots. ``release`` is the output of uname -r in it."""

    release: str
    vmlinuz: Path
    initrd: Path
    modules: Path
    architecture: Architecture


def choose(names: Iterable[str], series: str, flavour: str) -> tuple[str, list[str]]:
    """The newest ABI of a series among package names, and the packages with its image and its modules.

    From 6.19 on linux-image-* is empty: the image is in linux-binary-*, the modules are in linux-modules-*, the list of
    built-in modules is in linux-base-*. A version that is not signed yet has linux-binary-unsigned-* alone. Raises
    MatrixError when the archive does not have the series.
    """
    pattern = re.compile(
        rf"linux-(image|binary|binary-unsigned|modules|base)-({re.escape(series)}\.[^-+]*[-+].*)-{re.escape(flavour)}"
    )
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            found.setdefault(match[2], {})[match[1]] = name
    bootable = [abi for abi, kinds in found.items() if set(kinds) - {"modules", "base"}]
    if not bootable:
        raise MatrixError(f"the archive has no kernel {series} of flavour {flavour} in this suite")
    abi = max(bootable, key=lambda text: [int(number) for number in re.findall(r"\d+", text)])
    kinds = found[abi]
    image = next(kinds[kind] for kind in ("binary", "binary-unsigned", "image") if kind in kinds)
    return f"{abi}-{flavour}", [image, *(kinds[kind] for kind in ("modules", "base") if kind in kinds)]


def fetch(archive: Archive, kernel: Kernel) -> KernelFiles:
    """Downloads and prepares the newest kernel of a series, unless it is in the cache."""
    suite = Suite(archive, kernel.suite, kernel.architecture.name)
    release, packages = choose(suite.names("linux-"), kernel.series, kernel.flavour)
    recipe: dict[str, object] = {
        "packages": {name: suite.version(name) for name in packages},
        "version": RECIPE_VERSION,
        "init": hashlib.sha256(initramfs.INIT.read_bytes()).hexdigest(),
    }

    def build(draft: Path) -> None:
        _build(draft, suite, _busybox(archive, kernel.architecture), release, packages)

    folder = cache.entry("kernels", release, recipe, build)
    return KernelFiles(release, folder / "vmlinuz", folder / "initrd", folder / "modules.img", kernel.architecture)


def _build(draft: Path, suite: Suite, busybox: Path, release: str, packages: list[str]) -> None:
    unpacked = draft / "unpacked"
    suite.unpack(packages, unpacked)
    modules = unpacked / "lib" / "modules" / release
    if (unpacked / "usr/lib/modules" / release).is_dir():
        modules = unpacked / "usr/lib/modules" / release
    shutil.move(str(_image(unpacked, modules, release)), str(draft / "vmlinuz"))
    tree = draft / "tree"
    (tree / "lib/modules").mkdir(parents=True)
    modules.rename(tree / "lib/modules" / release)
    modules = tree / "lib/modules" / release
    initramfs.expand_modules(modules)
    run(["depmod", "-b", str(tree), release])
    initramfs.write(draft / "initrd", busybox, initramfs.load_order(modules))
    make_disk(tree / "lib/modules", draft / "modules.img")
    shutil.rmtree(tree)
    shutil.rmtree(unpacked)


def _image(unpacked: Path, modules: Path, release: str) -> Path:
    for path in (unpacked / f"boot/vmlinuz-{release}", modules / "vmlinuz", modules / "vmlinuz.unsigned"):
        if path.is_file():
            return path
    raise MatrixError(f"the packages of {release} have no kernel image at any of the usual paths")


def _busybox(archive: Archive, architecture: Architecture) -> Path:
    suite = Suite(archive, BUSYBOX_SUITE, architecture.name)
    recipe = {"version": suite.version("busybox-static")}
    folder = cache.entry(
        "busybox", f"busybox-{architecture.name}", recipe, lambda draft: suite.unpack(["busybox-static"], draft)
    )
    return folder / "bin/busybox"
