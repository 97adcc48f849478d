# SPDX-License-Identifier: Apache-2.0
"""What the Vagrantfile asks: the rows as machines, as JSON on standard output (python3 -m vagrant.box.machines).

Vagrant's Ruby has no TOML, so Python reads kernels.toml for it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from vagrant.matrix import cache, suite, table
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.table import Matrix, Row


@dataclass(frozen=True)
class Machine:
    """A row as the Vagrantfile needs it. ``box`` is empty where build-box has made none."""

    name: str
    why: str
    userland: str
    series: str
    cmdline: str
    sources: tuple[str, ...]
    packages: tuple[str, ...]
    memory_mib: int
    cpus: int
    has_suite: bool
    box: str
    box_name: str


def machine(matrix: Matrix, row: Row) -> Machine:
    """One row as a machine."""
    path = link(row.name)
    box, box_name = (str(path), path.resolve().parent.name) if path.exists() else ("", "")
    return Machine(
        row.name, row.why, row.userland.name, row.kernel.series, cmdline(row), _sources(matrix, row),
        row.userland.packages, row.memory_mib, row.cpus, has_suite(row), box, box_name,
    )  # fmt: skip


def cmdline(row: Row) -> str:
    """The words that a row adds to its kernel's command line when systemd is PID 1."""
    return " ".join(filter(None, (row.cmdline, suite._LEGACY_CGROUPS if "legacy-cgroups" in row.setup else "")))


def has_suite(row: Row) -> bool:
    """False for the rows about the service: their tests are for a machine that has no network card at all."""
    return "systemd" not in row.setup


def link(name: str) -> Path:
    """Where the newest box of a row is found."""
    return cache.root() / "boxes" / f"{name}.box"


def _sources(matrix: Matrix, row: Row) -> tuple[str, ...]:
    """sources.list lines for the suite of the row's kernel, as far as the userland's own release does not have it."""
    own, wanted = row.userland.suite, row.kernel.suite
    release = wanted.split("-", maxsplit=1)[0]
    mirror, security = matrix.archive.mirror, matrix.archive.security
    lines = [] if release == own else [f"deb {mirror} {release} main", f"deb {security} {release}-security main"]
    return (*lines, f"deb {mirror} {wanted} main") if wanted.endswith("-backports") else tuple(lines)


def main() -> int:
    """Prints the JSON; exit status 3 and a sentence when kernels.toml can't be read."""
    try:
        matrix = table.load()
    except MatrixError as error:
        sys.stderr.write(f"machines: {error}\n")
        return 3
    json.dump([asdict(machine(matrix, row)) for row in matrix.rows], sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
