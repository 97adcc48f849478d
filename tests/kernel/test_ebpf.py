# SPDX-License-Identifier: Apache-2.0
"""The eBPF backend on the running kernel, attached to a cgroup of the test's own."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from imds_guard.backends.ebpf import EbpfBackend, abi, program
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.features import FEATURES, Feature, defines_of
from imds_guard.backends.ebpf.pins import link_pin, map_pin
from imds_guard.backends.ebpf.reader import MapReader
from imds_guard.errors import GuardError
from imds_guard.kernel import bpf, privileges, syscalls
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from tests.kernel import guards
from tests.kernel.guards import BOTH, IPV4, NEW, NEW_POLICY, OLD, OLD_POLICY, STRANGER

Guarded = tuple[Sandbox, EbpfBackend]


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    if os.geteuid() != 0:
        pytest.skip("attaching programs needs root")
    with guards.guarded_sandbox() as pair:
        yield pair


def _program_ids(backend: EbpfBackend) -> tuple[int, ...]:
    return tuple(p.id for hook in backend.state().hooks for p in hook.attached)


def test_life_of_a_guard(guarded: Guarded) -> None:
    """No policy, one, another, none again. At each point connects fare as the backend says."""
    sandbox, backend = guarded
    assert backend.read() is None
    assert guards.passing(sandbox) == {OLD, NEW, BOTH, STRANGER}
    backend.apply(OLD_POLICY)
    assert (backend.read(), backend.faults()) == (OLD_POLICY, [])
    assert guards.passing(sandbox) == {OLD, BOTH}
    programs = _program_ids(backend)
    backend.apply(NEW_POLICY)
    assert (backend.read(), backend.faults()) == (NEW_POLICY, [])
    assert guards.passing(sandbox) == {NEW, BOTH}
    assert _program_ids(backend) == programs, "a change of policy loads no program"
    assert backend.remove()
    assert guards.passing(sandbox) == {OLD, NEW, BOTH, STRANGER}
    assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}
    assert not backend.remove()


def test_the_same_policy_again_changes_nothing(guarded: Guarded) -> None:
    _, backend = guarded
    backend.apply(OLD_POLICY)
    generation = backend.state().generation
    assert backend.apply(OLD_POLICY).done == ("the policy was in force already",)
    assert backend.state().generation == generation


def test_a_change_of_policy_imports_no_bcc(guarded: Guarded) -> None:
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    code = (
        "import sys; sys.path[:0] = sys.argv[1].split(':')\n"
        "from imds_guard.backends.ebpf import EbpfBackend\n"
        "from tests.kernel.guards import NEW_POLICY\n"
        "EbpfBackend(sys.argv[2]).apply(NEW_POLICY)\n"
        "print([m for m in ('bcc', 'psutil', 'click') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, f"{root / 'src'}:{root}", sandbox.cgroup],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert backend.read() == NEW_POLICY


def test_another_version_of_the_program_replaces_ours(guarded: Guarded) -> None:
    """LINK_UPDATE replaces the programs. The links, the maps and the policy stay."""
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    before = backend.state()
    other = EbpfBackend(sandbox.cgroup, defines=(("IG_ANOTHER_VERSION", 1),))
    other.apply(OLD_POLICY)
    after = other.state()
    assert after.versions == [program.source_version((("IG_ANOTHER_VERSION", 1),))] != before.versions
    assert after.generation == before.generation
    assert [hook.ours.map_ids for hook in after.hooks if hook.ours] == [h.ours.map_ids for h in before.hooks if h.ours]
    assert guards.passing(sandbox) == {OLD, BOTH}


def test_an_allow_keeps_the_version_that_runs(guarded: Guarded) -> None:
    """Only start upgrades the programs. A change of policy must not wait for a compiler."""
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    EbpfBackend(sandbox.cgroup, defines=(("IG_ANOTHER_VERSION", 1),)).change(NEW_POLICY)
    assert backend.state().versions == [program.source_version()]
    assert guards.passing(sandbox) == {NEW, BOTH}


def test_maps_of_another_layout_are_replaced(guarded: Guarded) -> None:
    """A smaller map of locks stands for the layout of another version."""
    sandbox, backend = guarded
    with guards.other_layout():
        backend.apply(OLD_POLICY)
    assert any("another version" in fault for fault in backend.faults())
    backend.apply(NEW_POLICY)
    assert (backend.read(), backend.faults()) == (NEW_POLICY, [])
    assert guards.passing(sandbox) == {NEW, BOTH}
    assert guards.traces(sandbox.cgroup) == {"attached": 4, "pins": 1}


@pytest.mark.parametrize("version", [1, abi.ABI + 1])
def test_maps_that_another_abi_wrote_are_replaced(guarded: Guarded, version: int) -> None:
    """Records of the same size may have another meaning, also those of the counters."""
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    guards.passing(sandbox, (STRANGER,))
    assert backend.state().counters[Reason.NOT_LISTED][0]
    generation = backend.state().generation
    assert generation is not None
    other = abi.SETTINGS.pack(1, abi.MODE_ENFORCE, 0, version, bytes(16), 0, 1)
    _poke(sandbox, Map.SETTINGS, abi.ARRAY_KEY.pack(generation), other)
    assert any("another version" in fault for fault in backend.faults())
    backend.apply(NEW_POLICY)
    assert (backend.read(), backend.faults()) == (NEW_POLICY, [])
    assert backend.state().counters[Reason.NOT_LISTED] == (0, 0)
    assert guards.passing(sandbox) == {NEW, BOTH}


def test_counters_live_through_a_replacement_of_the_maps(guarded: Guarded) -> None:
    """Metrics must not fall back to zero, nor the number of changes."""
    sandbox, backend = guarded
    with guards.other_layout():
        backend.apply(OLD_POLICY)
        guards.passing(sandbox, (STRANGER,))
        before = backend.state().counters
        assert before[Reason.NOT_LISTED][0]
    backend.apply(OLD_POLICY)
    assert backend.state().counters == before
    with MapReader.open(guards.folder_of(sandbox.cgroup).path) as maps:
        assert maps.in_force() == (1, 2)


# --- what status must report ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", sorted(set(abi.HOOKS) - set(abi.GETPEERNAME)))
def test_a_missing_hook_is_a_fault_and_start_repairs_it(guarded: Guarded, hook: str) -> None:
    sandbox, backend = guarded
    policy = OLD_POLICY._replace(strict=hook == abi.EGRESS)
    backend.apply(policy)
    fd = bpf.pinned(link_pin(guards.folder_of(sandbox.cgroup).path, hook))
    bpf.link_detach(fd)
    os.close(fd)
    assert [fault for fault in backend.faults() if hook in fault and "not attached" in fault]
    backend.apply(policy)
    assert backend.faults() == []
    assert guards.passing(sandbox) == {OLD, BOTH}


def test_an_unlinked_pin_is_a_fault(guarded: Guarded) -> None:
    """Without its only pin the link is gone, and the program is detached."""
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    os.unlink(link_pin(guards.folder_of(sandbox.cgroup).path, "connect6"))
    assert any("connect6" in fault for fault in backend.faults())
    backend.apply(OLD_POLICY)
    assert backend.faults() == []


def _poke(sandbox: Sandbox, number: Map, key: bytes, value: bytes) -> None:
    fd = bpf.pinned(map_pin(guards.folder_of(sandbox.cgroup).path, number))
    bpf.map_update(fd, key, value)
    os.close(fd)


def test_a_changed_map_is_a_fault_and_start_repairs_it(guarded: Guarded) -> None:
    """Somebody with the privilege to do so adds a user to the map."""
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    generation = backend.state().generation
    member = abi.MEMBER.pack(generation, abi.USER, 0, STRANGER)
    _poke(sandbox, Map.MEMBERS, member, abi.MEMBER_VALUE.pack(abi.ALLOW))
    assert guards.passing(sandbox) == {OLD, BOTH, STRANGER}
    assert any("changed" in fault for fault in backend.faults())
    backend.apply(OLD_POLICY)
    assert backend.faults() == []
    assert guards.passing(sandbox) == {OLD, BOTH}


def test_the_buffer_of_a_query_has_room_for_what_the_kernel_writes(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux 6.18.15 writes 32 bytes more than the size that it is given. The matrix row of that kernel crashed here."""
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    canary = b"\xa5" * 4096
    seen = []
    real = syscalls.bpf

    def with_canary(command: int, attr: ctypes.Array[ctypes.c_char], size: int) -> tuple[int, int]:
        buffer = ctypes.create_string_buffer(attr.raw + canary)
        result = real(command, buffer, size)
        seen.append((len(attr), buffer.raw[len(attr) : -1] == canary))
        return result

    monkeypatch.setattr(syscalls, "bpf", with_canary)
    with open_cgroup(sandbox.cgroup) as cgroup:
        for hook in abi.HOOKS.values():
            bpf.attached_programs(cgroup.fd, hook.attach_type)
    assert len(seen) == len(abi.HOOKS)
    assert all(room >= 64 and untouched for room, untouched in seen)


