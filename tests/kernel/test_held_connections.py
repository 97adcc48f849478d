# SPDX-License-Identifier: Apache-2.0
"""A connection whose socket a process holds locked: no command waits for it, and all others are cut."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.commands import turn
from imds_guard.connections.cut import CUT_S, cut_denied
from imds_guard.connections.values import SweepEnd, WhyOpen
from imds_guard.kernel import children, sock_destroy
from imds_guard.kernel.processes import process_ids
from imds_guard.present.connections import connection_warnings
from tests.command import ONE, SERVICE, STRANGER, TWO, Guard, argv
from tests.hostile import fuse_device, lock_socket
from tests.kernel.clients import NEEDS_THE_HOST, Client, Stage, locked, opening, pids, stage, wait_until
from tests.system.test_verify import unlink_hook

pytestmark = NEEDS_THE_HOST

COMPILED_WITHIN_S = 120.0
"""An emulated processor compiles for 20 s and more."""
SEARCHED_MEANWHILE = pytest.mark.skipif(
    tuple(map(int, re.findall("[0-9]+", os.uname().release)[:2])) < (6, 9),
    reason="before Linux 6.9 one mutex serialises sock_diag: nobody can list sockets while one is waited for",
)
LOCK = ("--user", str(ONE), "--ip", f"{SERVICE}:80")


@pytest.fixture
def here() -> Iterator[Stage]:
    with stage() as one:
        yield one


class Held:
    """A client of STRANGER whose connection is locked."""

    def __init__(self, here: Stage, device: str, mount: str) -> None:
        self._servers, theirs = socket.socketpair()

        def made() -> list[socket.socket]:
            (one,) = opening()()
            theirs.send(str(lock_socket(one, device, mount)).encode())
            return [one]

        self.client: Client = here.client(made)
        theirs.close()
        self._server = int(self._servers.recv(32))

    def let_go(self) -> None:
        """Ends the FUSE server, so that the send fails."""
        os.kill(self._server, signal.SIGKILL)


@pytest.fixture
def held(here: Stage) -> Iterator[Held]:
    with tempfile.TemporaryDirectory(prefix="imds-guard-test-") as folder:
        os.chmod(folder, 0o755)
        with fuse_device(Path(folder)) as (device, mount):
            one = Held(here, device, mount)
            yield one
            one.let_go()


def test_the_others_are_cut_and_it_is_named(here: Stage, held: Held) -> None:
    """Its own user's other connections, too."""
    others = [here.client(opening()), here.client(opening(), uid=TWO), here.client(opening())]
    allowed = here.client(opening(), uid=ONE)
    began = time.monotonic()
    done = cut_denied(locked(ONE), here.scope)
    assert time.monotonic() - began < CUT_S + 6
    assert [one.write() for one in others] == [["ECONNABORTED"]] * 3
    assert allowed.write() == ["sent"]
    assert set(pids(done.cut)) == {one.pid for one in others}
    (left,) = done.still_open
    assert (left.why_open, done.end) == (WhyOpen.HELD, SweepEnd.DEADLINE)
    assert held.client.pid in [holder.pid for holder in left.holders]
    (warning, *_) = connection_warnings(done, strict=False)
    assert warning.startswith("left 1 open connection that the policy does not allow, since a system call that does")
    assert f"(pid {held.client.pid}, user {STRANGER})" in warning
    assert "start with --strict" in warning


def test_it_is_cut_when_it_is_let_go(here: Stage, held: Held) -> None:
    """The child that was left behind waits in the kernel for the lock. Nobody kills it there."""

    def work() -> bool:
        done = cut_denied(locked(ONE), here.scope)
        left_behind = children.abandoned()
        held.let_go()
        wait_until(lambda: children.abandoned() == 0)
        return left_behind == 1 and len(done.still_open) == 1

    assert children.run_in_child(work)
    assert held.client.write() == ["ECONNABORTED"]


@SEARCHED_MEANWHILE
def test_nobody_waits_twice_for_the_same_socket(here: Stage, held: Held) -> None:
    """A timer looks for connections each five minutes: it would leave a process behind each time."""

    def work() -> bool:
        ends = []
        for _ in range(3):
            done = cut_denied(locked(ONE), here.scope)
            ends.append((children.abandoned(), [one.why_open for one in done.still_open], done.end))
        held.let_go()
        wait_until(lambda: children.abandoned() == 0)
        return ends == [(1, [WhyOpen.HELD], SweepEnd.DEADLINE)] * 3

    assert children.run_in_child(work)
    assert held.client.write() == ["ECONNABORTED"]


def test_what_was_not_held_after_all_is_cut(here: Stage) -> None:
    """A thread that was killed keeps no claim, also where another thread of its process still waits."""
    client = here.client(opening())
    assert pids(cut_denied(locked(ONE), here.scope).cut) == [client.pid]
    again = here.client(opening())
    assert pids(cut_denied(locked(ONE), here.scope).cut) == [again.pid]


