# SPDX-License-Identifier: Apache-2.0
"""Places where eBPF can't work completely: one sentence says why, and nothing is half done."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, TypeVar

import click
import psutil
import pytest

from imds_guard.backends.ebpf import EbpfBackend, abi
from imds_guard.errors import Unsupported
from imds_guard.kernel import bpf, bpffs, privileges, syscalls
from imds_guard.kernel.cgroup import ROOT_INODE, open_cgroup
from imds_guard.kernel.children import run_in_child
from tests import command
from tests.command import ONE, SERVICE, STRANGER, TWO, Guard, Result
from tests.kernel import places
from tests.kernel.guards import traces

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and attaching programs needs root")

T = TypeVar("T")

UNSUPPORTED, NO_PERMISSION = 69, 77
NOTHING = {"attached": 0, "pins": 0}
LOCK = ("--user", str(ONE), "--ip", SERVICE)


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def inside(guard: Guard, place: Callable[[], object], fn: Callable[[], T]) -> T:
    """Calls ``fn`` in that place, in the cgroup and network namespace of the sandbox, and returns its result."""

    def go() -> T:
        place()
        return fn()

    return guard.sandbox.call(go, timeout_s=command.TIMEOUT_S)


def run_inside(guard: Guard, place: Callable[[], object], *words: str) -> Result:
    """Runs a command in that place."""
    return inside(guard, place, lambda: command.run(command.argv(words)))


def in_pid_namespace(fn: Callable[[], T]) -> T:
    """Calls ``fn`` in the first process of a new PID namespace and returns its result."""
    syscalls.unshare(syscalls.CLONE_NEWPID)
    return run_in_child(fn, timeout_s=command.TIMEOUT_S)


def locked(guard: Guard) -> list[str]:
    """The outcomes for user ONE and for a stranger."""
    return [guard.reach(ONE), guard.reach(STRANGER)]


OPEN, SHUT = ["connected", "connected"], ["connected", "EPERM"]


# --- places where nothing can be attached ---------------------------------------------------------------------------


class Place(NamedTuple):
    """How the place is made, the exit status of ``start`` there, and parts of its message."""

    make: Callable[[], object]
    status: int
    words: Sequence[str]


PLACES: dict[str, Place] = {
    "no BTF": Place(places.without_btf, UNSUPPORTED, ("/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF")),
    "read-only bpffs": Place(places.with_read_only_bpffs, UNSUPPORTED, ("it is read-only; mount -o remount,rw",)),
    "bpf(2) is ENOSYS": Place(lambda: places.forbid_bpf(errno.ENOSYS), UNSUPPORTED, ("ENOSYS", "seccomp")),
    "bpf(2) is EPERM": Place(lambda: places.forbid_bpf(errno.EPERM), UNSUPPORTED, ("EPERM", "seccomp")),
    "user namespace": Place(places.in_user_namespace, NO_PERMISSION, ("user namespace",)),
}


@pytest.fixture(params=sorted(PLACES))
def place(request: pytest.FixtureRequest) -> Place:
    return PLACES[request.param]


@pytest.mark.parametrize("backend", ["auto", "ebpf"])
def test_start_is_refused_and_nothing_is_half_done(guard: Guard, place: Place, backend: str) -> None:
    result = run_inside(guard, place.make, *guard.arguments("start", "--backend", backend, *LOCK))
    assert result.status == place.status, result
    assert [word for word in place.words if word not in result.sentence] == []
    assert traces(guard.sandbox.cgroup) == NOTHING
    assert locked(guard) == OPEN


def test_check_reports_the_refusal_of_start(guard: Guard, place: Place) -> None:
    result = run_inside(guard, place.make, *guard.arguments("check", "--json"))
    assert result.status == UNSUPPORTED  # check formats the reason in another way
    (backend,) = result.values["backends"]
    assert (backend["name"], backend["works"], result.values["taken"]) == ("ebpf", False, None)
    assert [word for word in place.words if word not in backend["reason"]] == []
    assert traces(guard.sandbox.cgroup) == NOTHING


@pytest.mark.parametrize("name", sorted(PLACES))
def test_a_running_guard_is_intact_after_a_command_there(guard: Guard, name: str) -> None:
    """A change is complete or not made at all; status reports the state, or that it could not read it."""
    place = PLACES[name]
    guard.start(*LOCK)
    before = guard.status()["policy"]
    status = run_inside(guard, place.make, *guard.arguments("status"))
    assert status.status in (0, 4), status
    for words in (("start", "--user", str(TWO), "--ip", SERVICE), ("allow", "--user", str(TWO))):
        changed = run_inside(guard, place.make, *guard.arguments(*words))
        assert guard("status").status == 0
        assert (guard.status()["policy"] != before) == (changed.status == 0), changed
        assert (guard.reach(TWO) == "connected") == (changed.status == 0), changed
        assert guard.reach(STRANGER) == "EPERM"
        guard.start(*LOCK)
    stopped = run_inside(guard, place.make, *guard.arguments("stop"))
    assert (guard("status").status, locked(guard)) == ((3, OPEN) if stopped.status == 0 else (0, SHUT)), stopped


def test_stop_needs_no_description_of_the_maps(guard: Guard) -> None:
    """To open the lock and to detach the links the kernel need not say what a map or a program is."""
    guard.start(*LOCK)
    forbid = functools.partial(places.forbid_bpf, errno.EPERM, [bpf.Command.OBJ_GET_INFO_BY_FD])
    stopped = run_inside(guard, forbid, *guard.arguments("stop"))
    assert stopped.status == 0, stopped
    assert (traces(guard.sandbox.cgroup), locked(guard)) == (NOTHING, OPEN)


def test_a_guard_of_this_version_needs_no_btf(guard: Guard) -> None:
    guard.start(*LOCK)
    changed = run_inside(guard, places.without_btf, *guard.arguments("start", "--user", str(TWO), "--ip", SERVICE))
    assert changed.status == 0, changed
    assert (guard.reach(ONE), guard.reach(TWO)) == ("EPERM", "connected")


def test_a_run_folder_without_space_for_a_lock_file(guard: Guard) -> None:
    result = run_inside(guard, places.with_read_only_run_folder, *guard.arguments("start", *LOCK))
    assert result.status == 1, result
    assert "EROFS" in result.sentence
    assert "/run/imds-guard" in result.sentence
    assert traces(guard.sandbox.cgroup) == NOTHING


# --- namespaces -----------------------------------------------------------------------------------------------------


def _start_with(guard: Guard, proc: Callable[[], None]) -> Result:
    proc()
    return command.run(command.argv(guard.arguments("start", *LOCK)))


def test_in_a_pid_namespace(guard: Guard) -> None:
    """With a /proc of its own, as in a container, and with the host's."""
    for proc in (places.with_own_proc, places.own_mounts):
        start = functools.partial(_start_with, guard, proc)
        result = guard.sandbox.call(functools.partial(in_pid_namespace, start), timeout_s=command.TIMEOUT_S)
        assert result.status == UNSUPPORTED, result
        assert "looking at the PID namespace: this process is in a container" in result.sentence
        assert traces(guard.sandbox.cgroup) == NOTHING