def test_a_generation_without_settings_denies(guarded: Guarded) -> None:
    """Everyone is denied at the locked addresses, and faults() says so."""
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    generation = backend.state().generation
    _poke(sandbox, Map.SETTINGS, struct.pack("=I", generation), bytes(abi.SETTINGS.size))
    assert guards.passing(sandbox) == frozenset()
    assert any("settings" in fault for fault in backend.faults())
    backend.apply(OLD_POLICY)
    assert guards.passing(sandbox) == {OLD, BOTH}


def test_a_missing_map_pin_is_repaired(guarded: Guarded) -> None:
    """The hooks go on enforcing. The next start makes new maps and moves the hooks to them."""
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    os.unlink(os.path.join(guards.folder_of(sandbox.cgroup).path, "members"))
    assert guards.passing(sandbox) == {OLD, BOTH}
    assert backend.in_force()
    assert any("pin of a map is gone" in fault for fault in backend.faults())
    backend.apply(NEW_POLICY)
    assert (backend.read(), backend.faults()) == (NEW_POLICY, [])
    assert guards.passing(sandbox) == {NEW, BOTH}


def test_a_guard_without_pins_is_found_and_removed(guarded: Guarded) -> None:
    """This happens when the mount namespace of a bpffs is gone while somebody still holds the links."""
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    path = guards.folder_of(sandbox.cgroup).path
    held = [bpf.pinned(link_pin(path, hook)) for hook in abi.needed_hooks(OLD_POLICY)]
    for name in os.listdir(path):
        os.unlink(os.path.join(path, name))
    os.rmdir(path)
    assert backend.in_force()
    assert len(backend.faults()) == len(held)
    backend.remove()
    assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}
    for fd in held:
        os.close(fd)


