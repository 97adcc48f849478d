# SPDX-License-Identifier: Apache-2.0
"""The commands that change the guard: what each one changes in the world."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from imds_guard.kernel import bpf, bpffs, lockfile
from imds_guard.kernel.children import run_in_child
from tests import command
from tests.command import MAPPED, NEIGHBOUR, ONE, SERVICE, SERVICE_V6, STAFF, STRANGER, TWO, Guard, Result
from tests.kernel.guards import traces

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def program_ids(guard: Guard) -> list[int]:
    return [program["id"] for hook in guard.status()["ebpf"]["hooks"] for program in hook["programs"]]


def allowed_users(guard: Guard) -> list[tuple[str, list[int]]]:
    """The allowed user IDs of each lock."""
    locks = guard.status()["policy"]["locks"]
    return [(lock["name"], [user["id"] for user in lock["allow"]["users"]]) for lock in locks]


# --- start and stop -------------------------------------------------------------------------------------------------


def test_start_locks_and_stop_opens(guard: Guard) -> None:
    """The listed user and members by primary or supplementary group pass, root does not; IPv4, IPv6 and mapped."""
    everyone = [(ONE, 1, ()), (STRANGER, STAFF, ()), (STRANGER, 1, (7, STAFF, 99)), (STRANGER, 1, ()), (0, 0, ())]
    locked = (SERVICE, MAPPED, SERVICE_V6)

    def outcomes(to: str) -> list[str]:
        return [guard.reach(uid, to, gid=gid, groups=groups) for uid, gid, groups in everyone]

    assert outcomes(SERVICE) == ["connected"] * 5
    guard.start("--user", str(ONE), "--group", str(STAFF), "--ip", SERVICE, "--ip", SERVICE_V6)
    for to in locked:
        assert outcomes(to) == ["connected"] * 3 + ["EPERM"] * 2
    assert outcomes(NEIGHBOUR) == ["connected"] * 5
    assert guard("stop").answer.startswith("removed every hook, link and map from ")
    for to in locked:
        assert outcomes(to) == ["connected"] * 5
    assert traces(guard.sandbox.cgroup) == {"attached": 0, "pins": 0}


def test_a_command_that_fails_leaves_no_lock_file(guard: Guard) -> None:
    """A lock file of a cgroup is named after its ID, which never comes again: such files would pile up."""
    name = f"command-{os.stat(guard.sandbox.cgroup).st_ino}.lock"
    assert guard("allow", "--user", str(ONE)).status == 1
    guard.start()
    assert guard("allow", "--user", str(ONE), "--ip", "10.9.9.9").status == 2
    assert name not in os.listdir(lockfile.FOLDER)
    assert command.run(command.argv(["stop", "--cgroup", "/nowhere"])).status != 0
    assert "command.lock" in os.listdir(lockfile.FOLDER)


def test_stop_twice_is_harmless(guard: Guard) -> None:
    guard.start()
    assert guard("stop").status == 0
    assert guard("stop") == Result(0, "imds-guard was not active: nothing to remove\n", "")
    assert guard("stop").status == 0


def test_the_built_in_endpoints_are_the_default() -> None:
    """Their DNS is left alone. The credentials of containers are presets of their own, and left alone too."""
    aws, ecs, v6 = "169.254.169.254", "169.254.170.2", "fd00:ec2::254"
    with command.guard(addresses=(aws, ecs, v6)) as guard:
        guard.sandbox.serve((aws,), (53,))
        guard.start("--group", str(STAFF))
        assert [guard.reach(STRANGER, to) for to in (aws, v6, f"::ffff:{aws}", ecs)] == ["EPERM"] * 3 + ["connected"]
        assert guard.reach(STRANGER, aws, 53) == "connected"
        assert guard.reach(STRANGER, aws, 443) == "EPERM"
        assert guard.reach(STRANGER, aws, gid=STAFF) == "connected"
        (lock,) = guard.status()["policy"]["locks"]
        assert {aws, v6} <= set(lock["endpoints"])
        assert ecs not in lock["endpoints"]


def test_after_start_no_process_of_ours_stays(guard: Guard) -> None:
    """While the test is the subreaper (prctl(2)), it inherits every orphan and can wait for it."""

    def start_and_wait() -> Result:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        done = guard.start()
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        return done

    assert run_in_child(start_and_wait, timeout_s=command.TIMEOUT_S).status == 0
    assert guard.reach(STRANGER) == "EPERM"


def test_a_start_after_a_killed_start_is_whole(guard: Guard) -> None:
    """The first is killed when its first pin is there. tests/kernel/test_kill.py kills it at each step."""
    deadline = time.monotonic() + command.TIMEOUT_S
    while not killed_half_way(guard):  # start was quicker than we
        assert time.monotonic() < deadline
        assert guard("stop").status == 0
    assert guard.reach(STRANGER) == "connected", "nothing is locked before the policy is whole"
    guard.start()
    assert guard("status").status == 0
    assert guard.reach(STRANGER) == "EPERM"


def killed_half_way(guard: Guard) -> bool:
    """Starts, and kills the command when there is a pin; false when the policy came into force before that."""
    with subprocess.Popen(command.argv(guard.arguments("start", "--user", str(ONE), "--ip", SERVICE))) as process:
        while not traces(guard.sandbox.cgroup)["pins"]:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    return guard("status").status != 0


# --- a running guard ------------------------------------------------------------------------------------------------


def test_a_second_start_changes_the_policy_alone(guard: Guard) -> None:
    guard.start()
    before, ids = guard.status(), program_ids(guard)
    guard.start("--user", str(TWO), "--ip", SERVICE)
    after = guard.status()
    assert {before["ebpf"]["generation"], after["ebpf"]["generation"]} == {1, 2}
    assert program_ids(guard) == ids
    assert (guard.reach(ONE), guard.reach(TWO)) == ("EPERM", "connected")


def imported_by(words: Sequence[str], folder: Path, before: str = "") -> set[str]:
    """The top-level modules that a command had imported when it ended. The command must succeed."""
    noted = folder / "modules"
    note = f"import atexit; atexit.register(lambda: print(*sys.modules, file=open({str(noted)!r}, 'w')))"
    done = command.run(command.argv(words, before=f"{note}\n{before}"))
    assert done.status == 0, done
    return {name.split(".")[0] for name in noted.read_text().split()}


def test_a_change_of_policy_imports_no_compiler(guard: Guard, tmp_path: Path) -> None:
    """Importing bcc costs more than the change. Without the cache the first start needs it: the test would see it."""
    change = ("--user", str(TWO), "--ip", SERVICE)
    first = guard.arguments("start", "--user", str(ONE), "--ip", SERVICE)
    without = "from imds_guard.kernel.cache_folder import CacheFolder; CacheFolder.read = lambda *_: None"
    assert "bcc" in imported_by(first, tmp_path, without)
    guard("stop")
    assert "bcc" not in imported_by(first, tmp_path)
    for words in (("start", *change), ("revoke", *change), ("allow", *change), ("status",), ("stop",)):
        assert "bcc" not in imported_by(guard.arguments(*words), tmp_path)


def test_the_same_start_again_changes_nothing(guard: Guard) -> None:
    guard.start()
    before = guard.status()
    assert "the policy was in force already" in guard.start().stdout
    assert guard.status() == before


def test_two_starts_at_the_same_time(guard: Guard) -> None:
    """They run one after the other; the later one's policy is in force, whole."""
    running = [
        subprocess.Popen(command.argv(guard.arguments("start", "--user", str(user), "--ip", SERVICE)))
        for user in (ONE, TWO)
    ]
    assert [process.wait(command.TIMEOUT_S) for process in running] == [0, 0]
    assert guard("status").status == 0
    (only,) = allowed_users(guard)
    assert only in [("default", [ONE]), ("default", [TWO])]
    winner, loser = (ONE, TWO) if only[1] == [ONE] else (TWO, ONE)
    assert (guard.reach(winner), guard.reach(loser)) == ("connected", "EPERM")
    assert guard.status()["ebpf"]["hooks"][0]["programs"][0]["ours"] is True