def root_of_cgroups() -> tuple[bool, int]:
    """Whether the root was found, and its inode."""
    with open_cgroup() as found:
        return found.is_root, found.id


def test_the_root_is_found_where_no_cgroup2_is_mounted(guard: Guard) -> None:
    assert inside(guard, places.without_cgroup2, root_of_cgroups) == (True, 1)


def test_in_a_cgroup_namespace_the_root_is_that_of_pid_1(guard: Guard) -> None:
    """As in a privileged container with the host's process IDs: its own mount shows its own cgroup alone."""

    def in_place() -> tuple[int, tuple[bool, int]]:
        return os.stat(places.in_cgroup_namespace()).st_ino == ROOT_INODE, root_of_cgroups()

    assert guard.sandbox.call(in_place, timeout_s=command.TIMEOUT_S) == (False, (True, ROOT_INODE))


def test_in_a_cgroup_namespace_without_a_way_to_pid_1(guard: Guard) -> None:
    """Without --cgroup it is refused, because processes outside would stay unlocked."""

    def in_place(words: Sequence[str]) -> Result:
        places.in_cgroup_namespace()
        # /proc/PID/root is for processes with all capabilities of PID, or with CAP_SYS_PTRACE (ptrace(2)).
        places.without_capabilities(privileges.CAP_SYS_PTRACE, privileges.CAP_NET_RAW)
        with pytest.raises(Unsupported, match="so this is a cgroup namespace"):
            open_cgroup()
        places.forbid_attaching()
        return command.run(command.argv(words))

    for words in (("start", "--backend", "ebpf", *LOCK), ("check", "--backend", "ebpf")):
        result = guard.sandbox.call(functools.partial(in_place, words), timeout_s=command.TIMEOUT_S)
        assert result.status == UNSUPPORTED, result
        said = " ".join((result.stdout + result.stderr).split())
        assert "so this is a cgroup namespace, and processes outside it would stay unlocked" in said
        assert "--cgroup PATH" in said
        assert traces(guard.sandbox.cgroup) == NOTHING