@SEARCHED_MEANWHILE
def test_who_holds_more_sockets_than_there_are_threads_keeps_none_from_being_cut(
    here: Stage, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others of the same user, too: they are tried when the threads have hung for a moment."""
    monkeypatch.setattr(sock_destroy, "MAX_THREADS", 1)
    others = [here.client(opening()) for _ in range(8)]
    done = cut_denied(locked(ONE), here.scope)
    assert [one.write() for one in others] == [["ECONNABORTED"]] * 8
    assert [one.why_open for one in done.still_open] == [WhyOpen.HELD]


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def guard(here: Stage) -> Iterator[Guard]:
    one = Guard(here.sandbox)
    try:
        yield one
    finally:
        one.backend.remove()


def begun(guard: Guard, *arguments: str) -> subprocess.Popen[str]:
    """A start that was begun, when a child of it waits for the held socket."""
    process = subprocess.Popen(
        argv(guard.arguments("start", *LOCK, *arguments)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: hangs_below(process.pid), COMPILED_WITHIN_S)
    return process


def hangs_below(pid: int) -> bool:
    """Whether a thread of a child of a process waits for the lock of a socket that it ends."""
    for one in process_ids():
        with contextlib.suppress(OSError):  # it has ended, or one of its threads has
            for path in [Path(f"/proc/{one}/task/{thread}") for thread in os.listdir(f"/proc/{one}/task")]:
                state, parent = (path / "stat").read_bytes().rsplit(b")", 1)[1].split()[:2]
                if (state, int(parent)) == (b"D", pid) and "tcp_abort" in (path / "stack").read_text("ascii"):
                    return True
    return False


def test_start_ends_and_says_what_it_could_not_cut(here: Stage, held: Held, guard: Guard) -> None:
    other = here.client(opening())
    done = guard.start(*LOCK, "--json")
    assert other.write() == ["ECONNABORTED"]
    found = done.values["connections"]
    assert (found["sweep"], [one["why_left"] for one in found["left"]]) == ("deadline", ["held"])
    assert [process["pid"] for one in found["cut"] for process in one["processes"]] == [other.pid]


def test_the_terminal_says_at_once_that_the_lock_is_on_and_the_policy_is_saved(
    here: Stage, held: Held, guard: Guard, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    guard.start("--user", str(STRANGER), "--user", str(ONE), "--ip", f"{SERVICE}:80", "--keep-existing")
    ours, theirs = pty.openpty()
    revoke = guard.arguments("revoke", "--user", str(STRANGER), "--save", "--without-root", "--config", str(path))
    with subprocess.Popen(argv(revoke), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while b"imds-guard is active (ebpf); looking for open connections" not in said:
            said += os.read(ours, 1024)
        assert path.exists()
        wait_until(lambda: hangs_below(process.pid))  # so it has not ended
    os.close(ours)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once(held: Held, guard: Guard, signal_number: signal.Signals) -> None:
    """It waits for a child in state D then. The lock stays on, and the next verify --repair looks again."""
    with begun(guard) as process:
        process.send_signal(signal_number)
        began = time.monotonic()
        _, said = process.communicate(timeout=20)
        assert time.monotonic() - began < 3  # 0.2 s where nobody else uses the CPU
        assert (process.returncode, len(said.strip().splitlines())) == (128 + signal_number, 1), said
    assert guard.status()["state"] == "active"
    held.let_go()
    wait_until(lambda: held.client.write() == ["ECONNABORTED"])


@SEARCHED_MEANWHILE
def test_other_commands_go_on_meanwhile_and_take_the_search_over(here: Stage, held: Held, guard: Guard) -> None:
    """The one that was overtaken stops: what it would cut may be allowed now."""
    with begun(guard, "--json") as process:
        began = time.monotonic()
        allowed = guard("allow", "--user", str(TWO), "--json")
        assert time.monotonic() - began < 10
        stdout, _ = process.communicate(timeout=20)
    assert allowed.status == 0
    assert [one["why_left"] for one in allowed.values["connections"]["left"]] == ["held"]
    found = json.loads(stdout)["connections"]
    assert (found["sweep"], [one["why_left"] for one in found["left"]]) == ("interrupted", ["no-time"])


def test_verify_looks_again_but_leaves_alone_what_was_kept(here: Stage, guard: Guard, tmp_path: Path) -> None:
    """Without the file beside the lock nobody knows that connections were to be kept."""
    verify = ("verify", "--repair", "--config", str(tmp_path / "none.toml"), "--json")
    client = here.client(opening())
    guard.start(*LOCK, "--keep-existing")
    assert (guard(*verify).values["connections"], client.write()) == (None, ["sent"])
    turn.forget(f"command-{os.stat(here.sandbox.cgroup).st_ino}")
    found = guard(*verify).values["connections"]
    assert [process["pid"] for one in found["cut"] for process in one["processes"]] == [client.pid]
    assert client.write() == ["ECONNABORTED"]


def test_what_a_killed_start_left_is_for_the_next_command(here: Stage, held: Held, guard: Guard) -> None:
    """Also for one that takes no right away. It does not wait for a socket that the killed one waits for."""
    with begun(guard) as process:
        process.kill()
    assert guard("allow", "--user", str(TWO), "--json").values["connections"]["sweep"] == "deadline"
    assert guard("allow", "--user", str(TWO + 9), "--json").values["connections"] is None


def test_repair_keeps_what_was_kept(here: Stage, guard: Guard, tmp_path: Path) -> None:
    """It puts the policy in force back as it was started."""
    client = here.client(opening())
    guard.start(*LOCK, "--keep-existing")
    unlink_hook(guard)
    done = guard("verify", "--repair", "--config", str(tmp_path / "none.toml"))
    assert ("repaired: " in done.stdout, client.write()) == (True, ["sent"])
