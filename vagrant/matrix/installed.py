# SPDX-License-Identifier: Apache-2.0
"""What every guest of a userland would do anew, done once, by the userland's own pip and Python, at the host's speed.

An emulated processor takes twenty seconds to install a wheel and to compile pytest.
"""

from __future__ import annotations

from pathlib import Path

from vagrant.matrix import cache
from vagrant.matrix.process import find, run
from vagrant.matrix.userland import as_owner, scratch_of_owners

RECIPE_VERSION = 3
"""One more whenever what _build() makes changes: the cache goes by it."""


def fetch(image: Path, wheel: Path, tools: Path) -> dict[str, Path]:
    """Folders for a job: ``local``, to be laid over the guest's /usr/local, and ``tools``, for PYTHONPATH.

    All three come from the cache, so that their folders' names stand for what is in them.
    """
    sources = {"image": image.parent.name, "wheel": wheel.parent.name, "tools": tools.name}
    recipe: dict[str, object] = {"version": RECIPE_VERSION, **sources}
    folder = cache.entry("installed", image.parent.name, recipe, lambda draft: _build(draft, image, wheel, tools))
    return {"local": folder / "local", "tools": folder / "tools"}


def _build(draft: Path, image: Path, wheel: Path, tools: Path) -> None:
    with scratch_of_owners(draft) as scratch:
        run(as_owner(["sh", "-ec", _INSTALL, "sh", find("debugfs"), *map(str, (scratch, image, wheel, tools, draft))]))


# debugfs exits with 0 come what may, but then there is no Python in the copy. An older pip knows no
# --break-system-packages, and takes the variable for nothing.
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
