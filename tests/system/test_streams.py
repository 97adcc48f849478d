# SPDX-License-Identifier: Apache-2.0
"""Standard streams that are closed, full or broken: the lock is what was asked for, and the exit status says so."""

from __future__ import annotations

import os
import pty
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Union

import pytest

from tests import command
from tests.command import ONE, SERVICE, STRANGER, TWO, Guard
from tests.kernel.guards import traces
from tests.system.test_privilege import CHANGE, LOOK, NOTHING, argv

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

DONE, INACTIVE, UNSAID, BAD_POLICY = 0, 3, 74, 78

Target = Union[int, IO[bytes]]


@contextmanager
def full() -> Iterator[Target]:
    """As a file on a full file system: write(2) ends with ENOSPC."""
    with open("/dev/full", "wb") as file:
        yield file


@contextmanager
def broken() -> Iterator[Target]:
    """The reader has left: write(2) ends with EPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@contextmanager
def closed() -> Iterator[None]:
    """For run(), which closes it."""
    yield None


STATES = {"closed": closed, "full": full, "broken": broken}


def run(words: tuple[str, ...], stdout: str = "", stderr: str = "", stdin: str = "") -> tuple[int, bytes]:
    """The exit status and standard error of a program, one or more of whose streams are in one of STATES."""
    closing = "".join(f" {fd}>&-" for fd, state in enumerate((stdin, stdout, stderr)) if state == "closed")
    with STATES.get(stdout, closed)() as out, STATES.get(stderr, closed)() as err:
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "$@"{closing}', "sh", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if out is None else out,
            stderr=subprocess.PIPE if err is None else err,
            timeout=command.TIMEOUT_S,
            check=False,
        )
    assert b"Traceback" not in (done.stderr or b""), done
    return done.returncode, done.stderr or b""


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


@pytest.fixture(scope="module")
def running() -> Iterator[Guard]:
    """A running guard, which no test may change."""
    with command.guard() as one:
        one.start("--user", str(ONE), "--ip", SERVICE)
        yield one


# --- the answers of commands that change nothing ----------------------------------------------------------------------

OF_LOOK = {"closed": DONE, "full": UNSAID, "broken": DONE}
"""A closed stream is for nobody, and a reader that has left has read what it wanted."""

SILENT = {"watch", "filter"}
"""They say nothing where nothing is denied and no filter is served."""


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", sorted({*LOOK, "endpoints"} - SILENT))
def test_a_command_that_reads(running: Guard, name: str, state: str) -> None:
    words = command.argv(("endpoints",)) if name == "endpoints" else argv(running, name)
    status, said = run(words, stdout=state)
    assert status == OF_LOOK[state], said
    if status == UNSAID:
        assert b"standard output: ENOSPC (No space left on device); the command has done its work" in said


@pytest.mark.parametrize("state", STATES)
def test_the_log_of_denials(running: Guard, state: str) -> None:
    """It has something to say only after a denial."""
    assert running.reach(STRANGER) == "EPERM"
    assert run(argv(running, "watch"), stdout=state)[0] == OF_LOOK[state]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("words", [("--version",), ("--help",), ("start", "--help")], ids=" ".join)
def test_what_click_prints(words: tuple[str, ...], state: str) -> None:
    assert run(command.argv(words), stdout=state)[0] == OF_LOOK[state]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["status", "verify"])
def test_a_status_that_says_something_else_stays(guard: Guard, name: str, state: str) -> None:
    """That nothing is locked matters more than that the answer was not read."""
    words = command.argv((name, "--cgroup", guard.sandbox.cgroup))
    assert run(words, stdout=state)[0] == INACTIVE


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", sorted({*LOOK} - {"demo"}))
def test_standard_error_changes_no_status(running: Guard, name: str, state: str) -> None:
    assert run(argv(running, name), stderr=state)[0] == DONE


# --- commands that change something -----------------------------------------------------------------------------------

OF_CHANGE = {"closed": DONE, "full": UNSAID, "broken": UNSAID}
ALLOWED = {"start": [ONE], "ip-lockdown": [0, ONE], "allow": [0, ONE, TWO], "revoke": [0, TWO], "mode": [0, TWO]}
"""Who is let through after each of CHANGE."""


def assert_all_changes_are_made(guard: Guard, status: int, **states: str) -> None:
    for name in CHANGE:
        assert run(argv(guard, name), **states)[0] == status, name
        if name in ALLOWED:
            reached = [uid for uid in (0, ONE, TWO, STRANGER) if guard.reach(uid) == "connected"]
            assert reached == ALLOWED[name], name
    assert traces(guard.sandbox.cgroup) == NOTHING


@pytest.mark.parametrize("state", STATES)
def test_a_change_is_made_whatever_standard_output_is(guard: Guard, state: str) -> None:
    assert_all_changes_are_made(guard, OF_CHANGE[state], stdout=state)


@pytest.mark.parametrize("state", STATES)
def test_a_change_is_made_whatever_standard_error_is(guard: Guard, state: str) -> None:
    assert_all_changes_are_made(guard, DONE, stderr=state)


def test_a_change_is_made_without_any_stream(guard: Guard) -> None:
    """As a daemon starts programs that has closed everything: no file of ours gets the number of a stream."""
    assert_all_changes_are_made(guard, DONE, stdin="closed", stdout="closed", stderr="closed")


@pytest.mark.parametrize("state", STATES)
def test_an_error_has_its_status_whatever_the_streams_are(guard: Guard, state: str) -> None:
    words = command.argv(guard.arguments("start", "--user", "imds-guard-absent"))
    assert run(words, stdout=state, stderr=state)[0] == BAD_POLICY
    assert traces(guard.sandbox.cgroup) == NOTHING


# --- one write(2) -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*LOOK, "start"} - SILENT))
def test_an_answer_is_one_write(running: Guard, name: str) -> None:
    """So "status | grep -q" reads it whole, and a line is never mixed with those of others. One record, one write."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = subprocess.Popen(argv(running, name), stdout=theirs.fileno(), stderr=subprocess.DEVNULL)
        records = list(iter(lambda: ours.recv(1 << 20), b""))
        assert process.wait(8) == DONE
    assert [record[-1:] for record in records] == [b"\n"]


