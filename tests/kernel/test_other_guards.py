# SPDX-License-Identifier: Apache-2.0
"""Guards whose cgroup is gone, and ``stop --all``. They are in a BPF filesystem that the test mounts.

The real one has the guards of other tests, and a test that removed those would harm them.
"""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.backends.ebpf import EbpfBackend, other_guards
from imds_guard.commands import guard, look, verify
from imds_guard.commands.look import Status
from imds_guard.commands.options import GuardOptions
from imds_guard.kernel import bpffs, syscalls
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.present.status import status_word
from tests.kernel.guards import NEW, NEW_POLICY, OLD, OLD_POLICY, folder_of, guarded_sandbox, passing

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and cgroups needs root")


@pytest.fixture(autouse=True)
def own_bpffs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A BPF filesystem with the guards of this test alone."""
    folder = tmp_path / "bpf"
    folder.mkdir()
    syscalls.mount("bpf", str(folder), "bpf", "mode=0700")
    monkeypatch.setattr(bpffs, "find_bpffs", lambda: str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def orphan() -> other_guards.Orphan:
    """A guard whose cgroup was removed. The kernel detaches its links a moment later."""
    with Sandbox() as sandbox:
        EbpfBackend(sandbox.cgroup).apply(OLD_POLICY)
        folder = folder_of(sandbox.cgroup)
        with open_cgroup(sandbox.cgroup) as opened:
            identity = opened.id
    for _ in range(500):
        found = other_guards.orphans()
        if found:
            assert found == [other_guards.Orphan(identity, folder.path)]
            return found[0]
        select.select([], [], [], 0.02)
    raise AssertionError("the links of a removed cgroup stay attached")


def guards_in(folder: Path) -> list[str]:
    """The folders of pins in a BPF filesystem, in which the kernel has files of its own, too."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("imds-guard"))


def of_removed_cgroups(status: Status) -> list[str]:
    """The faults that are about guards of removed cgroups."""
    return [fault for fault in status.faults if fault.startswith("the cgroup of a guard was removed")]


def test_status_names_a_guard_whose_cgroup_is_gone(orphan: other_guards.Orphan) -> None:
    found = look.status(None)
    assert of_removed_cgroups(found) == [orphan.fault]
    assert str(orphan.cgroup_id) in orphan.fault
    assert status_word(found) == "degraded"


def test_a_directory_that_was_made_again_is_not_locked_and_status_says_so(orphan: other_guards.Orphan) -> None:
    with Sandbox() as again:
        found = look.status(again.cgroup)
    assert (found.backend, of_removed_cgroups(found)) == (None, [orphan.fault])


def test_a_guard_that_is_whole_does_not_suffer_from_another_cgroup(orphan: other_guards.Orphan) -> None:
    with guarded_sandbox() as (sandbox, backend):
        backend.apply(OLD_POLICY)
        assert look.status(sandbox.cgroup).faults == []
    assert other_guards.orphans() == [orphan]


def test_the_next_start_removes_it(orphan: other_guards.Orphan, own_bpffs: Path) -> None:
    with guarded_sandbox() as (sandbox, _):
        outcome = guard.start(NEW_POLICY, GuardOptions(cgroup=sandbox.cgroup), lambda _: None)
        assert f"removed the guard of the cgroup with ID {orphan.cgroup_id} (it is gone)" in outcome.done
        assert guards_in(own_bpffs) == [folder_of(sandbox.cgroup).name]
        assert passing(sandbox, (OLD, NEW)) == {NEW}


def test_verify_repairs_it_without_a_lock_on_the_machine(
    orphan: other_guards.Orphan, own_bpffs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was in force on the machine, and there is no configuration: nothing else is to be put back."""

    def forbidden(*_: object) -> None:
        raise AssertionError("nothing may be attached to the machine's root here")

    monkeypatch.setattr(verify, "_put_back", forbidden)
    missing = str(own_bpffs / "no-configuration.toml")
    assert of_removed_cgroups(verify.verify(missing, GuardOptions()).before) == [orphan.fault]
    done = verify.repair(missing, GuardOptions(), lambda _: None)
    assert [line for line in done.repaired if orphan.fault in line] == [f"{orphan.fault}: the pins were removed"]
    assert of_removed_cgroups(done.after) == []
    assert guards_in(own_bpffs) == []


def test_a_guard_that_is_being_built_is_not_taken_for_one(own_bpffs: Path) -> None:
    with Sandbox() as sandbox:
        folder = folder_of(sandbox.cgroup)
        folder.begin()
        assert other_guards.orphans() == []
        assert other_guards.remove_orphans().done == ()
        assert os.path.isdir(folder.building)


def test_all_guards_of_cgroups_can_be_removed_at_once(orphan: other_guards.Orphan, own_bpffs: Path) -> None:
    with guarded_sandbox() as (one, first), guarded_sandbox() as (two, second):
        first.apply(OLD_POLICY)
        second.apply(NEW_POLICY)
        assert [passing(sandbox, (OLD, NEW)) for sandbox in (one, two)] == [frozenset({OLD}), frozenset({NEW})]
        done = other_guards.remove_all().done
        assert len(done) == 3
        assert f"removed the guard of the cgroup with ID {orphan.cgroup_id} (it is gone)" in done
        assert (passing(one, (OLD, NEW)), passing(two, (OLD, NEW))) == (frozenset({OLD, NEW}),) * 2
    assert guards_in(own_bpffs) == []


@pytest.mark.parametrize("first", ["a pin", "all pins"])
def test_two_commands_remove_the_same_orphan(
    orphan: other_guards.Orphan, own_bpffs: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """A guard that stop is removing looks like an orphan to another start: each may find that the other was faster."""
    listed = os.listdir

    def by_somebody_else(path: str) -> list[str]:
        names = listed(path)
        if path in (orphan.path, f"{orphan.path}~old"):
            for name in names[: 1 if first == "a pin" else None]:
                os.unlink(os.path.join(path, name))
            if first == "all pins":
                os.rmdir(path)
        return names

    monkeypatch.setattr(os, "listdir", by_somebody_else)
    other_guards.remove_orphans()
    monkeypatch.undo()
    assert not list(own_bpffs.glob("imds-guard*"))
