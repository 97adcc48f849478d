# SPDX-License-Identifier: Apache-2.0
"""``imds-guard watch``: what it tells of denials, whom, and what it survives."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.kernel import bpf, lockfile
from imds_guard.kernel.credentials import become
from tests import command
from tests.command import NEIGHBOUR, ONE, PATIENCE_S, SERVICE, SERVICE_V6, STAFF, STRANGER, TWO, Guard
from tests.kernel.guards import folder_of
from tests.watched import Watch, watch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

GID = 51_999


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def start(guard: Guard, *words: str) -> None:
    guard.start("--user", str(ONE), "--ip", SERVICE, "--ip", SERVICE_V6, *words)


def logs_allowed(guard: Guard) -> bool:
    """What the hooks are told in the kernel."""
    fd = bpf.pinned(os.path.join(folder_of(guard.sandbox.cgroup).path, "watch"))
    try:
        return bool(struct.unpack("=I", bpf.map_lookup(fd, bytes(4), abi.WATCH.size) or b"")[0])
    finally:
        os.close(fd)


def ask_often(guard: Guard, times: int, ports: int = 1) -> None:
    """So many denied connects of one process, to so many ports in turn."""

    def run() -> None:
        become(uids=(STRANGER,) * 3, gids=(GID,) * 3, groups=())
        with socket.socket() as one:
            for number in range(times):
                assert one.connect_ex((SERVICE, 1 + number % ports)) == 1  # EPERM

    guard.sandbox.call(run, timeout_s=PATIENCE_S)


def socket_of(guard: Guard) -> Path:
    """Where followers of this guard's watch come to."""
    return Path(lockfile.FOLDER, f"watch-{folder_of(guard.sandbox.cgroup).name}.sock")


# --- what it tells --------------------------------------------------------------------------------------------------


