# SPDX-License-Identifier: Apache-2.0
"""The capabilities that each command needs, who may run it, and who may see or change its files and pins."""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.backends.ebpf import abi
from imds_guard.commands.capabilities import REQUIRED
from imds_guard.kernel import bpf, lockfile, privileges
from imds_guard.kernel.bpffs import find_bpffs
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.children import run_in_child
from imds_guard.kernel.run import run
from tests import command
from tests.command import NEIGHBOUR, ONE, SERVICE, STRANGER, TWO, Guard, Result
from tests.kernel import places
from tests.kernel.guards import traces
from tests.tree import every_command

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

NO_PERMISSION = 77
NOTHING = {"attached": 0, "pins": 0}
SAVE = ("--save", "--without-root", "--config")
LOCK = ("--user", str(ONE), "--ip", SERVICE)

WORDS: dict[str, tuple[str, ...]] = {
    "start": LOCK,
    "stop": (),
    "status": (),
    "allow": ("--user", str(TWO)),
    "revoke": ("--user", str(ONE)),
    "mode": ("enforce",),
    "check": (),
    "explain": ("--user", "root", NEIGHBOUR),
    "export": ("--format", "nftables"),
    "verify": ("--repair",),
    "watch": ("--once",),
    "report": (),
    "metrics": (),
    "demo": (),
    "filter": ("--reload",),
    "install-service": (),
    "uninstall-service": (),
    "ip-lockdown": (SERVICE, "root"),
}
"""Command -> the arguments for the test."""

FOR_EVERYONE = {"endpoints"}
WITHOUT_CGROUP = {"demo", "install-service", "uninstall-service"}
ON_ITS_OWN = sorted(set(WORDS) - {"install-service", "uninstall-service"})
"""Commands that need no systemd. The other two are tested in a booted guest."""

