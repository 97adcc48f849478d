#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the matrix: each row of kernels.toml in a QEMU guest of its own, without a network."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vagrant.matrix.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
