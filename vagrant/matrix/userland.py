# SPDX-License-Identifier: Apache-2.0
"""A userland as one read-only disk image that serves all kernels: the distribution's packages, and nothing of ours."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vagrant.matrix import archive as debian
from vagrant.matrix import cache
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.process import find, run
from vagrant.matrix.table import Archive, Userland

_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
RECIPE_VERSION = 1
"""One more whenever what _build() makes changes: the cache goes by it."""
SPARE_MIB = 64


def fetch(archive: Archive, userland: Userland) -> Path:
    """The userland's image, built unless it is in the cache."""
    recipe: dict[str, object] = {
        "version": RECIPE_VERSION,
        "sources": debian.sources(archive, userland.suite),
        "packages": userland.packages,
    }
    folder = cache.entry("userlands", userland.name, recipe, lambda draft: _build(draft, archive, userland))
    return folder / "root.img"


def _build(draft: Path, archive: Archive, userland: Userland) -> None:
    with scratch_of_owners(draft) as scratch:
        run(_bootstrap(archive, userland, scratch / "root.tar"), deadline_s=3600)
        # Root of a user namespace may not make devices (mknod(2)); guests mount a devtmpfs over them anyway.
        left_out = [] if os.geteuid() == 0 else ["--exclude=./dev/*"]
        run(as_owner(["sh", "-ec", _TO_DISK, "sh", str(scratch), str(draft / "root.img"), str(SPARE_MIB), *left_out]))


_TO_DISK = """
cd "$1"
image=$2 spare=$3
shift 3
mkdir root
tar -xf root.tar -C root --numeric-owner --xattrs --xattrs-include='*' "$@"
size=$(du -sm --apparent-size root | cut -f1)
mke2fs -q -t ext2 -b 4096 -m 0 -d root "$image" $((size * 5 / 4 + spare))M
"""


def _bootstrap(archive: Archive, userland: Userland, tarball: Path) -> list[str]:
    argv = [
        "mmdebstrap", "--quiet", "--variant=minbase", "--architectures=amd64",
        f"--include={','.join(userland.packages)}",
        '--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=Acquire::Retries "5"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
        userland.suite, str(tarball), *debian.sources(archive, userland.suite),
    ]  # fmt: skip
    # As root mmdebstrap would make its mounts in the host's mount namespace: give it one of its own.
    return ["unshare", "--mount", *argv] if os.geteuid() == 0 else [*argv, "--mode=unshare"]


def as_owner(argv: Sequence[str]) -> list[str]:
    """Argv so that files' owners are what they are in the image: as root, or in a user namespace whose root is us.

    Root of mmdebstrap's own namespaces (--unshare-helper) is a sub-ID: a home of mode 700 shuts it out.
    """
    if os.geteuid() == 0:
        return list(argv)
    find("newuidmap")
    namespace = ["unshare", "--map-root-user", "--map-auto"]
    try:
        # By itself first: where there may be no user namespace, a child that waits to map sub-IDs is left for ever.
        run(["unshare", "--user", "true"])
        run([*namespace, "chroot", "/", "true"])
    except MatrixError as error:
        raise MatrixError(
            f"{error}; without root, disk images are made in a user namespace: that takes util-linux 2.38 and sub-IDs "
            "(usermod --add-subuids FIRST-LAST --add-subgids FIRST-LAST $USER, 65536 that are nobody's), or be root"
        ) from error
    return [*namespace, *argv]


@contextmanager
def scratch_of_owners(draft: Path) -> Iterator[Path]:
    """A folder for as_owner(): what is left in it need not be ours, so that its owner removes it."""
    folder = tempfile.mkdtemp(dir=draft)
    remove = as_owner(["rm", "-rf", folder])
    try:
        yield Path(folder)
    finally:
        run(remove)