# --- size -------------------------------------------------------------------------------------------------------------


def test_one_hundred_thousand_users(guarded: Guarded) -> None:
    """They are read back as they were written, and another policy with most of them in it works, too."""
    sandbox, backend = guarded
    many = range(1_000_000, 1_100_000)
    backend.apply(guards.policy(OLD, *many))
    assert backend.read() == guards.policy(OLD, *many)
    backend.apply(guards.policy(NEW, *many))
    assert guards.passing(sandbox) == {NEW}
    assert guards.passing(sandbox, (1_000_000, 1_099_999, 1_100_000)) == {1_000_000, 1_099_999}


def test_a_policy_that_does_not_fit_leaves_the_old_one(guarded: Guarded) -> None:
    """The kernel refuses records, because a map was made too small for them: the old policy stays, whole."""
    sandbox, backend = guarded
    with guards.other_layout(Map.MEMBERS, max_entries=100):
        backend.apply(OLD_POLICY)
        with pytest.raises(GuardError, match="stays in force"):
            backend.apply(guards.policy(NEW, *range(1_000_000, 1_000_200)))
        assert (backend.read(), backend.faults()) == (OLD_POLICY, [])
    assert guards.passing(sandbox) == {OLD, BOTH}


def test_nothing_is_left_in_the_other_generation(guarded: Guarded) -> None:
    """After any number of changes the maps have the records of one generation."""
    sandbox, backend = guarded
    for wanted in (OLD_POLICY, NEW_POLICY, guards.policy(OLD, addresses=[IPV4]), OLD_POLICY):
        backend.apply(wanted)
    with MapReader.open(guards.folder_of(sandbox.cgroup).path) as maps:
        other = 3 - maps.generation()
        left = maps.snapshot(other).image.items
    assert {number: items for number, items in left.items() if number is not Map.ADDRESS_BITMAP and items} == {}
    assert not any(left[Map.ADDRESS_BITMAP][0][1])


