# SPDX-License-Identifier: Apache-2.0
"""The cache of kernels and images. The name of an entry has a hash of everything that its content is made from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Callable


def root() -> Path:
    """$IMDS_GUARD_CACHE, or ~/.cache/imds-guard-matrix."""
    given = os.environ.get("IMDS_GUARD_CACHE")
    return Path(given).absolute() if given else Path.home() / ".cache" / "imds-guard-matrix"


def digest(recipe: Mapping[str, object]) -> str:
    """A hash of a recipe in twelve hex digits. The order of the keys does not matter."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the lock of that name, so that two runs at the same time build an entry once."""
    folder = root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w", encoding="ascii") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def entry(kind: str, name: str, recipe: Mapping[str, object], build: Callable[[Path], None]) -> Path:
    """The folder that ``build`` fills from ``recipe``; it is made if it does not exist. No one sees it half built."""
    final = root() / kind / f"{name}-{digest(recipe)}"
    with locked(f"{kind}-{final.name}"):
        if final.is_dir():
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            draft.chmod(0o755)
            build(draft)
            (draft / "recipe.json").write_text(json.dumps(recipe, sort_keys=True, indent=2) + "\n", encoding="utf-8")
            draft.rename(final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return final
