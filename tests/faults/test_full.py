# SPDX-License-Identifier: Apache-2.0
"""No room, and ground that goes away: on disk, in bpffs, in maps, under RLIMIT_MEMLOCK; and a clock that jumps.

All of it for real: in mount and time namespaces of a child, or with maps that are made too small.
"""

from __future__ import annotations

import contextlib
import ctypes
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
PATIENCE_S = 300

_CLONE_NEWTIME = 0x80
_YEARS_S = 10 * 365 * 86_400
_CAP_SYS_RESOURCE = 24


@pytest.fixture
def guarded() -> Iterator[tuple[Sandbox, EbpfBackend]]:
    with guards.guarded_sandbox(guards.FAST) as (sandbox, backend):
        backend.apply(OLD_POLICY)
        yield sandbox, backend


def _words_of(command: Callable[[], object]) -> str:
    """What a command says that does not end well, which must be one good sentence; "" otherwise."""
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
    """What a command in a child says; ``arrange`` is done in the child before."""

    def inside() -> str:
        for step in arrange:
            step()
        return _words_of(command)

    said = run_in_child(inside, timeout_s=PATIENCE_S)
    assert said, "the command ended well"
    return said


# --- disks ----------------------------------------------------------------------------------------------------------


def _full(path: str, options: str) -> None:
    """An own tmpfs at ``path`` that has no room left."""
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
    """The lock file can't be made: nothing is changed, and the sentence says where."""
    sandbox, backend = guarded
    os.makedirs(lockfile.FOLDER, mode=0o700, exist_ok=True)
    for command in (lambda: backend.apply(NEW_POLICY), backend.remove):
        said = _refusal(command, lambda: _full(lockfile.FOLDER, "nr_inodes=2,size=4k,mode=700"))
        assert "ENOSPC" in said
        assert lockfile.FOLDER in said
        assert (backend.read(), guards.passing(sandbox)) == (OLD_POLICY, UNDER_OLD)


def test_no_octet_left_in_run(tmp_path: Path) -> None:
    """iptables' record can't be written: the rules before stay, and no half of a record."""
    with Sandbox((IPV4, IPV6)) as sandbox:

        def inside() -> tuple[object, str, object]:
            backend = IptablesBackend(state_folder=str(tmp_path))
            backend.apply(OLD_POLICY)
            _full(str(tmp_path), "size=8k,mode=700")
            said = _refusal(lambda: backend.apply(NEW_POLICY))
            return backend.read(), said, sorted(os.listdir(tmp_path))

        read, said, left = sandbox.call(inside, timeout_s=PATIENCE_S)
        assert "ENOSPC" in said
        assert (read, left) == (OLD_POLICY, ["filler"])