def test_a_symbolic_link_at_the_path_of_the_pins_is_not_followed(guarded: Guarded, tmp_path: Path) -> None:
    """A bpffs without a mode lets everyone write. Root must not follow a symbolic link there and remove files."""
    sandbox, backend = guarded
    folder = guards.folder_of(sandbox.cgroup)
    (tmp_path / "precious").write_text("kept", encoding="utf-8")
    os.symlink(tmp_path, folder.building)
    os.mkdir(folder.path)
    os.mkdir(os.path.join(folder.path, "inside"))
    os.chown(folder.path, STRANGER, STRANGER + 1)
    assert (backend.in_force(), backend.read(), backend.faults()) == (False, None, [])
    backend.apply(OLD_POLICY)
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "kept"
    assert guards.passing(sandbox) == {OLD, BOTH}
    assert guards.traces(sandbox.cgroup) == {"attached": 4, "pins": 1}


@pytest.mark.parametrize("features", [(), FEATURES], ids=["bare", "whole"])
@pytest.mark.parametrize("form", ["plain", "better"])
def test_each_form_loads(form: str, features: Sequence[Feature]) -> None:
    """If the best form did not, load_hooks() would load the plain one, and only a longer start would show it."""
    if os.geteuid() != 0:
        pytest.skip("loading programs needs root")
    privileges.lift_memory_lock_limit()
    with ExitStack() as stack:
        fds = [bpf.map_create(shape, "ig_test") for shape in abi.SHAPES.values()]
        for fd in fds:
            stack.callback(os.close, fd)
        better = program.better_form() if form == "better" else ()
        code = program.compile_hooks(list(abi.HOOKS), better + defines_of(features))
        for hook in abi.HOOKS:
            stack.callback(os.close, program.load_hook(hook, code, fds, program.source_version()))


def test_a_refusal_names_its_reason() -> None:
    """It is at the end of a log that with every path of such a program has a megabyte and more."""
    if os.geteuid() != 0:
        pytest.skip("loading programs needs root")
    privileges.lift_memory_lock_limit()
    get_random, if_zero = struct.pack("=BBhi", 0x85, 0, 0, 7), struct.pack("=BBhi", 0x15, 0, 0, 0)
    reads_r1_after_a_call = struct.pack("=BBhi", 0x61, 0x10, 400, 0)
    ends = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    code = (get_random + if_zero) * 1500 + reads_r1_after_a_call + ends
    fd, refusal = bpf.prog_load_explained(code, "ig_test", abi.HOOKS["connect4"].attach_type)
    assert fd == -1
    assert "EACCES" in refusal
    assert "R1 !read_ok" in refusal
    assert len(refusal) < 1000
