# SPDX-License-Identifier: Apache-2.0
"""Each release with this tree, extracted once, and a place for a guard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Callable

import pytest

from imds_guard.backends.ebpf import abi
from tests.release import releases
from tests.release import scene as scenes
from tests.release.releases import RELEASES, Pair, Release, Variant
from tests.release.scene import Scene

PairOf = Callable[[Release, Variant], Pair]


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> PairOf:
    """The trees for a release and a variant."""
    made: dict[tuple[Release, Variant], Pair] = {}

    def get(release: Release, variant: Variant) -> Pair:
        if (release, variant) not in made:
            made[release, variant] = releases.pair(release, variant, tmp_path_factory.mktemp("trees"))
        return made[release, variant]

    return get


@pytest.fixture(params=RELEASES, ids=[release.version for release in RELEASES])
def release(request: pytest.FixtureRequest) -> Release:
    """Each release."""
    found: Release = request.param
    return found


@pytest.fixture
def released(release: Release, pair_of: PairOf) -> Pair:
    """Each release and this tree as they are."""
    return pair_of(release, Variant.AS_RELEASED)


@pytest.fixture
def readable(release: Release, pair_of: PairOf) -> Pair:
    """Each release whose maps this tree can read, and this tree."""
    if release.abi != abi.ABI:
        pytest.skip(f"the maps of ABI {release.abi} are not read, but replaced by a start")
    return pair_of(release, Variant.AS_RELEASED)


@pytest.fixture(params=Variant, ids=[variant.value for variant in Variant])
def pair(request: pytest.FixtureRequest, release: Release, pair_of: PairOf) -> Pair:
    """Each release and this tree in each variant."""
    return pair_of(release, request.param)


@pytest.fixture(params=[Variant.OTHER_MAP_SIZE, Variant.NEXT_ABI], ids=lambda variant: str(variant.value))
def foreign(request: pytest.FixtureRequest, release: Release, pair_of: PairOf) -> Pair:
    """Each release and this tree in the variants in which neither can read the maps of the other."""
    return pair_of(release, request.param)


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A place for a guard."""
    if os.geteuid() != 0:
        pytest.skip("attaching programs needs root")
    with scenes.scene() as one:
        yield one