def test_audit_mode_counts_and_denies_nobody(guard: Guard) -> None:
    started = guard.start("--mode", "audit", "--user", str(ONE), "--ip", SERVICE)
    assert "active in audit mode, which denies nobody" in started.stdout
    assert guard.reach(STRANGER) == "connected"
    counters = guard.status()["ebpf"]["counters"]
    assert counters["not-listed"] == {"enforced": 0, "audited": 1}
    assert "not-listed 1 (1 let through by audit mode)" in guard("status").answer


def test_counters_tell_what_was_decided(guard: Guard) -> None:
    guard.start()
    for caller in (ONE, STRANGER, STRANGER):
        guard.reach(caller)
    guard.reach(STRANGER, groups=(STAFF,))
    counters = {reason: found for reason, found in guard.status()["ebpf"]["counters"].items() if any(found.values())}
    assert counters == {
        "allowed-user": {"enforced": 1, "audited": 0},
        "allowed-group": {"enforced": 1, "audited": 0},
        "not-listed": {"enforced": 2, "audited": 0},
    }


def test_a_deny_list_alone_lets_the_rest_through(guard: Guard) -> None:
    guard.start("--deny-user", str(TWO), "--deny-group", str(STAFF), "--ip", SERVICE)
    assert (guard.reach(TWO), guard.reach(STRANGER), guard.reach(STRANGER, groups=(STAFF,))) == (
        "EPERM",
        "connected",
        "EPERM",
    )


