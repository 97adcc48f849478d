# SPDX-License-Identifier: Apache-2.0
"""Packs the job of a QEMU row as a file that Vagrant uploads."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vagrant.matrix import cache, job, suite, table, wheel
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.table import Matrix, Row


def plan(matrix: Matrix, results: Path) -> suite.Plan:
    """The plan of ./run matrix for the present tree."""
    return suite.Plan(matrix.archive, job.TREE, wheel.build(job.TREE), results, shares=suite.shares(matrix.rows))


def pack(matrix: Matrix, row: Row, folder: Path) -> Path:
    """Writes job.tar.gz. An existing one is replaced when the new one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tarball = Path(scratch, "job.tar")
        suite.pack(plan(matrix, cache.root() / "results"), row, tarball)
        # Compressed, because an emulated processor must decrypt it. Renamed into place: nobody uploads half of it.
        draft = folder / f".{os.getpid()}"
        with open(tarball, "rb") as plain, gzip.open(draft, "wb", compresslevel=6) as small:
            shutil.copyfileobj(plain, small)
        return draft.replace(folder / "job.tar.gz")


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 packed, 2 usage, 3 could not be packed."""
    if len(argv) != 2:
        sys.stderr.write("usage: vagrant/box/pack ROW FOLDER\n")
        return 2
    try:
        matrix = table.load()
        pack(matrix, matrix.row(argv[0]), Path(argv[1]))
    except MatrixError as error:
        sys.stderr.write(f"pack: {error}\n")
        return 3
    return 0
