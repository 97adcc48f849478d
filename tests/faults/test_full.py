# SPDX-License-Identifier: Apache-2.0
"""Full disks and full maps, a bpffs that disappears, a low RLIMIT_MEMLOCK, and clocks that jump.

All of these are real: in mount and time namespaces of a child, or with maps that are created too small.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.backends.ebpf import EbpfBackend, abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.iptables import IptablesBackend
from imds_guard.config.read import Config, load_config
from imds_guard.config.store import save_config
from imds_guard.errors import GuardError
from imds_guard.kernel import bpf, lockfile, syscalls
from imds_guard.kernel.children import run_in_child
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Identities, Lock, Policy, make_policy
from tests.faults import injector, trials
from tests.faults.injector import Fault
from tests.kernel import guards, places
from tests.kernel.guards import BOTH, IPV4, IPV6, NEW, NEW_POLICY, OLD, OLD_POLICY

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and attaching programs needs root")

UNDER_OLD, UNDER_NEW = frozenset({OLD, BOTH}), frozenset({NEW, BOTH})
TIMEOUT_S = 300

_CLONE_NEWTIME = 0x80
_YEARS_S = 10 * 365 * 86_400
_CAP_SYS_RESOURCE = 24


@pytest.fixture
def guarded() -> Iterator[tuple[Sandbox, EbpfBackend]]:
    with guards.guarded_sandbox(guards.FAST) as (sandbox, backend):
        backend.apply(OLD_POLICY)
        yield sandbox, backend


def _message_of(command: Callable[[], object]) -> str:
    """The message of a command that fails, which must be one complete sentence; "" when the command succeeds."""
    try:
        command()
    except GuardError as error:
        wrong = trials.faults_of_sentence(error)
        said = str(error)
    else:
        return ""
    assert wrong == [], said
    return said


def _refusal(command: Callable[[], object], *arrange: Callable[[], object]) -> str:
    """The message of a command that fails in a child, after the steps ``arrange`` in that child."""

    def inside() -> str:
        for step in arrange:
            step()
        return _message_of(command)

    said = run_in_child(inside, timeout_s=TIMEOUT_S)
    assert said, "the command succeeded"
    return said


# --- disks ----------------------------------------------------------------------------------------------------------


def _full(path: str, options: str) -> None:
    """Mounts a tmpfs at ``path`` and fills it. The mount namespace is the caller's own."""
    places.own_mounts()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"full", path.encode(), b"tmpfs", 0, options.encode()) == 0, os.strerror(ctypes.get_errno())
    _fill(os.path.join(path, "filler"))