def test_nobody_means_nobody(guard: Guard) -> None:
    started = guard.start("--nobody", "--ip", SERVICE)
    assert "warning: lock default lets nobody through, root included\n" in started.stderr
    assert (guard.reach(0), guard.reach(ONE)) == ("EPERM", "EPERM")


# --- status ---------------------------------------------------------------------------------------------------------


def test_the_exit_status_of_status(guard: Guard) -> None:
    """0 active, 1 degraded, 3 not active; start repairs."""
    assert (guard("status").status, guard.status()["state"]) == (3, "inactive")
    guard.start()
    assert (guard("status").status, guard.status()["state"]) == (0, "active")
    _detach(guard, "connect6")
    degraded = guard("status")
    assert (degraded.status, degraded.stderr) == (1, "")
    assert "fault: the hook connect6 is not attached" in degraded.stdout
    assert guard.status()["state"] == "degraded"
    guard.start()
    assert guard("status").status == 0
    assert guard("stop").status == 0
    assert guard("status").status == 3


def _detach(guard: Guard, hook: str) -> None:
    pins = guard.status()["ebpf"]["pins"]
    fd = bpf.pinned(f"{pins}/link_{hook}")
    try:
        bpf.link_detach(fd)
    finally:
        os.close(fd)


def test_the_status_of_a_cgroup_that_is_not_there_is_unknown() -> None:
    result = command.imds_guard_command("status", "--json", "--cgroup", "/sys/fs/cgroup/imds-guard-is-not-here")
    assert result.status == 4
    assert "ENOENT" in result.sentence


def test_status_names_the_pins_of_this_cgroup(guard: Guard) -> None:
    """The folder that status names is the one in bpffs."""
    guard.start()
    found = guard.status()["ebpf"]
    assert found["cgroup"] == guard.sandbox.cgroup
    assert found["cgroup_is_root"] is False
    assert os.path.dirname(found["pins"]) == bpffs.find_bpffs()
    assert str(os.stat(guard.sandbox.cgroup).st_ino) in found["pins"]
    assert traces(guard.sandbox.cgroup) == {"attached": 4, "pins": 1}


# --- allow and revoke -----------------------------------------------------------------------------------------------


def test_allow_and_revoke_take_effect(guard: Guard) -> None:
    guard.start()
    ids = program_ids(guard)
    allowed = guard("allow", "--user", str(TWO), "--group", "51002")
    assert allowed.answer.splitlines()[:2] == [f"+ user {TWO}", "+ group 51002"]
    assert "not saved" in allowed.answer
    assert [guard.reach(ONE), guard.reach(TWO), guard.reach(STRANGER, groups=(51_002,))] == ["connected"] * 3
    assert guard("revoke", "--user", str(ONE), "--group", "51002").status == 0
    assert [guard.reach(ONE), guard.reach(TWO), guard.reach(STRANGER, groups=(51_002,))] == [
        "EPERM",
        "connected",
        "EPERM",
    ]
    assert program_ids(guard) == ids
    assert allowed_users(guard) == [("default", [TWO])]


