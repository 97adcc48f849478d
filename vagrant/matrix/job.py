# SPDX-License-Identifier: Apache-2.0
"""Packs the job of a guest: one tar with job.sh and the files that it needs."""

from __future__ import annotations

import io
import os
import shlex
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

GUEST = Path(__file__).resolve().parent.parent / "guest"
MACHINERY = ("pid1", "pid1-systemd", "run-job", "reboot")
TREE = Path(__file__).resolve().parent.parent.parent
_LEFT_OUT = frozenset(
    {".git", "__pycache__", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "dist", "build"}
)


def write(
    target: Path,
    script: str,
    files: Mapping[str, Path],
    env: dict[str, str] | None = None,
    compiled: Mapping[str, Path] | None = None,
) -> None:
    """Writes a tar with job.sh and with files or folders under the given names. ``env`` is exported before the script.

    ``files`` are packed without the remains of builds and tools, ``compiled`` completely.
    """
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted((env or {}).items()))
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in MACHINERY:
            _add_text(archive, name, (GUEST / name).read_text(encoding="utf-8"))
        _add_text(archive, "job.sh", exports + script)
        for name, path in files.items():
            archive.add(path, arcname=name, filter=_sources_only)
        for name, path in (compiled or {}).items():
            archive.add(path, arcname=name, filter=_as_root)


def command(argv: Sequence[str], folder: str) -> str:
    """A script that runs one command in a folder of the job and exits with its status."""
    return f"cd {shlex.quote(folder)}\n{' '.join(shlex.quote(argument) for argument in argv)}\n"


def tree(leave_out: Iterable[str] = ()) -> dict[str, Path]:
    """The working tree for write(), without the remains of builds and tools."""
    skipped = _LEFT_OUT | set(leave_out)
    return {f"tree/{name}": TREE / name for name in sorted(os.listdir(TREE)) if name not in skipped}


def _add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(text.encode())
    member.mode = 0o755
    archive.addfile(member, io.BytesIO(text.encode()))


def _sources_only(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if _LEFT_OUT & set(Path(member.name).parts) else _as_root(member)


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member