def test_a_descriptor_that_does_not_block_gets_the_whole_answer() -> None:
    """O_NONBLOCK belongs to the open file, which ssh or Node.js may share with us."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    words = ("endpoints", "--json")
    # Python prints far more than the pipe takes before anybody reads it.
    before = "import fcntl; fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 4096)"
    process = subprocess.Popen(command.argv(words, before=before), stdout=writer)
    os.close(writer)
    read: list[bytes] = []

    def read_all() -> None:
        with open(reader, "rb") as file:
            read.append(file.read())

    thread = threading.Thread(target=read_all)
    thread.start()
    assert process.wait(8) == DONE
    thread.join()
    assert read[0].decode() == command.imds_guard_command(*words).answer


# --- the journal ------------------------------------------------------------------------------------------------------


def in_journal(file: Path, *words: str) -> list[str]:
    """The lines of a program whose streams systemd has connected to the journal: a file that it says to be that."""
    with file.open("wb") as stream:
        status = os.fstat(stream.fileno())
        subprocess.run(
            command.argv(words),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
            timeout=command.TIMEOUT_S,
            check=False,
        )
    return file.read_text(encoding="utf-8").splitlines()


def test_lines_of_the_journal_have_priorities(guard: Guard, tmp_path: Path) -> None:
    """Warnings 4, errors 3 (sd-daemon(3)). What was done is one entry."""
    words = ("start", "--nobody", "--ip", SERVICE, "--cgroup", guard.sandbox.cgroup)
    done, *warnings = in_journal(tmp_path / "journal", *words)
    assert done.startswith("imds-guard is active (ebpf): 1 endpoint locked; ")
    assert "<4>warning: lock default lets nobody through, root included" in warnings
    assert all(line.startswith("<4>warning: ") for line in warnings)
    (error,) = in_journal(tmp_path / "journal", "start", "--group", "no-such-group", "--cgroup", guard.sandbox.cgroup)
    assert error.startswith("<3>imds-guard: there is no group 'no-such-group'")


def test_other_streams_have_no_priorities(guard: Guard) -> None:
    """JOURNAL_STREAM is inherited by whatever a unit starts, with its output somewhere else."""
    started = command.run(
        command.argv(("start", "--nobody", "--ip", SERVICE, "--cgroup", guard.sandbox.cgroup)),
        {"JOURNAL_STREAM": "1:2"},
    )
    assert started.status == DONE
    assert "warning: lock default lets nobody through" in started.stderr
    assert "<4>" not in started.stderr
    assert "  lock default" in started.stdout.splitlines()


# --- while a lock is held ---------------------------------------------------------------------------------------------

_WRITES = """
import sys
from imds_guard.cli import streams
from imds_guard.kernel import lockfile
lockfile.FOLDER = sys.argv[1]
streams.install()
with lockfile.exclusive("a"):
    sys.stderr.write("y" * int(sys.argv[2]))
    sys.stderr.flush()
    print("let go")
"""


def taken(fd: int, size: int) -> int:
    """Writes up to ``size`` bytes, as many as the descriptor takes now, and returns their number."""
    os.set_blocking(fd, False)
    written = 0
    try:
        while written < size:
            written += os.write(fd, b"x" * min(4096, size - written))
    except BlockingIOError:
        pass
    finally:
        os.set_blocking(fd, True)
    return written


def ends() -> dict[str, Callable[[], tuple[int, int]]]:
    """Pairs of a reader and a writer."""

    def both(pair: tuple[socket.socket, socket.socket]) -> tuple[int, int]:
        return pair[0].detach(), pair[1].detach()

    return {"terminal": pty.openpty, "pipe": os.pipe, "socket": lambda: both(socket.socketpair())}


@pytest.mark.parametrize("room", [0, 100, 5000])
@pytest.mark.parametrize("kind", ends())
def test_nobody_waits_for_a_reader_that_waits(kind: str, room: int, tmp_path: Path) -> None:
    """The reader takes ``room`` bytes more, and then nothing."""
    capacity = 0
    for size in (1 << 30, None):
        reader, writer = ends()[kind]()
        capacity = taken(writer, capacity - room if size is None else size)
        if size is not None:
            os.close(reader)
            os.close(writer)
    argv = [sys.executable, "-c", _WRITES, str(tmp_path), "20000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=writer) as process:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], command.TIMEOUT_S)
        said = os.read(process.stdout.fileno(), 100) if ready else b""
        process.kill()
    os.close(writer)
    os.close(reader)
    assert said == b"let go\n"
