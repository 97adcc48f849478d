# SPDX-License-Identifier: Apache-2.0
"""The table of releases is true and complete."""

from __future__ import annotations

from pathlib import Path

from imds_guard.backends.ebpf import abi
from tests.release import releases
from tests.release.releases import RELEASES, Release


def test_the_row_names_the_abi_of_its_commit(release: Release, tmp_path: Path) -> None:
    """The ABI number in the table is the one in the header of that commit."""
    releases.extract(release, tmp_path)
    assert releases.abi_of(tmp_path) == release.abi


def test_every_abi_since_the_first_release_has_a_row() -> None:
    """Whoever raises IG_ABI adds a row with the last commit that had the old number."""
    assert {release.abi for release in RELEASES} >= set(range(RELEASES[0].abi, abi.ABI))


def test_the_rows_are_in_order() -> None:
    """The oldest comes first, no ABI number goes down, and none is higher than that of this tree."""
    numbers = [release.abi for release in RELEASES]
    assert numbers == sorted(numbers)
    assert numbers[-1] <= abi.ABI