def test_in_a_cgroup_namespace_a_subtree_can_be_named(guard: Guard) -> None:
    """The topmost directory there is the cgroup of the sandbox."""

    def start() -> Result:
        place = places.in_cgroup_namespace()
        return command.run(command.argv(("start", "--cgroup", place, *LOCK)))

    started = guard.sandbox.call(start, timeout_s=command.TIMEOUT_S)
    assert started.status == 0, started
    assert locked(guard) == SHUT
    assert guard("status").status == 0


def test_a_lock_outlives_the_mount_namespace_of_start(guard: Guard) -> None:
    """The machine's own bpffs is reachable there, as with PrivateTmp= of systemd."""
    started = run_inside(guard, places.own_mounts, *guard.arguments("start", *LOCK))
    assert started.status == 0, started
    assert traces(guard.sandbox.cgroup) == {"attached": 4, "pins": 1}
    assert locked(guard) == SHUT


@pytest.mark.parametrize("hide", [places.with_private_bpffs, places.without_bpffs])
def test_a_mount_over_the_bpffs_of_the_machine_is_not_used(guard: Guard, hide: Callable[[], None]) -> None:
    """Start refuses, or finds that of PID 1 behind it: a pin in a private one would end with the namespace."""

    def start() -> tuple[Result, list[str]]:
        done = command.run(command.argv(guard.arguments("start", *LOCK)))
        return done, os.listdir(bpffs.USUAL_PATH)

    result, pins = inside(guard, hide, start)
    assert [name for name in pins if name.startswith("imds-guard")] == []
    if result.status == 0:
        assert locked(guard) == SHUT
        assert traces(guard.sandbox.cgroup) == {"attached": 4, "pins": 1}
    else:
        assert result.status == UNSUPPORTED, result
        assert "another mount namespace" in result.sentence
        assert traces(guard.sandbox.cgroup) == NOTHING
        assert locked(guard) == OPEN


# --- bcc ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_modules(tmp_path: Path) -> Path:
    """A folder with click and psutil, and no bcc."""
    for module in (click, psutil):
        folder = Path(str(module.__file__)).parent
        (tmp_path / folder.name).symlink_to(folder)
    return tmp_path


def argv_without_site(words: Sequence[str], *folders: Path) -> tuple[str, ...]:
    """The command line for a Python that sees only its own modules and those of these folders."""
    return command.argv(words, interpreter=("-I", "-S"), path=(command.SOURCES, *map(str, folders)))


def test_a_missing_bcc_is_named_with_its_packages(guard: Guard, few_modules: Path) -> None:
    for words in (("--backend", "ebpf"), ()):
        result = command.run(argv_without_site(guard.arguments("start", *words, *LOCK), few_modules))
        assert result.status == UNSUPPORTED, result
        assert "apt install python3-bpfcc, dnf install python3-bcc" in result.sentence
        assert traces(guard.sandbox.cgroup) == NOTHING


def test_a_running_guard_needs_no_bcc(guard: Guard, few_modules: Path) -> None:
    guard.start(*LOCK)
    for words in (("start", "--user", str(TWO), "--ip", SERVICE), ("allow", "--user", str(STRANGER)), ("status",)):
        assert command.run(argv_without_site(guard.arguments(*words), few_modules)).status == 0
    assert [guard.reach(uid) for uid in (ONE, TWO, STRANGER)] == ["EPERM", "connected", "connected"]


