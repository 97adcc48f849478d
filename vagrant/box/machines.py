# SPDX-License-Identifier: Apache-2.0
"""Prints the rows as machines in JSON, for the Vagrantfile (python3 -m vagrant.box.machines).

Vagrant's Ruby has no TOML parser.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from vagrant.matrix import cache, suite, table
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.table import Matrix, Row

ARCHITECTURE = "amd64"
"""Boxes boot by the BIOS, which arm64 has not, and Vagrant starts no guest of another architecture than its host's."""


@dataclass(frozen=True)
class Machine:
    """A row for the Vagrantfile. ``box`` is empty unless build-box has made one."""

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
    """The machine of a row."""
    path = link(row.name)
    box, box_name = (str(path), path.resolve().parent.name) if path.exists() else ("", "")
    return Machine(
        row.name, row.why, row.userland.name, row.kernel.series, cmdline(row), _sources(matrix, row),
        row.userland.packages, row.memory_mib, row.cpus, has_suite(row), box, box_name,
    )  # fmt: skip


def has_box(row: Row) -> bool:
    """False for the rows of other architectures, which are no Vagrant machines."""
    return row.kernel.architecture.name == ARCHITECTURE


def cmdline(row: Row) -> str:
    """Arguments that a row adds for its kernel when systemd is PID 1."""
    return " ".join(filter(None, (row.cmdline, suite.LEGACY_CGROUPS if "legacy-cgroups" in row.setup else "")))


def has_suite(row: Row) -> bool:
    """False for the rows about the service: their tests need a machine without a network card."""
    return "systemd" not in row.setup


def link(name: str) -> Path:
    """The path of the link to the newest box of a row."""
    return cache.root() / "boxes" / f"{name}.box"


def _sources(matrix: Matrix, row: Row) -> tuple[str, ...]:
    """sources.list lines for the suite of the row's kernel, unless the release of the userland has it."""
    own, wanted = row.userland.suite, row.kernel.suite
    release = wanted.split("-", maxsplit=1)[0]
    mirror, security = matrix.archive.mirror, matrix.archive.security
    lines = [] if release == own else [f"deb {mirror} {release} main", f"deb {security} {release}-security main"]
    return (*lines, f"deb {mirror} {wanted} main") if wanted.endswith("-backports") else tuple(lines)


def main() -> int:
    """Exit status: 0 printed, 3 kernels.toml could not be read."""
    try:
        matrix = table.load()
    except MatrixError as error:
        sys.stderr.write(f"machines: {error}\n")
        return 3
    json.dump([asdict(machine(matrix, row)) for row in matrix.rows if has_box(row)], sys.stdout, indent=1)
    left_out = ", ".join(row.name for row in matrix.rows if not has_box(row))
    if left_out:
        sys.stderr.write(f"Vagrantfile: left out, because boxes are for {ARCHITECTURE} alone: {left_out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