def test_allowing_a_listed_user_changes_nothing(guard: Guard) -> None:
    guard.start()
    before = guard.status()
    assert "the policy says so already" in guard("allow", "--user", str(ONE)).answer
    assert "the policy says so already" in guard("revoke", "--user", str(STRANGER)).answer
    assert guard.status() == before


def test_allow_at_one_endpoint_splits_the_lock(guard: Guard) -> None:
    guard.start("--user", str(ONE), "--ip", SERVICE, "--ip", NEIGHBOUR)
    assert guard("allow", "--user", str(TWO), "--ip", f"{SERVICE}:80").status == 0
    assert [guard.reach(TWO, SERVICE, 80), guard.reach(TWO, SERVICE, 443), guard.reach(TWO, NEIGHBOUR)] == [
        "connected",
        "EPERM",
        "EPERM",
    ]
    assert [guard.reach(ONE, SERVICE, 80), guard.reach(ONE, SERVICE, 443), guard.reach(ONE, NEIGHBOUR)] == [
        "connected"
    ] * 3
    assert allowed_users(guard) == [(SERVICE, [ONE, TWO]), ("default", [ONE])]


def test_revoke_at_one_endpoint_splits_the_lock(guard: Guard) -> None:
    guard.start("--user", str(ONE), "--user", str(TWO), "--ip", SERVICE, "--ip", NEIGHBOUR)
    assert guard("revoke", "--user", str(TWO), "--ip", SERVICE).status == 0
    assert (guard.reach(TWO, SERVICE), guard.reach(TWO, NEIGHBOUR)) == ("EPERM", "connected")
    assert allowed_users(guard) == [(SERVICE, [ONE]), ("default", [ONE, TWO])]


def test_allow_everywhere_needs_equal_allowlists(guard: Guard) -> None:
    """Where they differ, the error names the locks and nothing changes."""
    guard.start("--user", str(ONE), "--ip", SERVICE, "--ip", NEIGHBOUR)
    guard("allow", "--user", str(TWO), "--ip", NEIGHBOUR)
    before = guard.status()
    for change in ("allow", "revoke"):
        result = guard(change, "--user", str(STRANGER))
        assert result.status == 2
        assert result.sentence == (
            "the locks have different allowlists: choose one "
            f"('{NEIGHBOUR}': --ip {NEIGHBOUR}; 'default': --ip {SERVICE})"
        )
    assert guard.status() == before
    guard("revoke", "--user", str(TWO), "--ip", NEIGHBOUR)
    assert guard("allow", "--user", str(STRANGER)).status == 0
    assert (guard.reach(STRANGER, SERVICE), guard.reach(STRANGER, NEIGHBOUR)) == ("connected", "connected")


def test_revoking_the_last_one_warns(guard: Guard) -> None:
    guard.start("--user", str(ONE), "--ip", SERVICE)
    revoked = guard("revoke", "--user", str(ONE))
    assert revoked.status == 0
    # There is a second warning where the host hides a network namespace that could hold connections.
    assert revoked.stderr.splitlines()[0] == "warning: lock default lets nobody through, root included"
    assert guard.reach(ONE) == "EPERM"
    assert guard("status").status == 0


def test_revoking_under_a_default_that_allows_is_refused(guard: Guard) -> None:
    """Nobody needs to be on that allowlist: the user would still get through."""
    guard.start("--deny-user", str(TWO), "--ip", SERVICE)
    before = guard.status()
    result = guard("revoke", "--user", str(ONE))
    assert result.status == 2
    assert "--deny-user" in result.sentence
    assert guard.status() == before


def test_allowing_a_denied_user_is_refused(guard: Guard) -> None:
    guard.start("--user", str(ONE), "--deny-user", str(TWO), "--ip", SERVICE)
    before = guard.status()
    result = guard("allow", "--user", str(TWO))
    assert result.status == 78
    assert result.sentence == (
        f"user {TWO} is on the deny list of lock 'default', which wins: take it out of deny_users and reload, or start "
        f"again without --deny-user {TWO}"
    )
    assert guard.status() == before


