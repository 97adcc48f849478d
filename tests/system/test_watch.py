# SPDX-License-Identifier: Apache-2.0
"""``imds-guard watch``: the events that it prints, its followers, and changes of the guard meanwhile."""

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
from imds_guard.backends.ebpf.pins import map_pin
from imds_guard.kernel import bpf, lockfile
from imds_guard.kernel.credentials import become
from tests import command
from tests.command import (
    NEIGHBOUR,
    ONE,
    SERVICE,
    SERVICE_V6,
    STAFF,
    STRANGER,
    TIMEOUT_S,
    TWO,
    Guard,
    imds_guard_command,
)
from tests.kernel.guards import folder_of
from tests.watched import Watch, watch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

GID = 51_999


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def start(guard: Guard, *options: str) -> None:
    guard.start("--user", str(ONE), "--ip", SERVICE, "--ip", SERVICE_V6, *options)


def logs_allowed(guard: Guard) -> bool:
    """Whether the hooks report allowed connects."""
    fd = bpf.pinned(os.path.join(folder_of(guard.sandbox.cgroup).path, "watch"))
    try:
        return bool(struct.unpack("=I", bpf.map_lookup(fd, bytes(4), abi.WATCH.size) or b"")[0])
    finally:
        os.close(fd)


def connect_often(guard: Guard, times: int, ports: int = 1) -> None:
    """Denied connects of one process, to this many ports in turn."""

    def run() -> None:
        become(uids=(STRANGER,) * 3, gids=(GID,) * 3, groups=())
        with socket.socket() as one:
            for number in range(times):
                assert one.connect_ex((SERVICE, 1 + number % ports)) == 1  # EPERM

    guard.sandbox.call(run, timeout_s=TIMEOUT_S)


def socket_of(guard: Guard) -> Path:
    """The socket for followers of this guard's watch."""
    return Path(lockfile.FOLDER, f"watch-{folder_of(guard.sandbox.cgroup).name}.sock")


# --- events ----------------------------------------------------------------------------------------------------------


def test_a_denial_is_printed_with_its_caller(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")
        assert guard.reach(STRANGER, SERVICE, gid=GID, groups=(7, 8)) == "EPERM"
        event = one.event("denied")
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
        "would_allow": f"imds-guard allow --user {STRANGER} --cgroup {guard.sandbox.cgroup}",
        "cgroup": "/" + os.path.basename(guard.sandbox.cgroup),
        "cgroup_id": os.stat(guard.sandbox.cgroup).st_ino,
    }
    assert {key: event[key] for key in expected} == expected
    assert event["pid"] > 1
    assert event["netns_cookie"] > 1


