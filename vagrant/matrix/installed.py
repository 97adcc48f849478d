# SPDX-License-Identifier: Apache-2.0
"""What every guest of a userland would do anew, done once, by the userland's own pip and Python, at the host's speed.

An emulated processor takes twenty seconds to install a wheel and to compile pytest.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Dict

from vagrant.matrix import cache
from vagrant.matrix.process import find, run
from vagrant.matrix.userland import as_owner

RECIPE_VERSION = 1
"""One more whenever what _build() makes changes: the cache goes by it."""


def fetch(image: Path, wheel: Path, tools: Path) -> Dict[str, Path]:
    """Folders for a job: ``local``, to be laid over the guest's /usr/local, and ``tools``, for PYTHONPATH.

    All three come from the cache, so that their folders' names stand for what is in them.
    """
    sources = {"image": image.parent.name, "wheel": wheel.parent.name, "tools": tools.name}
    recipe: Dict[str, object] = {"version": RECIPE_VERSION, **sources}
    folder = cache.entry("installed", image.parent.name, recipe, lambda draft: _build(draft, image, wheel, tools))
    return {"local": folder / "local", "tools": folder / "tools"}


def _build(draft: Path, image: Path, wheel: Path, tools: Path) -> None:
    with tempfile.TemporaryDirectory(dir=draft) as scratch:
        run(as_owner(["sh", "-ec", _INSTALL, "sh", find("debugfs"), scratch, *map(str, (image, wheel, tools, draft))]))


# Tools are compiled where the guest has them: the compiled code names its file. debugfs exits with 0 come what may, but
# then there is no Python in the copy. Python before 3.12 has no --break-system-packages to be told of.
_INSTALL = """
cd "$2"
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
cp -R --preserve=mode,timestamps,links usr/local "$6/local"
cp -R --preserve=mode,timestamps,links job/tools "$6/tools"
"""