@pytest.mark.parametrize("change", ["allow", "revoke"])
def test_a_change_is_refused_where_nothing_is_active(guard: Guard, change: str) -> None:
    result = guard(change, "--user", str(ONE))
    assert result.status == 1
    assert "nothing is locked" in result.sentence
    assert traces(guard.sandbox.cgroup) == {"attached": 0, "pins": 0}


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain_a_process(guard: Guard) -> None:
    """The answer is what the kernel does: the process itself tries to connect."""
    guard.start()

    def try_and_explain(*ids: int) -> tuple[str, int, bool, str]:
        uid, gid, *groups = ids
        with process_of(uid, gid, groups) as pid:
            explained = guard("explain", "--pid", str(pid), f"{SERVICE}:80", "--json")
        values = explained.values
        return guard.reach(uid, gid=gid, groups=groups), explained.status, values["allowed"], values["reason"]

    assert try_and_explain(ONE, 1) == ("connected", 0, True, "allowed-user")
    assert try_and_explain(STRANGER, 1, 7, STAFF) == ("connected", 0, True, "allowed-group")
    assert try_and_explain(STRANGER, 1) == ("EPERM", 1, False, "not-listed")


@contextmanager
def process_of(uid: int, gid: int, groups: Sequence[int] = ()) -> Iterator[int]:
    """The process ID of a program that runs with these IDs until the end of the block."""
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, user=uid, group=gid, extra_groups=groups) as process:
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


def test_the_exit_status_of_explain(guard: Guard) -> None:
    """0 it passes, also in audit mode; 1 denied; 3 nothing is locked; 4 could not tell."""
    asked = ("explain", "--user", "nobody", SERVICE)
    nothing = guard(*asked)
    assert (nothing.status, nothing.sentence) == (3, "nothing is locked: run imds-guard start first")
    guard.start()
    denied = guard(*asked)
    assert (denied.status, denied.stdout.splitlines()[0]) == (1, "denied: not-listed")
    assert "imds-guard allow --user nobody" in denied.stdout
    assert guard("explain", "--user", "nobody", NEIGHBOUR).status == 0
    gone = guard("explain", "--pid", "4194303", SERVICE)
    assert (gone.status, gone.sentence) == (4, "there is no process 4194303")
    guard("start", "--user", str(ONE), "--ip", SERVICE, "--mode", "audit")
    audited = guard(*asked)
    assert (audited.status, audited.stdout.splitlines()[0]) == (0, "allowed: not-listed")
    assert "audit mode lets it through" in audited.answer