def test_no_room_to_save(tmp_path: Path) -> None:
    """The file that was there stays, whole, and no other one."""
    file = tmp_path / "config.toml"

    def inside() -> tuple[object, str, object]:
        places.own_mounts()
        _full(str(tmp_path), "size=16k,nr_inodes=5")
        os.truncate(tmp_path / "filler", 8192)
        save_config(Config(OLD_POLICY), str(file))
        _fill(str(tmp_path / "filler"))
        many = guards.policy(*range(70_000, 71_000))
        said = _refusal(lambda: save_config(Config(many), str(file)))
        return load_config(str(file)).policy, said, sorted(os.listdir(tmp_path))

    read, said, left = run_in_child(inside, timeout_s=PATIENCE_S)
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
    """Read-only or gone in front of a call: old or new, and the next command comes to its end."""
    sandbox, backend = guarded
    newer = EbpfBackend(sandbox.cgroup, (*guards.FAST, ("IG_ANOTHER_VERSION", 1)))
    newer.apply(OLD_POLICY)  # compiles it

    def command() -> object:
        return newer.apply(NEW_POLICY) if verb == "upgrade" else backend.remove()

    everyone = frozenset({OLD, NEW, BOTH, guards.STRANGER})

    def run(fault: Fault) -> tuple[int, str]:
        def inside() -> tuple[int, str]:
            places.own_mounts()
            fault.owner = os.getpid()
            with injector.planted(fault):
                said = _words_of(command)
            return len(fault.calls), said

        return run_in_child(inside, timeout_s=PATIENCE_S)

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
    ("number", "room", "policy"),
    [
        (Map.MEMBERS, 12, guards.policy(*range(70_000, 70_020))),
        (Map.LOCKS, 6, _many_locks(10)),
        (Map.ENDPOINTS, 12, _many_locks(10)),
    ],
    ids=lambda value: value.name if isinstance(value, Map) else "",
)
def test_a_full_map(
    guarded: tuple[Sandbox, EbpfBackend], monkeypatch: pytest.MonkeyPatch, number: Map, room: int, policy: Policy
) -> None:
    """The kernel says E2BIG or ENOSPC: the policy before stays, with all that it had, and what was written goes."""
    sandbox, backend = guarded
    backend.remove()
    shape = abi.SHAPES[number]
    small = bpf.MapShape(shape.type, shape.key_size, shape.value_size, room, shape.flags)
    monkeypatch.setitem(abi.SHAPES, number, small)
    backend.apply(OLD_POLICY)
    for _ in range(2):
        with pytest.raises(GuardError, match=r"E2BIG|ENOSPC") as caught:
            backend.change(policy)
        assert trials.faults_of_sentence(caught.value) == []
        assert "the policy before stays" in str(caught.value)
        assert (backend.read(), backend.faults()) == (OLD_POLICY, [])
        assert guards.passing(sandbox) == UNDER_OLD
    backend.change(NEW_POLICY)
    assert guards.passing(sandbox) == UNDER_NEW
    backend.remove()
    with pytest.raises(GuardError, match=r"E2BIG|ENOSPC"):
        backend.apply(policy)
    assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}


def _counts_locked_memory() -> bool:
    """True where a map counts against RLIMIT_MEMLOCK.

    Not since Linux 3731695742e5 ("bpf: Eliminate rlimit-based memory accounting for hashtab maps") (in v5.11) and its
    neighbours.
    """
    try:
        os.close(bpf.map_create(bpf.MapShape(bpf.MapType.ARRAY, 4, 1 << 18, 1), "ig_test_memlock"))
    except PermissionError:
        return True
    return False


def test_little_memory_may_be_locked() -> None:
    """Where maps count: a sentence that names the limit, and nothing is left. Where they don't: it starts."""
    with guards.guarded_sandbox(guards.FAST) as (sandbox, backend):

        def inside() -> tuple[bool, str]:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (65_536, 65_536))
            places.without_capabilities(_CAP_SYS_RESOURCE)
            return _counts_locked_memory(), _words_of(lambda: backend.apply(OLD_POLICY))

        counts, said = run_in_child(inside, timeout_s=PATIENCE_S)
        assert bool(said) == counts, said
        if counts:
            assert "RLIMIT_MEMLOCK" in said
            assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}
        else:
            assert backend.read() == OLD_POLICY


# --- clocks ---------------------------------------------------------------------------------------------------------


def test_clocks_that_have_jumped(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    """A command whose clocks are ten years ahead of the last one's does what it always does, and back again."""
    sandbox, backend = guarded

    def inside() -> object:
        syscalls.unshare(_CLONE_NEWTIME)
        with open("/proc/self/timens_offsets", "w", encoding="ascii") as offsets:
            offsets.write(f"monotonic {_YEARS_S} 0\nboottime {_YEARS_S} 0\n")
        return run_in_child(lambda: (backend.change(NEW_POLICY), backend.read(), backend.faults())[1:])

    assert run_in_child(inside, timeout_s=PATIENCE_S) == (NEW_POLICY, [])
    assert guards.passing(sandbox) == UNDER_NEW
    backend.change(OLD_POLICY)
    assert (backend.read(), backend.faults(), guards.passing(sandbox)) == (OLD_POLICY, [], UNDER_OLD)