BROKEN: dict[str, str] = {
    "its library is missing": "raise OSError('libbcc.so.0: cannot open shared object file')",
    "it is another project's": "BRAVAIS = 'body-centred cubic'",
    "it compiles nothing": (
        "import os\nclass BPF:\n    def __init__(self, **words):\n"
        "        os.write(2, b'/virtual/main.c:1:1: error: no\\n'); raise Exception('Failed to compile')"
    ),
    "it leaves": "raise SystemExit(3)",
}


@pytest.mark.parametrize("how", sorted(BROKEN))
def test_a_bcc_that_does_not_work(guard: Guard, few_modules: Path, tmp_path_factory: Any, how: str) -> None:
    """The maps that were made before are removed. A running guard does not change."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "bcc.py").write_text(BROKEN[how])
    result = command.run(argv_without_site(guard.arguments("start", *LOCK), folder, few_modules))
    assert result.status == UNSUPPORTED, result
    assert "compiling the eBPF programs with bcc" in result.sentence
    assert traces(guard.sandbox.cgroup) == NOTHING
    assert locked(guard) == OPEN


# --- the fallback ---------------------------------------------------------------------------------------------------

FALLBACKS: dict[str, tuple[Callable[[], None], str]] = {
    "no bcc": (places.forbid_attaching, "looking for bcc"),
    "bpf(2) is ENOSYS": (lambda: places.forbid_bpf(errno.ENOSYS), "ENOSYS"),
    "bpf(2) is EPERM": (lambda: places.forbid_bpf(errno.EPERM), "EPERM"),
}


@pytest.mark.parametrize("case", sorted(FALLBACKS))
def test_iptables_takes_over_and_says_why(guard: Guard, few_modules: Path, case: str) -> None:
    """The command runs without --cgroup, so eBPF is forbidden, and the network namespace is new."""
    if EbpfBackend().in_force():
        pytest.skip("this machine has a guard of its own")
    forbid, reason = FALLBACKS[case]

    def place() -> None:
        assert os.stat("/proc/self/ns/net").st_ino == os.fstat(guard.sandbox.netns_fd).st_ino
        places.with_own_run_folder()
        forbid()

    def start_and_look() -> tuple[Result, Result, Result]:
        first = command.run(argv_without_site(("check", "--json", *LOCK), few_modules))
        started = command.run(argv_without_site(("start", "--json", *LOCK), few_modules))
        return first, started, command.run(argv_without_site(("status", "--json"), few_modules))

    checked, started, status = inside(guard, place, start_and_look)
    if checked.status == UNSUPPORTED and "iptables" not in os.environ.get("IMDS_GUARD_EXPECT", ""):
        pytest.skip(f"iptables serves no more here: {checked.stdout}")
    assert [(one["name"], one["works"]) for one in checked.values["backends"]] == [("ebpf", False), ("iptables", True)]
    assert started.status == 0, started
    assert started.values["backend"] == "iptables"
    why = [warning for warning in started.values["warnings"] if warning.startswith("ebpf can't be used: ")]
    assert len(why) == 1
    assert reason in why[0]
    assert (status.values["backend"], status.values["policy"]) == ("iptables", started.values["policy"])
    # The machine's status also names guards whose cgroup was just removed, by other tests.
    removed = "the cgroup of a guard was removed"
    assert [fault for fault in status.values["faults"] if removed not in fault] == []
    assert status.status == bool(status.values["faults"])
    assert locked(guard) == ["connected", "ECONNREFUSED"]
    assert ours_at_the_root() == []


def ours_at_the_root() -> list[str]:
    """The names of our programs at the root of cgroup2."""
    names = []
    with open_cgroup() as root:
        for hook, shape in abi.HOOKS.items():
            for identity in bpf.attached_programs(root.fd, shape.attach_type):
                fd = bpf.program_by_id(identity)
                if fd is not None:
                    names.append((hook, bpf.describe_program(fd).name))
                    os.close(fd)
    return [name for hook, name in names if abi.version_in_name(hook, name) is not None]