def test_explain_knows_when_a_process_is_older_than_its_groups(guard: Guard) -> None:
    """The account "daemon" has the group 1 alone. A process keeps the groups that it was started with."""
    guard("start", "--group", "daemon", "--ip", SERVICE)
    with process_of(1, 2) as pid:
        older = guard("explain", "--pid", str(pid), SERVICE)
        assert older.status == 1
        assert "a new process of this user would pass" in " ".join(older.stdout.split())
        assert guard("explain", "--pid", str(pid), SERVICE, "--json").values["new_process"] == "would-pass"
    with process_of(2, 1) as pid:
        lost = guard("explain", "--pid", str(pid), SERVICE)
        assert lost.status == 0
        assert "a new process of this user would be denied" in " ".join(lost.stdout.split())
    with process_of(1, 1) as pid:
        assert "a new process" not in " ".join(guard("explain", "--pid", str(pid), SERVICE).stdout.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stat",), "there is no command 'stat'; did you mean status?"),
        (("hello-world",), "there is no command 'hello-world' (see"),
        (("start", "--grup", "root"), "--group"),
        (("start", "--group", "rooot"), "there is no group 'rooot'; did you mean root?"),
        (("start", "--user", "nobodyy"), "there is no user 'nobodyy'; did you mean nobody?"),
        (("start", "--user", "quite-another"), "there is no user 'quite-another'. To make one: useradd"),
        (("start", "--user", "0", "--preset", "awss"), "there is no preset 'awss'; did you mean aws?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_word_with_a_typo(guard: Guard, words: tuple[str, ...], said: str) -> None:
    """The nearest name is said, where one is near."""
    result = guard(*words) if len(words) > 1 else command.imds_guard_command(*words)
    assert result.status in (2, 78)
    assert said in result.sentence


def test_explain_a_user_as_text(guard: Guard) -> None:
    guard.start("--user", "root", "--ip", SERVICE)
    lines = guard("explain", "--user", "root", f"{SERVICE}:443").answer.splitlines()
    assert lines[0] == "allowed: allowed-user"
    assert "  lock:        default" in lines
    assert "  by:          user root (0) on the list" in lines
    assert guard("explain", "--user", "root", NEIGHBOUR).answer.startswith("allowed: not-locked\n")


def test_changes_at_the_same_time_are_all_made(guard: Guard) -> None:
    """Each command reads the policy and writes it: none may overwrite what another has just added."""
    guard.start()
    users = [42_001 + n for n in range(6)]
    running = [subprocess.Popen(command.argv(guard.arguments("allow", "--user", str(user)))) for user in users]
    assert [process.wait(command.TIMEOUT_S) for process in running] == [0] * len(users)
    ((_, allowed),) = allowed_users(guard)
    assert allowed == [ONE, *users]


# --- --save ---------------------------------------------------------------------------------------------------------


def test_allow_saves_what_start_reads(guard: Guard, tmp_path: Path) -> None:
    """The saved policy comes into force again, whatever was in force meanwhile."""
    file = str(tmp_path / "saved config.toml")
    guard.start()
    allowed = guard("allow", "--user", str(TWO), "--save", "--without-root", "--config", file)
    assert f"saved the policy to {file}" in " ".join(allowed.answer.split("\n"))
    assert "until the next boot" not in allowed.answer
    wanted = guard.status()["policy"]
    guard.start("--user", str(STRANGER), "--ip", NEIGHBOUR)
    guard.start("--config", file)
    assert guard.status()["policy"] == wanted
    assert (guard.reach(TWO), guard.reach(STRANGER), guard.reach(STRANGER, NEIGHBOUR)) == (
        "connected",
        "EPERM",
        "connected",
    )


def test_start_with_a_file_and_a_mode(guard: Guard, tmp_path: Path) -> None:
    """--mode and --containers say neither who nor where, so they go with a file."""
    file = tmp_path / "config.toml"
    file.write_text(f'[lock."two words"]\nendpoints = ["{SERVICE}"]\nusers = [{ONE}]\n')
    guard.start("--config", str(file), "--mode", "audit", "--containers", "allow")
    policy = guard.status()["policy"]
    assert (policy["mode"], policy["containers"]) == ("audit", "allow")
    assert [lock["name"] for lock in policy["locks"]] == ["two words"]
    assert "lock two words\n" in guard("status").answer


def test_save_keeps_what_the_policy_does_not_say(guard: Guard, tmp_path: Path) -> None:
    """on_error and the backend belong to the file, not to the policy in force."""
    file = tmp_path / "config.toml"
    file.write_text(f'on_error = "open"\nbackend = "ebpf"\n[lock.a]\nusers = [{ONE}]\nendpoints = ["{SERVICE}"]\n')
    assert guard("start", "--config", str(file)).status == 0
    assert guard("allow", "--user", str(TWO), "--save", "--without-root", "--config", str(file)).status == 0
    saved = file.read_text()
    assert 'on_error = "open"' in saved
    assert 'backend = "ebpf"' in saved
    assert str(TWO) in saved


def test_check_says_that_a_file_is_fine(guard: Guard, tmp_path: Path) -> None:
    """Or names the line: as the command that validates a file before it is installed."""
    file = tmp_path / "config.toml"
    file.write_text(f'[lock.web]\nendpoints = ["{SERVICE}", "{NEIGHBOUR}"]\nusers = ["root"]\n', encoding="utf-8")
    fine = guard("check", "--config", str(file))
    assert " ".join(fine.answer.split()).startswith(f"{file} is fine: 1 lock, 2 endpoints ebpf: ")
    assert guard("check", "--config", str(file), "--json").values["configuration"] == str(file)
    file.write_text(f'[lock.web]\nendpoints = ["{SERVICE}"]\ngroops = ["root"]\n', encoding="utf-8")
    wrong = guard("check", "--config", str(file))
    assert (wrong.status, wrong.stdout) == (78, "")
    assert wrong.sentence.startswith(f"{file}:3: unknown key 'groops' in lock 'web'; did you mean groups?")