EVERY_CAPABILITY = range(int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii")) + 1)


def argv(guard: Guard, name: str, before: str = "") -> tuple[str, ...]:
    """The command line for the cgroup of the sandbox."""
    where = () if name in WITHOUT_CGROUP else ("--cgroup", guard.sandbox.cgroup)
    if name == "ip-lockdown":
        return command.argv((*where, *WORDS[name]), entry="ip_lockdown", before=before)
    return command.argv((name, *where, *WORDS[name]), before=before)


def run_with(guard: Guard, name: str, held: Sequence[int]) -> Result:
    """Runs the command in a process that is root with only these capabilities."""

    def inside() -> Result:
        places.without_capabilities(*(number for number in EVERY_CAPABILITY if number not in held))
        return command.run(argv(guard, name))

    return run_in_child(inside, timeout_s=command.TIMEOUT_S)


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


@pytest.fixture(scope="module")
def untouched() -> Iterator[Guard]:
    """A guard that locks nothing, and must lock nothing after each test."""
    with command.guard() as one:
        yield one


@pytest.fixture(scope="module")
def running() -> Iterator[Guard]:
    """A running guard, which no test may change."""
    with command.guard() as one:
        one.start(*LOCK)
        yield one


# --- capabilities ---------------------------------------------------------------------------------------------------


def test_every_command_has_its_capabilities() -> None:
    assert set(REQUIRED) == (set(every_command()) | {"ip-lockdown"}) - FOR_EVERYONE
    assert set(WORDS) == set(REQUIRED)


LOOK = ("status", "check", "explain", "export", "verify", "watch", "report", "metrics", "demo", "filter")
CHANGE = ("start", "ip-lockdown", "allow", "revoke", "mode", "stop")


def test_each_command_is_tested() -> None:
    assert sorted((*LOOK, *CHANGE)) == ON_ITS_OWN


@pytest.mark.parametrize("name", LOOK)
def test_a_reading_command_works_with_its_capabilities_alone(running: Guard, name: str) -> None:
    """It ends as with all capabilities."""
    done = run_with(running, name, REQUIRED[name])
    assert done.status == 0, done


def test_changing_commands_work_with_their_capabilities_alone(guard: Guard) -> None:
    """One after the other: the lock holds, and nothing is left in the end."""
    allowed = {"start": [ONE], "ip-lockdown": [0, ONE], "allow": [0, ONE, TWO], "revoke": [0, TWO], "mode": [0, TWO]}
    for name in CHANGE:
        done = run_with(guard, name, REQUIRED[name])
        assert done.status == 0, (name, done)
        if name in allowed:
            assert [uid for uid in (0, ONE, TWO, STRANGER) if guard.reach(uid) == "connected"] == allowed[name], name
    assert traces(guard.sandbox.cgroup) == NOTHING


@pytest.mark.parametrize(
    ("name", "missing"), [(name, number) for name in ON_ITS_OWN for number in REQUIRED[name]], ids=str
)
def test_a_command_is_refused_without_any_one_of_its_capabilities(untouched: Guard, name: str, missing: int) -> None:
    """Only one is dropped; with CAP_BPF also CAP_SYS_ADMIN, which includes it. The message names it."""
    dropped = {missing, privileges.CAP_SYS_ADMIN} if missing == privileges.CAP_BPF else {missing}
    done = run_with(untouched, name, [number for number in EVERY_CAPABILITY if number not in dropped])
    assert done.status == NO_PERMISSION, done
    word = privileges.capability_name(missing)
    assert done.sentence.startswith(f"imds-guard {name}: this process is root without {word}, which ")
    assert traces(untouched.sandbox.cgroup) == NOTHING


def test_a_refused_command_does_not_change_a_running_guard(running: Guard) -> None:
    before = running.status()
    for name in ("start", "stop", "allow", "revoke", "mode", "verify", "ip-lockdown"):
        assert run_with(running, name, ()).status == NO_PERMISSION
    assert running.status() == before


# --- users other than root ------------------------------------------------------------------------------------------

BECOME_NOBODY = (
    "import os, imds_guard.present.answers, imds_guard.commands.demo\n"  # only root may be able to read them
    "os.setgroups([]); os.setresgid(65533, 65533, 65533); os.setresuid(65534, 65534, 65534)"
)


@pytest.mark.parametrize("name", sorted(WORDS))
def test_only_root_may_and_others_learn_nothing(untouched: Guard, running: Guard, name: str) -> None:
    """Exit status 77 and one sentence, which does not depend on whether something is locked."""
    free = command.run(argv(untouched, name, BECOME_NOBODY))
    done = command.run(argv(running, name, BECOME_NOBODY))
    assert (done.status, done.sentence) == (NO_PERMISSION, f"{name} needs root: run it with sudo")
    assert done == free


@pytest.mark.parametrize("name", sorted(FOR_EVERYONE))
def test_everybody_may_run_the_commands_that_read_no_state(name: str) -> None:
    assert command.run(command.argv((name,), before=BECOME_NOBODY)).answer


def as_nobody(tried: Callable[[], object]) -> str:
    """``done``, or the errno for the user nobody."""

    def inside() -> str:
        os.setgroups([])
        os.setresgid(65533, 65533, 65533)
        os.setresuid(65534, 65534, 65534)
        try:
            tried()
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "done"

    return run_in_child(inside)


def pin_folder(guard: Guard) -> str:
    """The folder of pins of the guard in the sandbox."""
    path = find_bpffs()
    assert path is not None
    return os.path.join(path, f"imds-guard-{os.stat(guard.sandbox.cgroup).st_ino}")


def test_other_users_can_not_read_or_change_pins_and_lock_files(running: Guard) -> None:
    """They can't list names, open maps, rename pins or make links."""
    pins = pin_folder(running)
    first = os.path.join(pins, sorted(os.listdir(pins))[0])
    for folder in (lockfile.FOLDER, pins):
        planted = os.path.join(folder, "planted")
        assert as_nobody(functools.partial(os.listdir, folder)) == "EACCES"
        assert as_nobody(functools.partial(os.symlink, "/etc/passwd", planted)) == "EACCES"
        assert as_nobody(functools.partial(_write, "", planted)) == "EACCES"
    assert as_nobody(lambda: bpf.pinned(first)) in ("EACCES", "EPERM")
    assert as_nobody(lambda: os.unlink(first)) == "EACCES"
    with open_cgroup(running.sandbox.cgroup) as cgroup:
        assert as_nobody(lambda: bpf.attached_programs(cgroup.fd, abi.HOOKS["connect4"].attach_type)) == "EPERM"
    assert running("status").status == 0


def _write(_: str, path: str) -> None:
    with open(path, "w", encoding="ascii"):
        pass


# --- files ----------------------------------------------------------------------------------------------------------


def mode(path: str) -> str:
    """The mode and the owner, like ``600`` and 0."""
    found = os.lstat(path)
    return f"{stat.S_IMODE(found.st_mode):o} {found.st_uid}:{found.st_gid}"


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
def test_modes_do_not_depend_on_the_umask(guard: Guard, tmp_path: Path, umask: int) -> None:
    """Only root can open lock files and pins. Everybody can read the configuration, and only root can write it."""
    config = tmp_path / "made" / "config.toml"
    config.parent.mkdir(mode=0o755)

    def inside() -> dict[str, str]:
        places.with_own_run_folder()
        os.umask(umask)
        for words in (("start", *LOCK), ("allow", "--user", str(TWO), *SAVE, str(config))):
            done = command.run(command.argv(guard.arguments(*words)))
            assert done.status == 0, done
        locks = [os.path.join(lockfile.FOLDER, name) for name in os.listdir(lockfile.FOLDER)]
        pins = pin_folder(guard)
        return {path: mode(path) for path in (lockfile.FOLDER, *locks, pins, str(config))}

    found = run_in_child(inside, timeout_s=command.TIMEOUT_S)
    assert found.pop(str(config)) == "644 0:0"
    assert found.pop(lockfile.FOLDER) == "700 0:0"
    assert found.pop(pin_folder(guard)) == "700 0:0"
    assert found
    assert set(found.values()) == {"600 0:0"}


def test_the_run_folder_gets_its_mode_back(guard: Guard) -> None:
    def inside() -> str:
        places.with_own_run_folder()
        os.chmod(lockfile.FOLDER, 0o777)
        assert command.run(command.argv(guard.arguments("start", *LOCK))).status == 0
        return mode(lockfile.FOLDER)

    assert run_in_child(inside, timeout_s=command.TIMEOUT_S) == "700 0:0"


Planted = Callable[[str], object]


def _owned_by_nobody(path: str) -> None:
    _write("", path)
    os.chown(path, 65534, 65533)


PLANTED: dict[str, tuple[Planted, str]] = {
    "a link": (lambda path: os.symlink("/etc/passwd", path), "ELOOP"),
    "a link to nowhere": (lambda path: os.symlink("/nonexistent/file", path), "ELOOP"),
    "somebody's file": (_owned_by_nobody, "it is not a regular file that root owns"),
    "a pipe": (os.mkfifo, "it is not a regular file that root owns"),
    "a folder": (os.mkdir, "EISDIR"),
}


@pytest.mark.parametrize("what", sorted(PLANTED))
def test_a_link_or_a_strange_file_in_place_of_a_lock_file_is_refused(untouched: Guard, what: str) -> None:
    """Only root could have made it. The command reports it, changes nothing and does not touch the target."""
    plant, word = PLANTED[what]
    name = f"command-{os.stat(untouched.sandbox.cgroup).st_ino}.lock"
    before = os.stat("/etc/passwd")

    def inside() -> Result:
        places.with_own_run_folder()
        plant(os.path.join(lockfile.FOLDER, name))
        return command.run(command.argv(untouched.arguments("start", *LOCK)))

    done = run_in_child(inside, timeout_s=command.TIMEOUT_S)
    assert (done.status, word in done.sentence, name in done.sentence) == (1, True, True), done
    after = os.stat("/etc/passwd")
    assert (after.st_mtime_ns, after.st_mode, after.st_uid) == (before.st_mtime_ns, before.st_mode, before.st_uid)
    assert traces(untouched.sandbox.cgroup) == NOTHING


def test_a_configuration_that_is_a_link_stays_one(guard: Guard, tmp_path: Path) -> None:
    """--save changes the file that the link leads to, and keeps its owner and mode."""
    target, config = tmp_path / "target", tmp_path / "config.toml"
    target.write_text('[lock.web]\nendpoints = ["192.0.2.1"]\nusers = [1]\n', encoding="ascii")
    target.chmod(0o600)
    guard.start(*LOCK)
    config.symlink_to(target)
    saved = guard("allow", "--user", str(TWO), *SAVE, str(config))
    assert saved.status == 0, saved
    assert os.readlink(config) == str(target)
    assert str(TWO) in target.read_text(encoding="utf-8")
    assert mode(str(target)) == "600 0:0"


# --- programs -------------------------------------------------------------------------------------------------------


def test_shell_characters_in_arguments_have_no_effect() -> None:
    words = "; $(id) `id` | cat > /dev/null && echo *"
    assert run(["echo", words]).stdout == f"{words}\n"