def test_a_denial_is_told_with_everything_about_its_caller(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")
        assert guard.reach(STRANGER, SERVICE, gid=GID, groups=(7, 8)) == "EPERM"
        told = one.event("denied")
    expected = {
        "address": SERVICE,
        "port": 80,
        "protocol": "tcp",
        "hook": "connect4",
        "lock": "default",
        "reason": "not-listed",
        "uid": STRANGER,
        "user": str(STRANGER),
        "gid": GID,
        "groups": 2,
        "count": 1,
        "would_allow": f"imds-guard allow --user {STRANGER}",
        "cgroup": "/" + os.path.basename(guard.sandbox.cgroup),
        "cgroup_id": os.stat(guard.sandbox.cgroup).st_ino,
    }
    assert {key: told[key] for key in expected} == expected
    assert told["pid"] > 1
    assert told["netns_cookie"] > 1


def test_the_program_of_a_caller_that_is_still_there_is_named(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")

        def ask_and_stay() -> None:
            become(uids=(STRANGER,) * 3, gids=(GID,) * 3, groups=())
            with socket.socket() as client:
                client.connect_ex((SERVICE, 80))
            signal.pause()

        pid = guard.sandbox.spawn(ask_and_stay)
        told = one.event("denied")
        assert (told["pid"], told["exe"]) == (pid, os.path.realpath("/proc/self/exe"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").strip()
        assert told["cmdline"][:512] == words[:512]


def test_a_denial_before_the_watch_is_told_too_and_one_that_was_told_is_not_told_again(guard: Guard) -> None:
    """The buffer is the kernel's: it fills before a service runs."""
    start(guard)
    guard.reach(STRANGER, SERVICE)
    with watch(guard) as one:
        one.event("denied")
        assert one.end() == 0
        assert one.counted("denied") == 1
    guard.reach(TWO, SERVICE)
    with watch(guard) as again:
        assert again.event("denied")["uid"] == TWO


def test_audit_mode_is_told_as_such(guard: Guard) -> None:
    start(guard, "--mode", "audit")
    with watch(guard) as one:
        assert guard.reach(STRANGER, SERVICE) == "connected"
        assert one.event("audited", "denied")["event"] == "audited"


def test_what_would_have_helped_comes_from_the_policy_in_the_kernel(guard: Guard) -> None:
    """A group of the lock, by its name; who has no account can't be put into one."""
    guard.start("--group", "daemon", "--deny-user", str(TWO), "--ip", SERVICE)
    with watch(guard) as one:
        guard.reach(STRANGER, SERVICE, gid=GID)
        guard.reach(TWO, SERVICE, gid=GID)
        guard.reach(0, SERVICE, gid=GID)
        assert one.event("denied", uid=STRANGER)["would_allow"] == f"imds-guard allow --user {STRANGER}"
        assert one.event("denied", uid=TWO)["would_allow"] == f"take user {TWO} off the deny list"
        wanted = "add root to group daemon, or imds-guard allow --user root"
        assert one.event("denied", uid=0)["would_allow"] == wanted


def test_for_people_it_is_one_line_of_key_and_value(guard: Guard) -> None:
    start(guard)
    with watch(guard, as_json=False) as one:
        guard.reach(STRANGER, SERVICE_V6)
        line = one.until(lambda line: "verdict=" in line["line"])["line"]
    assert f" verdict=denied to=[{SERVICE_V6}]:80/tcp lock=default reason=not-listed user={STRANGER} " in line
    assert line.endswith(f' hook=connect6 would_allow="imds-guard allow --user {STRANGER}"')


@pytest.mark.parametrize("as_json", [True, False])
def test_nothing_that_a_caller_calls_itself_reaches_the_terminal_as_it_is(guard: Guard, as_json: bool) -> None:
    """Its name ends a line, clears the screen, turns the direction of writing, and is not UTF-8."""
    name = b"\n\x1b[2J\xe2\x80\xae\xff x"

    def ask() -> None:
        become(uids=(STRANGER,) * 3, gids=(GID,) * 3, groups=())
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # PR_SET_NAME
        with socket.socket() as client:
            client.connect_ex((SERVICE, 80))

    start(guard)
    with watch(guard, as_json=as_json) as one:
        guard.sandbox.call(ask)
        line = one.until(lambda line: line.get("uid") == STRANGER or f"uid={STRANGER}" in line.get("line", ""))
    if as_json:
        assert line["comm"] == "\n\x1b[2J\u202e\\xff x"
    else:
        assert ' comm="\\x0a\\x1b[2J\\u202e\\\\xff x" ' in line["line"]
        assert line["line"].isascii()
        assert line["line"].isprintable()


# --- floods ---------------------------------------------------------------------------------------------------------


def test_denials_that_are_alike_are_one_line_and_a_count_and_none_is_missing(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")
        ask_often(guard, 20_000)
        assert one.end() == 0
    assert one.counted("denied", "left-out", "lost") == 20_000
    told = [line for line in one.seen if line["event"] == "denied"]
    assert 1 <= len(told) <= 2
    assert {line["processes"] for line in told} == {1}


def test_at_most_a_hundred_lines_come_in_a_second_and_the_rest_is_counted(guard: Guard) -> None:
    """Of 5,000 destinations."""
    start(guard)
    with watch(guard) as one:
        one.event("began")
        ask_often(guard, 5_000, ports=5_000)
        assert one.end() == 0
    assert one.counted("denied", "left-out", "lost") == 5_000
    assert len([line for line in one.seen if line["event"] == "denied"]) <= 200  # it ran for a second and a bit
    assert one.counted("left-out") > 4_000


def test_what_found_no_room_before_there_was_a_watch_is_counted(guard: Guard) -> None:
    """The buffer keeps the oldest; the count is the kernel's."""
    start(guard)
    ask_often(guard, 20_000)
    with watch(guard, "--once") as one:
        assert one.wait() == 0
    assert one.event("lost")["before_this_watch"] is True
    assert one.counted("lost") > 10_000
    assert one.counted("denied", "left-out", "lost") == 20_000


# --- what is let through --------------------------------------------------------------------------------------------


def test_what_is_let_through_is_told_when_asked_for_and_only_while_it_is(guard: Guard) -> None:
    start(guard)
    with watch(guard, "--all") as one:
        one.event("began")
        assert logs_allowed(guard)
        assert guard.reach(ONE, SERVICE) == "connected"
        told = one.event("allowed")
        assert (told["uid"], told["reason"], told.get("would_allow")) == (ONE, "allowed-user", None)
        assert one.end(signal.SIGINT) == 0
    assert not logs_allowed(guard)


def test_after_a_kill_the_next_watch_switches_it_off(guard: Guard) -> None:
    start(guard)
    with watch(guard, "--all") as one:
        one.event("began")
        one.end(signal.SIGKILL)
    assert logs_allowed(guard)
    with watch(guard) as again:
        again.event("began")
        assert not logs_allowed(guard)
        guard.reach(ONE, SERVICE)
        guard.reach(STRANGER, SERVICE)
        again.event("denied")
        assert again.counted("allowed") == 0


# --- one reader, many followers -------------------------------------------------------------------------------------


def test_a_second_watch_tells_the_same_and_takes_over_when_the_first_is_killed(guard: Guard) -> None:
    start(guard)
    with ExitStack() as several:
        first = several.enter_context(watch(guard))
        first.event("began")  # only now: the one that comes first reads
        second = several.enter_context(watch(guard))
        follow(guard, second)
        guard.reach(TWO, SERVICE)
        assert first.event("denied", uid=TWO) == second.event("denied", uid=TWO)
        first.end(signal.SIGKILL)
        second.event("began")
        guard.reach(ONE, NEIGHBOUR)
        guard.reach(STRANGER, SERVICE_V6)
        assert second.event("denied", uid=STRANGER)["address"] == SERVICE_V6
        assert second.end() == 0


def follow(guard: Guard, *followers: Watch) -> None:
    """Returns when each follower is told of denials: of one more each time, until it is."""
    for follower in followers:
        user = 43_000
        while not any(line["event"] == "denied" for line in follower.seen):
            user += 1
            guard.reach(user, SERVICE)
            try:
                follower.until(lambda line: line["event"] == "denied", within_s=0.5)
            except AssertionError:
                continue


def test_a_follower_may_ask_for_what_is_let_through_without_the_first_telling_of_it(guard: Guard) -> None:
    start(guard)
    with watch(guard) as first:
        first.event("began")
        with watch(guard, "--all") as second:
            follow(guard, second)
            guard.reach(ONE, SERVICE)
            second.event("allowed", uid=ONE)
            assert logs_allowed(guard)
            assert second.end() == 0
        guard.reach(TWO, SERVICE)
        first.event("denied", uid=TWO)
        assert not logs_allowed(guard)
        assert first.counted("allowed") == 0


def test_a_follower_that_does_not_read_holds_nobody_up(guard: Guard) -> None:
    start(guard)
    with watch(guard) as first, socket.socket(socket.AF_UNIX) as idle:
        first.event("began")
        idle.connect(str(socket_of(guard)))
        ask_often(guard, 20_000, ports=3_000)
        guard.reach(TWO, SERVICE)
        assert first.end() == 0
    assert first.counted("denied", "left-out", "lost") == 20_001


def test_only_root_can_come_to_the_socket(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")
        path = socket_of(guard)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert one.end() == 0
    assert not path.exists()


# --- the guard changes under it -------------------------------------------------------------------------------------


def test_a_change_of_policy_goes_on_with_the_new_names(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")
        guard.reach(STRANGER, SERVICE)
        assert one.event("denied", uid=STRANGER)["lock"] == "default"
        guard("allow", "--user", str(STRANGER), "--ip", SERVICE)
        guard.reach(TWO, SERVICE)
        assert one.event("denied", uid=TWO)["lock"] != "default"


def test_it_waits_for_a_guard_and_goes_on_after_stop_and_start(guard: Guard) -> None:
    with watch(guard) as one:
        assert one.event("waiting")["waits_for"] == "imds-guard start"
        start(guard)
        one.event("began")
        guard.reach(STRANGER, SERVICE)
        one.event("denied", uid=STRANGER)
        assert guard("stop").status == 0
        one.event("ended")
        guard.start("--group", str(STAFF), "--ip", SERVICE)
        guard.reach(TWO, SERVICE)
        one.event("denied", uid=TWO)
        assert one.end() == 0


def test_all_is_asked_of_a_new_guard_too(guard: Guard) -> None:
    with watch(guard, "--all") as one:
        one.event("waiting")
        start(guard)
        one.event("began")
        guard.reach(ONE, SERVICE)
        one.event("allowed", uid=ONE)


# --- how it begins and ends -----------------------------------------------------------------------------------------


def test_a_service_manager_is_told_when_it_reads(guard: Guard, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        with watch(guard, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as one:
            assert manager.recv(4096).split(b"\n")[0] == b"READY=1"
            assert one.end() == 0
            assert one.errors == b""


def test_it_ends_when_nobody_reads_what_it_prints(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")
        assert one.process.stdout is not None
        one.process.stdout.close()
        assert one.process.wait(PATIENCE_S) == 0


def test_once_tells_what_is_there_and_ends(guard: Guard) -> None:
    start(guard)
    guard.reach(STRANGER, SERVICE)
    guard.reach(TWO, SERVICE)
    with watch(guard, "--once") as one:
        assert one.wait() == 0
        assert [line["uid"] for line in one.seen if line["event"] == "denied"] == [STRANGER, TWO]


def test_once_is_refused_without_a_guard_and_beside_another_watch(guard: Guard) -> None:
    assert "is not active" in guard("watch", "--once").sentence
    start(guard)
    with watch(guard) as one:
        one.event("began")
        assert "another imds-guard watch" in guard("watch", "--once").sentence


def files_of(guard: Guard) -> list[str]:
    """What a watch of this guard has in /run."""
    return [path.name for path in Path(lockfile.FOLDER).glob(f"watch-{folder_of(guard.sandbox.cgroup).name}*")]


def test_it_leaves_nothing_behind_and_maps_of_the_guard_go_with_stop(guard: Guard) -> None:
    start(guard)
    with ExitStack() as several:
        ones = [several.enter_context(watch(guard)) for _ in range(3)]
        follow(guard, *ones)
        assert files_of(guard)
        for one in ones:
            assert one.end() == 0
    assert files_of(guard) == []


def test_maps_have_the_names_that_it_opens(guard: Guard) -> None:
    start(guard)
    names = set(os.listdir(folder_of(guard.sandbox.cgroup).path))
    assert {Map.EVENTS.pin_name, Map.REPORT.pin_name, Map.WATCH.pin_name} <= names
