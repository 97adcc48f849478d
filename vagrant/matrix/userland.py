# SPDX-License-Identifier: Apache-2.0
"""Makes a read-only disk image of a userland, for all kernels: packages of the distribution, and nothing of ours.

No program of another architecture is run here. So its userland is the native one of the same release, with the files
of the packages replaced by those of the other architecture. What the scripts of the packages have made stays: accounts,
alternatives, compiled Python.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vagrant.matrix import archive as debian
from vagrant.matrix import cache
from vagrant.matrix.architecture import Architecture, native
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.process import find, run
from vagrant.matrix.table import Archive, Userland

_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
RECIPE_VERSION = 1
"""Part of the cache key: add one when _build() makes something else."""
SPARE_MIB = 64


def fetch(archive: Archive, userland: Userland, architecture: Architecture | None = None) -> Path:
    """The image of a userland (default: native), which is built unless it is in the cache."""
    architecture = architecture or native()
    sources = debian.sources(archive, userland.suite, architecture.name)
    recipe: dict[str, object] = {"version": RECIPE_VERSION, "sources": sources, "packages": userland.packages}
    name, native_image = userland.name, None
    if architecture != native():
        name, native_image = f"{userland.name}-{architecture.name}", fetch(archive, userland, native())
        recipe["native"] = native_image.parent.name

    def build(draft: Path) -> None:
        with scratch_of_owners(draft) as scratch:
            run(_bootstrap(userland, sources, architecture, scratch / "root.tar"), deadline_s=3600)
            if native_image is not None:
                run(as_owner(["sh", "-ec", _WITHOUT_PACKAGES, "sh", find("debugfs"), str(scratch), str(native_image)]))
            # Root of a user namespace may not make devices (mknod(2)). Guests mount a devtmpfs over them.
            left_out = [] if os.geteuid() == 0 else ["--exclude=./dev/*"]
            made = str(draft / "root.img")
            run(as_owner(["sh", "-ec", _TO_DISK, "sh", str(scratch), made, str(SPARE_MIB), *left_out]))

    return cache.entry("userlands", name, recipe, build) / "root.img"


# The lists of dpkg have folders, too, which rm refuses to remove. A script of libc-bin has made ld.so.cache.
_WITHOUT_PACKAGES = r"""
mkdir "$2/root"
cd "$2/root"
"$1" -R "rdump / ." "$3" 2>/dev/null
cat var/lib/dpkg/info/*.list | sed 's|^/||' | xargs -d '\n' rm -f 2>/dev/null || :
rm etc/ld.so.cache
"""
# --keep-directory-symlink: /bin is a link to usr/bin, and a folder in packages of Debian 12.
_TO_DISK = """
cd "$1"
image=$2 spare=$3
shift 3
mkdir -p root
tar -xf root.tar -C root --keep-directory-symlink --numeric-owner --xattrs --xattrs-include='*' "$@"
size=$(du -sm --apparent-size root | cut -f1)
mke2fs -q -t ext2 -b 4096 -m 0 -d root "$image" $((size * 5 / 4 + spare))M
"""


def _bootstrap(userland: Userland, sources: Sequence[str], architecture: Architecture, tarball: Path) -> list[str]:
    # The variant "extract" runs no script, and has no package that is not named.
    variant, packages = ("minbase", []) if architecture == native() else ("extract", ["?essential"])
    argv = [
        "mmdebstrap", "--quiet", f"--variant={variant}", f"--architectures={architecture.name}",
        *(f"--include={included}" for included in [*packages, ",".join(userland.packages)]),
        '--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=Acquire::Retries "5"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
        userland.suite, str(tarball), *sources,
    ]  # fmt: skip
    # As root mmdebstrap would mount in the mount namespace of the host, so it gets a namespace of its own.
    return ["unshare", "--mount", *argv] if os.geteuid() == 0 else [*argv, "--mode=unshare"]


def as_owner(argv: Sequence[str]) -> list[str]:
    """``argv`` with a prefix, so that files have the owners of the image: root, or root of a user namespace.

    In that namespace root is the caller. In mmdebstrap's own (--unshare-helper) it is a sub-ID, which a home folder of
    mode 700 shuts out.
    """
    if os.geteuid() == 0:
        return list(argv)
    find("newuidmap")
    namespace = ["unshare", "--map-root-user", "--map-auto"]
    try:
        # This alone first: where user namespaces are forbidden, a child that waits for its map of sub-IDs would stay.
        run(["unshare", "--user", "true"])
        run([*namespace, "chroot", "/", "true"])
    except MatrixError as error:
        raise MatrixError(
            f"{error}; without root, disk images are made in a user namespace, which needs util-linux 2.38 and 65536 "
            "unused sub-IDs (usermod --add-subuids FIRST-LAST --add-subgids FIRST-LAST $USER): set them up, or be root"
        ) from error
    return [*namespace, *argv]


@contextmanager
def scratch_of_owners(draft: Path) -> Iterator[Path]:
    """A scratch folder for as_owner(). It may contain files of other owners, so it is removed by as_owner(), too."""
    folder = tempfile.mkdtemp(dir=draft)
    remove = as_owner(["rm", "-rf", folder])
    try:
        yield Path(folder)
    finally:
        run(remove)
