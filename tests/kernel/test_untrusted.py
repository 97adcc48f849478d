# SPDX-License-Identifier: Apache-2.0
"""What is read of processes that do what they can to their readers: how long it takes, and how much memory."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.commands import preflight
from imds_guard.commands.preflight import shut_out
from imds_guard.config.options import policy_from_options
from imds_guard.kernel import children, namespaces, processes, socket_holders, untrusted
from imds_guard.kernel.abandonable import Limits, Unanswered, Worker
from imds_guard.kernel.children import ChildFailed, run_in_child
from imds_guard.kernel.namespaces import INITIAL_PID_NAMESPACE, namespace_inode
from imds_guard.kernel.socket_holders import holders_of
from imds_guard.present.outcome import shut_out_lines
from imds_guard.watch import process_info
from imds_guard.watch.process_info import MAX_COMMAND_LINE, SHARE_S, UNKNOWN, ProcessInfo, Programs
from tests.hostile import USER, crowd, held_command_line, hostile, serve_nothing
from tests.kernel.clients import wait_until
from tests.kernel.places import own_mounts

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="inspecting other users' processes needs root"),
    pytest.mark.skipif(namespace_inode("pid") != INITIAL_PID_NAMESPACE, reason="in a container every caller is denied"),
]

NOBODY = policy_from_options(nobody=True)
QUICK = Limits(share_s=2.0, total_s=60.0)
"""Two seconds for a question: on a machine that is busy with other tests half a second was not enough."""
PYTHON_WITHOUT_COMMAND_LINE = ProcessInfo(os.path.realpath("/usr/bin/python3"), None)
NOW_NS = 1 << 62
"""Later than the start of any process."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that every user may enter. pytest shuts its own ones when another run begins."""
    with tempfile.TemporaryDirectory(prefix="imds-guard-test-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


def seconds(fn: Callable[[], object]) -> float:
    before = time.monotonic()
    fn()
    return time.monotonic() - before


def largest_rss(fn: Callable[[], object]) -> int:
    """The bytes that a process and its children have at most while they run ``fn``, above those of a process alone."""

    def measured() -> int:
        before = _peak()
        fn()
        return _peak() - before

    return run_in_child(measured, timeout_s=60)


def _peak() -> int:
    own, children = (resource.getrusage(whose).ru_maxrss for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(own, children) * 1024


# --- command lines that hang ----------------------------------------------------------------------------------------


def test_the_command_line_of_a_held_process_hangs_its_reader(folder: Path) -> None:
    """What the other tests defend against: without a child the reader would wait until the user lets it go."""
    with held_command_line(folder) as pid, Worker(untrusted.describe) as worker:
        assert worker.ask(pid, 0.5) is Unanswered.HUNG
        assert worker.ask(os.getpid(), 5.0) not in (None, Unanswered.HUNG)


def test_preflight_goes_on_and_names_the_process(folder: Path) -> None:
    with held_command_line(folder) as pid:
        assert seconds(lambda: shut_out(NOBODY, QUICK)) < 25.0
        assert shut_out(NOBODY, QUICK).hung == (pid,)


def test_a_held_process_is_judged_by_its_name(folder: Path) -> None:
    """The kernel cuts a name off after 15 bytes."""
    with held_command_line(folder, comm="google_guest_agent") as pid:
        (found,) = [one for one in shut_out(NOBODY, QUICK).shut_out if one.pid == pid]
        assert (found.name, found.user) == ("google_guest_ag", str(USER))


def test_processes_of_others_are_read_although_a_user_holds_many(folder: Path) -> None:
    """After two that hang no other one of that user is read; those of other users are."""
    client = shutil.copy("/bin/cat", folder / "kubelet")
    with ExitStack() as held:
        pids = {held.enter_context(held_command_line(folder)) for _ in range(4)}
        with subprocess.Popen([client], stdin=subprocess.PIPE, user=USER + 1) as process:
            found = shut_out(NOBODY, QUICK)
            process.kill()
    assert process.pid in [one.pid for one in found.shut_out]
    assert set(found.hung) < pids
    assert len(found.hung) == 2
    assert found.not_asked >= 2
    assert any("not looked at" in line for line in shut_out_lines(found))


def test_watch_does_without_the_command_line(folder: Path) -> None:
    """And asks no second time, so that its other lines are not late."""
    programs = Programs()
    with held_command_line(folder) as pid:
        assert seconds(lambda: programs.of(pid, NOW_NS)) < 25.0
        assert programs.of(pid, NOW_NS) == PYTHON_WITHOUT_COMMAND_LINE
        assert seconds(lambda: programs.of(pid, NOW_NS)) < SHARE_S
        assert programs.of(os.getpid(), NOW_NS).command_line is not None
    programs.close()


def test_watch_waits_only_for_root_after_many_that_hang(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_info, "MAX_HUNG", 1)
    programs = Programs()
    with held_command_line(folder) as pid, subprocess.Popen(["/bin/cat"], stdin=-1, user=USER + 1) as other:
        cat = os.path.realpath("/bin/cat")
        assert programs.of(other.pid, NOW_NS) == ProcessInfo(cat, "/bin/cat")
        assert programs.of(pid, NOW_NS) == PYTHON_WITHOUT_COMMAND_LINE
        assert programs.of(other.pid, NOW_NS) == ProcessInfo(cat, None)
        assert programs.of(os.getpid(), NOW_NS).command_line is not None
        other.kill()
    programs.close()


def test_watch_leaves_only_so_many_children_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it looks only at processes of root, which can't be made to hang."""
    monkeypatch.setattr(process_info, "MAX_ABANDONED", 0)
    programs = Programs()
    with subprocess.Popen(["/bin/cat"], stdin=-1, user=USER) as other:
        assert programs.of(other.pid, NOW_NS) == UNKNOWN
        assert programs.of(os.getpid(), NOW_NS) != UNKNOWN
        other.kill()
    programs.close()


def test_a_user_is_looked_up_again_after_the_penance(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_info, "PENANCE_S", 0.0)
    programs = Programs()
    with held_command_line(folder) as pid, subprocess.Popen(["/bin/cat"], stdin=-1, user=USER) as other:
        assert programs.of(pid, NOW_NS) == PYTHON_WITHOUT_COMMAND_LINE
        assert programs.of(other.pid, NOW_NS).command_line == "/bin/cat"
        other.kill()
    programs.close()


# --- a child that nobody can kill -----------------------------------------------------------------------------------


def test_a_child_that_can_not_be_killed_is_left_behind(folder: Path) -> None:
    """It waits in state D for a FUSE server that has its request and does not answer. It ends when the server does."""

    def abandon_one() -> tuple[object, int, str, bool, bool]:
        own_mounts()
        server = serve_nothing(folder)
        with Worker(_open) as worker:
            before = time.monotonic()
            answer = worker.ask(str(folder / "file"), 0.3)
            took = time.monotonic() - before
            left = children.abandoned()
            state = Path(f"/proc/{children._abandoned[0]}/stat").read_text(encoding="ascii").split()[2]
            goes_on = worker.ask("/", 5.0) == "opened"
        children.end(server)
        wait_until(lambda: children.abandoned() == 0)
        return answer, left, state, goes_on, took < 5

    assert run_in_child(abandon_one) == (Unanswered.HUNG, 1, "D", True, True)


def test_a_child_that_runs_a_function_is_not_waited_for_without_end(folder: Path) -> None:
    """run_in_child(), too, gives up at its deadline, whatever its child waits for."""

    def run_one() -> tuple[str, int, bool]:
        vars(children)["_END_WITHIN_S"] = 0.3  # in this child alone
        own_mounts()
        server = serve_nothing(folder)
        before = time.monotonic()
        with pytest.raises(ChildFailed) as raised:
            run_in_child(lambda: _open(str(folder / "file")), timeout_s=0.3)
        took, left = time.monotonic() - before, children.abandoned()
        children.end(server)
        return str(raised.value), left, took < 5

    assert run_in_child(run_one) == ("a child had no result before its deadline and was killed", 1, True)


def _open(path: str) -> str:
    os.close(os.open(path, os.O_RDONLY))
    return "opened"


# --- command lines without end --------------------------------------------------------------------------------------


@pytest.fixture
def endless() -> Iterator[int]:
    """A process of another user whose command line is a gigabyte."""
    with hostile("long", "1024") as process:
        yield process.pid


def test_a_command_line_is_as_long_as_the_process_likes(endless: int) -> None:
    """What the next tests defend against."""
    with open(f"/proc/{endless}/cmdline", "rb", buffering=0) as file:
        assert sum(len(file.read(1 << 20)) for _ in range(64)) == 64 << 20


def test_preflight_reads_little_of_a_long_command_line(endless: int) -> None:
    assert endless not in shut_out(NOBODY).hung
    assert largest_rss(lambda: shut_out(NOBODY)) < 30 << 20


def test_watch_reads_little_of_a_long_command_line(endless: int) -> None:
    programs = Programs()
    line = programs.of(endless, NOW_NS).command_line
    programs.close()
    assert line is not None
    assert len(line) <= MAX_COMMAND_LINE + len("...")


# --- names ----------------------------------------------------------------------------------------------------------

ESCAPES = "\x1b[8m\x1b]0;own\x07"


def test_any_number_of_false_clients_is_one_line_without_escapes(folder: Path) -> None:
    patient = preflight.LIMITS._replace(total_s=60.0)  # an emulated processor may take more than 5 s for 300
    with crowd(folder, 300, ESCAPES) as pids:
        found = shut_out(NOBODY, patient)
    (ours,) = [one for one in found.shut_out if one.user == str(USER)]
    assert ours.processes == 300
    assert ours.pid == min(pids)
    assert ours.name == "\\x1b[8m\\x1b]0;own\\x07"
    (line,) = [line for line in shut_out_lines(found) if f"user {USER}" in line]
    assert line.startswith(
        f"{ours.name} (pid {ours.pid} and 299 more, user {USER}) is shut out: it is a metadata client"
    )
    assert line.isprintable()


def test_clients_of_many_users_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's come first, so that a crowd of other users hides none of them."""
    monkeypatch.setattr(preflight, "MAX_KINDS", 2)
    program = shutil.copy("/bin/cat", folder / "kubelet")
    with ExitStack() as running:
        for uid in (USER, USER + 1, USER + 2, 0):
            process = running.enter_context(subprocess.Popen([program], stdin=-1, user=uid))
            running.callback(process.kill)
        found = shut_out(NOBODY)
    assert (len(found.shut_out), found.more >= 2, found.shut_out[0].user) == (2, True, "root")
    assert any("more metadata client" in line for line in shut_out_lines(found))


# --- numbers --------------------------------------------------------------------------------------------------------


def test_a_process_with_too_many_descriptors_is_said() -> None:
    def search() -> tuple[bool, int]:
        vars(untrusted)["MAX_DESCRIPTORS"] = 100  # in this child alone
        with socket.socket() as one:
            inode = os.fstat(one.fileno()).st_ino
            few = holders_of(frozenset([inode]))
            more = [os.dup(one.fileno()) for _ in range(100)]
            many = holders_of(frozenset([inode]))
            for fd in more:
                os.close(fd)
        return os.getpid() in few.pids[inode], many.not_read - few.not_read

    assert run_in_child(search) == (True, 1)


@pytest.mark.parametrize(("bound", "most"), [("MAX_HOLDERS", 2), ("MAX_ALL_HOLDERS", 3)])
def test_so_many_holders_of_a_socket_are_kept(bound: str, most: int) -> None:
    """Of each user, and in all. Each process that a user forks holds all sockets of its parent."""

    def search() -> tuple[int, bool]:
        with socket.socket() as one:
            vars(socket_holders)[bound] = most  # in this child alone
            forked = [children.fork(lambda: os.read(os.pipe()[0], 1)) for _ in range(5)]
            inode = os.fstat(one.fileno()).st_ino
            found = holders_of(frozenset([inode]))
            for pid in forked:
                children.end(pid)
        return len(found.pids[inode]), found.not_read >= 3

    assert run_in_child(search) == (most, bound == "MAX_ALL_HOLDERS")


def test_a_search_for_holders_ends_in_time() -> None:
    found = holders_of(frozenset([1]), Limits(total_s=0.0))
    assert found.not_read >= len(os.listdir("/proc")) // 4


def test_so_many_network_namespaces_are_found_and_the_rest_counted() -> None:
    """Root's come first, then one of each owner in turn: a user with many hides nobody's."""

    def search() -> tuple[bool, bool, int, int]:
        with ExitStack() as running:
            crowd = [running.enter_context(own_network(USER)) for _ in range(4)]
            other = running.enter_context(own_network(USER + 1))
            roots = [running.enter_context(own_network(0)) for _ in range(2)]
            ours = [*crowd, other, *roots]
            vars(processes)["process_ids"] = lambda: ours  # in this child alone: other tests make namespaces, too
            vars(namespaces)["_mounted"] = lambda: iter(())
            vars(namespaces)["MAX_NAMESPACES"] = 5
            found = namespaces.network_namespaces()
            pids = {one.pid for one in found.found}
            return set(roots) <= pids, other in pids, len(pids & set(crowd)), found.more

    assert run_in_child(search) == (True, True, 1, 3)


@contextmanager
def own_network(uid: int) -> Iterator[int]:
    """A process in a network namespace that its user made."""
    namespaces_of = "--net" if uid == 0 else "--user --net"
    argv = ["unshare", *namespaces_of.split(), "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(argv, stdin=-1, stdout=-1, user=uid) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()
