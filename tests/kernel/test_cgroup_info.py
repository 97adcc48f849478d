# SPDX-License-Identifier: Apache-2.0
"""The path of the cgroup that a record names, with real cgroups."""

from __future__ import annotations

import os

import pytest

from imds_guard.kernel import children
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.privileges import CAP_DAC_READ_SEARCH
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.watch.cgroup_info import CgroupCache, CgroupInfo
from tests.kernel.places import without_capabilities

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups needs root")


def look_up(cgroup_id: int, pid: int) -> CgroupInfo:
    with open_cgroup() as root:
        return CgroupCache(root).look_up(cgroup_id, pid)


def in_a_cgroup(privileged: bool) -> tuple[CgroupInfo, str]:
    """What is found for the cgroup of a living process, and the path that is right."""
    with Sandbox() as sandbox:

        def inside() -> CgroupInfo:
            if not privileged:
                without_capabilities(CAP_DAC_READ_SEARCH)
            return look_up(os.stat(sandbox.cgroup).st_ino, os.getpid())

        return sandbox.call(inside), "/" + os.path.basename(sandbox.cgroup)


@pytest.mark.parametrize("privileged", [True, False])
def test_the_cgroup_of_a_living_process_has_its_path(privileged: bool) -> None:
    """Without CAP_DAC_READ_SEARCH the path comes from /proc/PID/cgroup."""
    found, path = in_a_cgroup(privileged)
    assert found.path == path


@pytest.mark.parametrize("privileged", [True, False])
def test_a_removed_cgroup_is_unknown_although_its_process_id_is_used_again(privileged: bool) -> None:
    """The process that has the ID now is in another cgroup."""
    with Sandbox() as sandbox:
        gone = os.stat(sandbox.cgroup).st_ino

    def work() -> CgroupInfo:
        if not privileged:
            without_capabilities(CAP_DAC_READ_SEARCH)
        return look_up(gone, os.getpid())

    assert children.run_in_child(work) == CgroupInfo()
