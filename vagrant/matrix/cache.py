# SPDX-License-Identifier: Apache-2.0
"""Kernels and images outside the tree. A name holds the hash of everything that its content was made from."""

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
    """Twelve hex digits that stand for a recipe, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the cache's lock of that name: two runs at once build a thing once."""
    folder = root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w", encoding="ascii") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def entry(kind: str, name: str, recipe: Mapping[str, object], build: Callable[[Path], None]) -> Path:
    """The folder that ``build`` fills from ``recipe``, made unless it is there. Half-built ones are never seen."""
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