def test_the_program_of_a_running_caller_is_printed(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")

        def connect_and_wait() -> None:
            become(uids=(STRANGER,) * 3, gids=(GID,) * 3, groups=())
            with socket.socket() as client:
                client.connect_ex((SERVICE, 80))
            signal.pause()

        pid = guard.sandbox.spawn(connect_and_wait)
        event = one.event("denied")
        assert (event["pid"], event["exe"]) == (pid, os.path.realpath("/proc/self/exe"))
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").strip()
        assert event["cmdline"][:512] == command_line[:512]


def test_a_denial_before_the_watch_is_printed_once(guard: Guard) -> None:
    """The ring buffer fills while no watch runs."""
    start(guard)
    guard.reach(STRANGER, SERVICE)
    with watch(guard) as one:
        one.event("denied")
        assert one.end() == 0
        assert one.counted("denied") == 1
    guard.reach(TWO, SERVICE)
    with watch(guard) as again:
        assert again.event("denied")["uid"] == TWO


def test_a_datagram_to_an_unknown_destination_names_its_caller_and_no_lock(guard: Guard) -> None:
    """Where 0.0.0.0 leads is not known, so no lock is named. Who sent it is known."""
    guard.start("--user", str(ONE), "--ip", f"{SERVICE}:80,any")

    def send() -> tuple[int, str]:
        become(uids=(STRANGER,) * 3, gids=(GID,) * 3, groups=(7, 8))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, pytest.raises(PermissionError):
            one.sendto(b"x", ("0.0.0.0", 80))
        return os.getpid(), Path("/proc/self/comm").read_text().strip()

    pid, comm = guard.sandbox.call(send, timeout_s=TIMEOUT_S)
    with watch(guard) as one:
        event = one.event("denied")
    (row,) = guard("report", "--json").values["rows"]
    expected = {"reason": "unspecified-destination", "lock": None, "uid": STRANGER, "comm": comm, "address": "0.0.0.0"}
    assert [{key: found[key] for key in expected} for found in (event, row)] == [expected, expected]
    assert (event["pid"], event["gid"], event["groups"]) == (pid, GID, 2)


def test_a_denial_in_audit_mode_is_an_audited_event(guard: Guard) -> None:
    start(guard, "--mode", "audit")
    with watch(guard) as one:
        assert guard.reach(STRANGER, SERVICE) == "connected"
        assert one.event("audited", "denied")["event"] == "audited"


def test_would_allow_comes_from_the_policy_in_the_kernel(guard: Guard) -> None:
    """It names a group of the lock, but not for a user without an account, who can't be put into a group."""
    guard.start("--group", "daemon", "--deny-user", str(TWO), "--ip", SERVICE)
    here = f" --cgroup {guard.sandbox.cgroup}"
    with watch(guard) as one:
        guard.reach(STRANGER, SERVICE, gid=GID)
        guard.reach(TWO, SERVICE, gid=GID)
        guard.reach(0, SERVICE, gid=GID)
        assert one.event("denied", uid=STRANGER)["would_allow"] == f"imds-guard allow --user {STRANGER}{here}"
        assert one.event("denied", uid=TWO)["would_allow"] == f"take user {TWO} off the deny list"
        expected = "add root to group daemon, or imds-guard allow --user root" + here
        assert one.event("denied", uid=0)["would_allow"] == expected


def test_where_the_lists_differ_the_advice_names_the_address(guard: Guard) -> None:
    """Without --ip allow would refuse."""
    guard.start("--user", str(ONE), "--ip", SERVICE, "--ip", SERVICE_V6)
    assert guard("allow", "--user", str(TWO), "--ip", SERVICE_V6).status == 0
    with watch(guard) as one:
        guard.reach(STRANGER, SERVICE)
        advice = one.event("denied", uid=STRANGER)["would_allow"]
        assert advice == f"imds-guard allow --user {STRANGER} --ip {SERVICE} --cgroup {guard.sandbox.cgroup}"
        assert imds_guard_command(*advice.split()[1:]).status == 0
        assert guard.reach(STRANGER, SERVICE) == "connected"


def test_without_json_an_event_is_a_line_of_key_value(guard: Guard) -> None:
    start(guard)
    with watch(guard, as_json=False) as one:
        guard.reach(STRANGER, SERVICE_V6)
        line = one.until(lambda line: "verdict=" in line["line"])["line"]
    assert f" verdict=denied to=[{SERVICE_V6}]:80/tcp lock=default reason=not-listed user={STRANGER} " in line
    assert line.endswith(
        f' hook=connect6 would_allow="imds-guard allow --user {STRANGER} --cgroup {guard.sandbox.cgroup}"'
    )


@pytest.mark.parametrize("as_json", [True, False])
def test_the_name_of_a_caller_is_safe_to_print(guard: Guard, as_json: bool) -> None:
    """The name ends a line, clears the screen, reverses the direction of the text, and is not UTF-8."""
    name = b"\n\x1b[2J\xe2\x80\xae\xff x"

    def connect() -> None:
        become(uids=(STRANGER,) * 3, gids=(GID,) * 3, groups=())
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # PR_SET_NAME
        with socket.socket() as client:
            client.connect_ex((SERVICE, 80))

    start(guard)
    with watch(guard, as_json=as_json) as one:
        guard.sandbox.call(connect)
        line = one.until(lambda line: line.get("uid") == STRANGER or f"uid={STRANGER}" in line.get("line", ""))
    if as_json:
        assert line["comm"] == "\n\x1b[2J\u202e\\xff x"
    else:
        assert ' comm="\\x0a\\x1b[2J\\u202e\\\\xff x" ' in line["line"]
        assert line["line"].isascii()
        assert line["line"].isprintable()


# --- floods ---------------------------------------------------------------------------------------------------------


def test_similar_denials_are_one_line_with_a_count_and_none_is_missing(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")
        connect_often(guard, 20_000)
        assert one.end() == 0
    assert one.counted("denied", "left-out", "lost") == 20_000
    lines = [line for line in one.seen if line["event"] == "denied"]
    assert 1 <= len(lines) <= 2
    assert {line["processes"] for line in lines} == {1}


def test_a_second_has_at_most_a_hundred_lines_and_the_other_denials_are_counted(guard: Guard) -> None:
    """The denials go to 5,000 destinations."""
    start(guard)
    with watch(guard) as one:
        one.event("began")
        connect_often(guard, 5_000, ports=5_000)
        assert one.end() == 0
    assert one.counted("denied", "left-out", "lost") == 5_000
    assert len([line for line in one.seen if line["event"] == "denied"]) <= 200  # it takes little more than a second
    assert one.counted("left-out") > 4_000


def test_records_lost_before_the_watch_are_counted(guard: Guard) -> None:
    """A full ring buffer keeps its oldest records. The kernel counts the others."""
    start(guard)
    connect_often(guard, 20_000)
    with watch(guard, "--once") as one:
        assert one.wait() == 0
    assert one.event("lost")["before_this_watch"] is True
    assert one.counted("lost") > 10_000
    assert one.counted("denied", "left-out", "lost") == 20_000


# --- allowed connects ------------------------------------------------------------------------------------------------


def test_allowed_connects_are_reported_only_while_a_watch_asks_for_them(guard: Guard) -> None:
    start(guard)
    with watch(guard, "--all") as one:
        one.event("began")
        assert logs_allowed(guard)
        assert guard.reach(ONE, SERVICE) == "connected"
        event = one.event("allowed")
        assert (event["uid"], event["reason"], event.get("would_allow")) == (ONE, "allowed-user", None)
        assert one.end(signal.SIGINT) == 0
    assert not logs_allowed(guard)


def test_the_next_watch_after_a_killed_one_switches_off_reports_of_allowed_connects(guard: Guard) -> None:
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


# --- one leader, many followers --------------------------------------------------------------------------------------


def test_a_follower_prints_the_same_events_and_takes_the_place_of_a_killed_leader(guard: Guard) -> None:
    start(guard)
    with ExitStack() as several:
        first = several.enter_context(watch(guard))
        first.event("began")  # the first one must be the leader
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
    """Returns when each follower has printed a denial. It causes one denial after another until then."""
    for follower in followers:
        user = 43_000
        while not any(line["event"] == "denied" for line in follower.seen):
            user += 1
            guard.reach(user, SERVICE)
            try:
                follower.until(lambda line: line["event"] == "denied", within_s=0.5)
            except AssertionError:
                continue


def test_a_follower_can_ask_for_allowed_connects_that_the_leader_does_not_print(guard: Guard) -> None:
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


def test_a_follower_that_does_not_read_blocks_nobody(guard: Guard) -> None:
    start(guard)
    with watch(guard) as first, socket.socket(socket.AF_UNIX) as idle:
        first.event("began")
        idle.connect(str(socket_of(guard)))
        connect_often(guard, 20_000, ports=3_000)
        guard.reach(TWO, SERVICE)
        assert first.end() == 0
    assert first.counted("denied", "left-out", "lost") == 20_001


def test_only_root_can_connect_to_the_socket(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")
        path = socket_of(guard)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert one.end() == 0
    assert not path.exists()


# --- changes of the guard --------------------------------------------------------------------------------------------


def test_after_a_change_of_policy_the_new_lock_is_named(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")
        guard.reach(STRANGER, SERVICE)
        assert one.event("denied", uid=STRANGER)["lock"] == "default"
        guard("allow", "--user", str(STRANGER), "--ip", SERVICE)
        guard.reach(TWO, SERVICE)
        assert one.event("denied", uid=TWO)["lock"] != "default"


def test_it_waits_for_a_guard_and_survives_stop_and_start(guard: Guard) -> None:
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


def test_losses_are_reported_once_when_maps_are_replaced(guard: Guard) -> None:
    """The counters outlive the other maps. A missing pin makes start replace them."""
    start(guard)
    connect_often(guard, 20_000)
    with watch(guard) as one:
        lost = one.event("lost")["count"]
        os.unlink(map_pin(folder_of(guard.sandbox.cgroup).path, Map.LOCKS))
        start(guard)
        one.event("ended")
        guard.reach(TWO, SERVICE)
        one.event("denied", uid=TWO)
        assert one.end() == 0
        assert one.counted("lost") == lost


def test_a_new_guard_reports_allowed_connects_too(guard: Guard) -> None:
    with watch(guard, "--all") as one:
        one.event("waiting")
        start(guard)
        one.event("began")
        guard.reach(ONE, SERVICE)
        one.event("allowed", uid=ONE)


# --- start and end ---------------------------------------------------------------------------------------------------


def test_it_notifies_the_service_manager(guard: Guard, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(TIMEOUT_S)
        with watch(guard, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as one:
            assert manager.recv(4096).split(b"\n")[0] == b"READY=1"
            assert one.end() == 0
            assert one.errors == b""


def test_it_ends_when_its_reader_is_gone(guard: Guard) -> None:
    start(guard)
    with watch(guard) as one:
        one.event("began")
        assert one.process.stdout is not None
        one.process.stdout.close()
        assert one.process.wait(TIMEOUT_S) == 0


def test_once_prints_the_records_in_the_ring_buffer_and_ends(guard: Guard) -> None:
    start(guard)
    guard.reach(STRANGER, SERVICE)
    guard.reach(TWO, SERVICE)
    with watch(guard, "--once") as one:
        assert one.wait() == 0
        assert [line["uid"] for line in one.seen if line["event"] == "denied"] == [STRANGER, TWO]


def test_once_fails_without_a_guard_and_beside_another_watch(guard: Guard) -> None:
    assert "nothing is locked" in guard("watch", "--once").sentence
    start(guard)
    with watch(guard) as one:
        one.event("began")
        assert "another imds-guard watch" in guard("watch", "--once").sentence


def files_of(guard: Guard) -> list[str]:
    """The files of this guard's watch in /run."""
    return [path.name for path in Path(lockfile.FOLDER).glob(f"watch-{folder_of(guard.sandbox.cgroup).name}*")]


def test_it_leaves_no_files_behind(guard: Guard) -> None:
    start(guard)
    with ExitStack() as several:
        watches = [several.enter_context(watch(guard)) for _ in range(3)]
        follow(guard, *watches)
        assert files_of(guard)
        for one in watches:
            assert one.end() == 0
    assert files_of(guard) == []


def test_the_maps_that_it_opens_are_pinned(guard: Guard) -> None:
    start(guard)
    names = set(os.listdir(folder_of(guard.sandbox.cgroup).path))
    assert {Map.EVENTS.pin_name, Map.REPORT.pin_name, Map.WATCH.pin_name} <= names
