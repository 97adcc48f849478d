# SPDX-License-Identifier: Apache-2.0
"""Installs the wheel and compiles pytest once for a userland, by its own pip and Python, at the speed of the host.

An emulated processor would take twenty seconds for it, in every guest.
"""

from __future__ import annotations

from pathlib import Path

from vagrant.matrix import cache
from vagrant.matrix.process import find, run
from vagrant.matrix.userland import as_owner, scratch_of_owners

RECIPE_VERSION = 3
"""Part of the cache key: add one when _build() makes something else."""


def fetch(image: Path, wheel: Path, tools: Path) -> dict[str, Path]:
    """Folders for a job: ``local``, to be copied to the guest's /usr/local, and ``tools``, for PYTHONPATH.

    Image, wheel and tools come from the cache, so that the names of their folders identify their content.
    """
    sources = {"image": image.parent.name, "wheel": wheel.parent.name, "tools": tools.name}
    recipe: dict[str, object] = {"version": RECIPE_VERSION, **sources}
    folder = cache.entry("installed", image.parent.name, recipe, lambda draft: _build(draft, image, wheel, tools))
    return {"local": folder / "local", "tools": folder / "tools"}


def _build(draft: Path, image: Path, wheel: Path, tools: Path) -> None:
    with scratch_of_owners(draft) as scratch:
        run(as_owner(["sh", "-ec", _INSTALL, "sh", find("debugfs"), *map(str, (scratch, image, wheel, tools, draft))]))


# debugfs always exits with 0, but when it fails there is no Python in the copy. pip before 23.0.1 does not know
# --break-system-packages, and ignores the variable.
_INSTALL = """
mkdir "$2/root"
cd "$2/root"
"$1" -R "rdump / ." "$3" 2>/dev/null
mkdir -p job
cp "$4" job/
cp -R "$5" job/tools
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
unset PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME
chroot . sh -ec '
cd /job
python3 -m pip install --quiet --no-deps --no-index --no-warn-script-location ./*.whl
cd tools
python3 -m compileall -q -j 1 *pytest pluggy iniconfig packaging
'
mv usr/local job/tools "$6"
"""
