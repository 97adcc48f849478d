# SPDX-License-Identifier: Apache-2.0
"""The same job that a QEMU row gets, as a file that Vagrant uploads."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Sequence

from vagrant.matrix import cache, job, suite, table, wheel
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.table import Matrix, Row


def plan(matrix: Matrix, results: Path) -> suite.Plan:
    """What ./run matrix would do, with the tree as it is now."""
    return suite.Plan(matrix.archive, job.TREE, wheel.build(job.TREE), results, every=matrix.every)


def pack(matrix: Matrix, row: Row, folder: Path) -> Path:
    """Writes job.tar; one that is there is replaced only when the new one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".job.tar.{os.getpid()}"
    try:
        suite._pack(plan(matrix, cache.root() / "results"), row, draft)
        draft.replace(folder / "job.tar")
    finally:
        draft.unlink(missing_ok=True)
    return folder / "job.tar"


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
