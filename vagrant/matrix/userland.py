# SPDX-License-Identifier: Apache-2.0
"""A userland as one read-only disk image that serves all kernels: the distribution's packages, and nothing of ours."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Dict, List, Sequence

from vagrant.matrix import archive as debian
from vagrant.matrix import cache
from vagrant.matrix.process import run
from vagrant.matrix.table import Archive, Userland

_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
RECIPE_VERSION = 1
"""One more whenever what _build() makes changes: the cache goes by it."""
SPARE_MIB = 64


def fetch(archive: Archive, userland: Userland) -> Path:
    """The userland's image, built unless it is in the cache."""
    recipe: Dict[str, object] = {
        "version": RECIPE_VERSION,
        "sources": debian.sources(archive, userland.suite),
        "packages": userland.packages,
    }
    folder = cache.entry("userlands", userland.name, recipe, lambda draft: _build(draft, archive, userland))
    return folder / "root.img"


def _build(draft: Path, archive: Archive, userland: Userland) -> None:
    tarball = draft / "root.tar"
    run(_bootstrap(archive, userland, tarball), deadline_s=3600)
    with tempfile.TemporaryDirectory(dir=draft) as folder:
        script = ["sh", "-ec", _TO_DISK, "sh", str(tarball), f"{folder}/root", str(draft / "root.img"), str(SPARE_MIB)]
        run(as_owner(script))
    tarball.unlink()


_TO_DISK = """
mkdir "$2"
tar -xf "$1" -C "$2" --numeric-owner --xattrs --xattrs-include='*'
size=$(du -sm --apparent-size "$2" | cut -f1)
PATH="$PATH:/usr/sbin:/sbin"
mke2fs -q -t ext2 -b 4096 -m 0 -d "$2" "$3" $((size * 5 / 4 + $4))M
rm -rf "$2"
"""


def _bootstrap(archive: Archive, userland: Userland, tarball: Path) -> List[str]:
    argv = [
        "mmdebstrap", "--quiet", "--variant=minbase", "--architectures=amd64",
        f"--include={','.join(userland.packages)}",
        '--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=Acquire::Retries "5"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
        userland.suite, str(tarball), *debian.sources(archive, userland.suite),
    ]  # fmt: skip
    # As root mmdebstrap would make its mounts in the host's mount namespace: give it one of its own.
    return ["unshare", "--mount", *argv] if os.geteuid() == 0 else [*argv, "--mode=unshare"]


def as_owner(argv: Sequence[str]) -> List[str]:
    """Argv so that files' owners are what they are in the image: as root, or in a user namespace of mmdebstrap's."""
    return list(argv) if os.geteuid() == 0 else ["mmdebstrap", "--unshare-helper", *argv]
