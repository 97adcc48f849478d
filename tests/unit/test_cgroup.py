# SPDX-License-Identifier: Apache-2.0
"""The way from a cgroup up to the root of its hierarchy."""

from __future__ import annotations

import os
from pathlib import Path

from imds_guard.kernel.cgroup import Cgroup, ancestors


def test_the_way_up_ends_where_the_file_system_does(tmp_path: Path) -> None:
    """Also at the root of all files, which is the folder above itself."""
    device = tmp_path.stat().st_dev
    with Cgroup(os.open(tmp_path, os.O_RDONLY), 0, str(tmp_path)) as folder:
        found = [path for path, _ in ancestors(folder)]
    assert found == [str(above) for above in tmp_path.parents if above.stat().st_dev == device]
