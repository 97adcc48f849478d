# SPDX-License-Identifier: Apache-2.0
"""Finds out whether KVM works by booting a kernel under it: guests may hang although /dev/kvm exists."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vagrant.matrix import cache, guest, job, kernel, userland
from vagrant.matrix.architecture import native
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.table import Matrix

TRIAL_S = 30.0
"""Under a KVM that works the guest ends in 2 to 3 s."""


def choose(matrix: Matrix, wanted: str) -> str:
    """kvm or tcg, for guests of this machine's architecture; all others are emulated.

    "auto" tries KVM once for each boot of this machine, with the first row of that architecture.
    """
    if wanted != "auto":
        return wanted
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    remembered = cache.root() / f"kvm-{boot_id}"
    with cache.locked("kvm"):
        if not remembered.exists():
            remembered.write_text("kvm" if _boots(matrix) else "tcg", encoding="ascii")
    return remembered.read_text(encoding="ascii")


def _boots(matrix: Matrix) -> bool:
    row = next(row for row in matrix.rows if row.kernel.architecture == native())
    booted = guest.Guest(
        kernel.fetch(matrix.archive, row.kernel), userland.fetch(matrix.archive, row.userland), accel="kvm"
    )
    with tempfile.TemporaryDirectory(prefix="imds-guard-matrix-") as scratch:
        folder = Path(scratch)
        job.write(folder / "job.tar", "true\n", {})
        try:
            return guest.boot(booted, folder / "job.tar", folder, TRIAL_S).status == 0
        except MatrixError:
            return False