def _fill(file: str) -> None:
    with open(file, "ab", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            continue
    with open(file, "ab", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        filler.write(bytes(4096))


def test_no_inode_left_in_run(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    """Without an inode for the lock file, nothing is changed and the error names the folder."""
    sandbox, backend = guarded
    os.makedirs(lockfile.FOLDER, mode=0o700, exist_ok=True)
    for command in (lambda: backend.apply(NEW_POLICY), backend.remove):
        said = _refusal(command, lambda: _full(lockfile.FOLDER, f"nr_inodes=2,size={mmap.PAGESIZE},mode=700"))
        assert "ENOSPC" in said
        assert lockfile.FOLDER in said
        assert (backend.read(), guards.passing(sandbox)) == (OLD_POLICY, UNDER_OLD)


def test_no_byte_left_in_run(tmp_path: Path) -> None:
    """When the state file of iptables can't be written, the old rules stay and no partial file is left."""
    with Sandbox((IPV4, IPV6)) as sandbox:

        def inside() -> tuple[object, str, object]:
            backend = IptablesBackend(state_folder=str(tmp_path))
            backend.apply(OLD_POLICY)
            _full(str(tmp_path), f"size={2 * mmap.PAGESIZE},mode=700")
            said = _refusal(lambda: backend.apply(NEW_POLICY))
            return backend.read(), said, sorted(os.listdir(tmp_path))

        read, said, left = sandbox.call(inside, timeout_s=TIMEOUT_S)
        assert "ENOSPC" in said
        assert (read, left) == (OLD_POLICY, ["filler"])


def test_no_space_to_save(tmp_path: Path) -> None:
    """When a configuration can't be written, the old file is unchanged and no other file is left."""
    file = tmp_path / "config.toml"

    def inside() -> tuple[object, str, object]:
        places.own_mounts()
        _full(str(tmp_path), f"size={4 * mmap.PAGESIZE},nr_inodes=5")
        os.truncate(tmp_path / "filler", 2 * mmap.PAGESIZE)
        save_config(Config(OLD_POLICY), str(file))
        _fill(str(tmp_path / "filler"))
        many = guards.policy(*range(70_000, 71_000))
        said = _refusal(lambda: save_config(Config(many), str(file)))
        return load_config(str(file)).policy, said, sorted(os.listdir(tmp_path))

    read, said, left = run_in_child(inside, timeout_s=TIMEOUT_S)
    assert "ENOSPC" in said
    assert str(file) in said
    assert (read, left) == (OLD_POLICY, ["config.toml", "filler"])


# --- bpffs ----------------------------------------------------------------------------------------------------------


def _unmount() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.umount2(b"/sys/fs/bpf", places.MNT_DETACH) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize("lose", [places.with_read_only_bpffs, _unmount])
@pytest.mark.parametrize("verb", ["upgrade", "stop"])
def test_bpffs_goes_in_the_middle(guarded: tuple[Sandbox, EbpfBackend], verb: str, lose: Callable[[], object]) -> None:
    """bpffs becomes read-only or is unmounted during a command: the old or new policy holds, the next command works."""
    sandbox, backend = guarded
    newer = EbpfBackend(sandbox.cgroup, (*guards.FAST, ("IG_ANOTHER_VERSION", 1)))
    newer.apply(OLD_POLICY)  # compiles the programs

    def command() -> object:
        return newer.apply(NEW_POLICY) if verb == "upgrade" else backend.remove()

    everyone = frozenset({OLD, NEW, BOTH, guards.STRANGER})

    def run(fault: Fault) -> tuple[int, str]:
        def inside() -> tuple[int, str]:
            places.own_mounts()
            fault.owner = os.getpid()
            with injector.planted(fault):
                said = _message_of(command)
            return len(fault.calls), said

        return run_in_child(inside, timeout_s=TIMEOUT_S)

    backend.apply(OLD_POLICY)
    calls = run(Fault())[0]
    assert calls > 30
    refused = 0
    for number in range(2, calls, 1 if trials.FULL else calls // 6):
        backend.apply(OLD_POLICY)
        refused += bool(run(Fault(first=number, instead=lose))[1])
        assert guards.passing(sandbox) in (UNDER_OLD, UNDER_NEW if verb == "upgrade" else everyone), number
    assert refused
    backend.apply(NEW_POLICY)
    assert (backend.read(), backend.faults(), guards.passing(sandbox)) == (NEW_POLICY, [], UNDER_NEW)
    backend.remove()
    assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}


# --- maps -----------------------------------------------------------------------------------------------------------


def _many_locks(count: int) -> Policy:
    where = [guards.policy(addresses=(f"10.0.{n}.1", f"fd00::{n:x}:1")).locks[0].endpoints for n in range(count)]
    return make_policy([Lock(f"n{n}", one, Identities(frozenset({OLD, n}))) for n, one in enumerate(where)])


@pytest.mark.parametrize(
    ("kind", "capacity", "too_large"),
    [
        (Map.MEMBERS, 12, guards.policy(*range(70_000, 70_020))),
        (Map.LOCKS, 6, _many_locks(10)),
        (Map.ENDPOINTS, 12, _many_locks(10)),
    ],
    ids=lambda value: value.name if isinstance(value, Map) else "",
)
def test_a_full_map(
    guarded: tuple[Sandbox, EbpfBackend], monkeypatch: pytest.MonkeyPatch, kind: Map, capacity: int, too_large: Policy
) -> None:
    """On E2BIG or ENOSPC the old policy stays complete, and the entries of the new one are removed."""
    sandbox, backend = guarded
    backend.remove()
    shape = abi.SHAPES[kind]
    small = bpf.MapShape(shape.type, shape.key_size, shape.value_size, capacity, shape.flags)
    monkeypatch.setitem(abi.SHAPES, kind, small)
    backend.apply(OLD_POLICY)
    for _ in range(2):
        with pytest.raises(GuardError, match=r"E2BIG|ENOSPC") as caught:
            backend.change(too_large)
        assert trials.faults_of_sentence(caught.value) == []
        assert "the policy before stays" in str(caught.value)
        assert (backend.read(), backend.faults()) == (OLD_POLICY, [])
        assert guards.passing(sandbox) == UNDER_OLD
    backend.change(NEW_POLICY)
    assert guards.passing(sandbox) == UNDER_NEW
    backend.remove()
    with pytest.raises(GuardError, match=r"E2BIG|ENOSPC"):
        backend.apply(too_large)
    assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}


def _counts_locked_memory() -> bool:
    """Whether maps count against RLIMIT_MEMLOCK.

    Not since Linux 3731695742e5 ("bpf: Eliminate rlimit-based memory accounting for hashtab maps") (in v5.11) and its
    neighbours.
    """
    try:
        os.close(bpf.map_create(bpf.MapShape(bpf.MapType.ARRAY, 4, 1 << 18, 1), "ig_test_memlock"))
    except PermissionError:
        return True
    return False


def test_little_memory_may_be_locked() -> None:
    """Where maps count against RLIMIT_MEMLOCK, start fails, names the limit and leaves nothing. Elsewhere it works."""
    with guards.guarded_sandbox(guards.FAST) as (sandbox, backend):

        def inside() -> tuple[bool, str]:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (65_536, 65_536))
            places.without_capabilities(_CAP_SYS_RESOURCE)
            return _counts_locked_memory(), _message_of(lambda: backend.apply(OLD_POLICY))

        counts, said = run_in_child(inside, timeout_s=TIMEOUT_S)
        assert bool(said) == counts, said
        if counts:
            assert "RLIMIT_MEMLOCK" in said
            assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}
        else:
            assert backend.read() == OLD_POLICY


# --- clocks ---------------------------------------------------------------------------------------------------------


def test_clocks_that_have_jumped(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    """A command works when its clocks are ten years ahead of the last command's, and ten years behind."""
    sandbox, backend = guarded

    def inside() -> object:
        syscalls.unshare(_CLONE_NEWTIME)
        with open("/proc/self/timens_offsets", "w", encoding="ascii") as offsets:
            offsets.write(f"monotonic {_YEARS_S} 0\nboottime {_YEARS_S} 0\n")
        return run_in_child(lambda: (backend.change(NEW_POLICY), backend.read(), backend.faults())[1:])

    assert run_in_child(inside, timeout_s=TIMEOUT_S) == (NEW_POLICY, [])
    assert guards.passing(sandbox) == UNDER_NEW
    backend.change(OLD_POLICY)
    assert (backend.read(), backend.faults(), guards.passing(sandbox)) == (OLD_POLICY, [], UNDER_OLD)
