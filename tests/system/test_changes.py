# SPDX-License-Identifier: Apache-2.0
"""No command opens the lock by surprise: what differs is printed, asked for, and logged."""

from __future__ import annotations

import os
import pty
import select
import socket
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imds_guard.commands.turn import lock_name
from imds_guard.errors import GuardError
from imds_guard.kernel import journal, lockfile
from imds_guard.text import escaped
from tests import command
from tests.command import NEIGHBOUR, ONE, SERVICE, STRANGER, TIMEOUT_S, TWO, Guard, Result
from tests.kernel.clients import wait_until
from tests.kernel.guards import folder_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

BOTH = ("--user", str(ONE), "--ip", SERVICE, "--ip", NEIGHBOUR)
FEWER = ("--user", str(ONE), "--ip", SERVICE)


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def reached(guard: Guard, *uids: int, to: str = SERVICE) -> list[int]:
    return [uid for uid in uids if guard.reach(uid, to) == "connected"]


def in_one_line(text: str) -> str:
    """Lines are wrapped for people."""
    return " ".join(text.split())


# --- what differs -----------------------------------------------------------------------------------------------------


def test_each_command_prints_what_differs(guard: Guard) -> None:
    assert f"now locked: {SERVICE} and 1 more\n+ user {ONE}\n" in guard.start(*BOTH).stdout
    assert f"+ user {TWO}\n" in guard("allow", "--user", str(TWO)).answer
    assert f"- user {TWO} at {SERVICE}\n" in guard("revoke", "--user", str(TWO), "--ip", SERVICE).answer
    assert "+ user" not in guard("allow", "--user", str(ONE), "--ip", SERVICE).answer
    fewer = guard.start(*FEWER)
    assert f"no longer locked: {NEIGHBOUR}\n" in fewer.stdout
    assert f"warning: this locks less than now: no longer locked: {NEIGHBOUR}\n" in fewer.stderr


def test_who_loses_a_right_by_a_start_is_named_before_it_does(guard: Guard) -> None:
    guard.start("--user", str(ONE), "--user", str(TWO), "--ip", SERVICE)
    done = guard.start(*FEWER)
    assert f"warning: this takes rights away: - user {TWO}\n" in done.stderr
    assert reached(guard, ONE, TWO) == [ONE]
    assert "takes rights away" not in guard.start(*FEWER).stderr


def test_json_has_the_difference(guard: Guard) -> None:
    values = guard.start(*BOTH, "--json").values
    assert values["difference"]["locked"] == [SERVICE, NEIGHBOUR]
    assert (values["difference"]["locks_less"], values["dry_run"]) == (False, False)
    values = guard("allow", "--user", str(TWO), "--json").values
    (entry,) = values["difference"]["lists"]
    assert (entry["list"], entry["change"], entry["endpoints"]) == ("allow", "added", None)
    assert [user["id"] for user in entry["users"]] == [TWO]
    assert guard.start(*FEWER, "--json").values["difference"]["locks_less"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("start", *FEWER), f"no longer locked: {NEIGHBOUR}"),
        (("allow", "--user", str(TWO)), f"+ user {TWO}"),
        (("revoke", "--user", str(ONE)), f"- user {ONE}"),
        (("mode", "audit"), "mode: enforce -> audit"),
    ],
)
def test_a_dry_run_changes_nothing(guard: Guard, words: tuple[str, ...], says: str) -> None:
    guard.start(*BOTH)
    before = guard.status()
    done = guard(words[0], *words[1:], "--dry-run")
    assert says in done.answer.splitlines()
    assert done.stdout.endswith("nothing was changed (--dry-run)\n")
    values = guard(words[0], *words[1:], "--dry-run", "--json").values
    assert values["dry_run"]
    assert guard.status() == before


def test_a_dry_run_of_ip_lockdown_and_of_a_first_start(guard: Guard) -> None:
    arguments = ("--cgroup", guard.sandbox.cgroup, "--dry-run", SERVICE, str(ONE))
    done = command.run(command.argv(arguments, entry="ip_lockdown"))
    assert done.answer == f"now locked: {SERVICE}\n+ user {ONE}\nnothing was changed (--dry-run)\n"
    assert "now locked" in guard("start", *BOTH, "--dry-run").answer
    assert guard("status").status == 3
    missing = guard("start", "--group", "there-is-none", "--create-group", "--dry-run")
    assert (missing.status, "there-is-none" in missing.sentence) == (2, True)


def test_a_dry_run_says_no_where_the_change_would_fail(guard: Guard, tmp_path: Path) -> None:
    guard.start(*BOTH)
    assert guard("allow", "--user", "nobody-of-that-name", "--dry-run").status == 78
    config = tmp_path / "config.toml"
    done = guard("allow", "--user", str(TWO), "--save", "--without-root", "--config", str(config), "--dry-run")
    assert f"would save the policy to {config}" in in_one_line(done.answer)
    assert not config.exists()


# --- how long it holds ------------------------------------------------------------------------------------------------


def test_whether_a_change_is_saved_is_always_said(guard: Guard, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    words = ("--config", str(config))
    guard.start(*BOTH)
    unsaved = in_one_line(guard("allow", "--user", str(TWO), *words).answer)
    assert f"not saved, and there is no {config}: it holds until the next boot; --save keeps it" in unsaved
    saved = in_one_line(guard("mode", "enforce", *words, "--save", "--without-root").answer)
    assert f"saved the policy to {config}" in saved
    unsaved = in_one_line(guard("mode", "audit", *words).answer)
    assert f"not saved: it holds until {config} is loaded again (boot, reload, restart, upgrade)" in unsaved
    assert "not saved" not in guard.start("--config", str(config)).stdout
    assert "not saved" in guard.start("--config", str(config), "--mode", "audit").stdout


# --- mode -------------------------------------------------------------------------------------------------------------


def test_mode_changes_how_it_is_enforced_and_keeps_the_lists(guard: Guard) -> None:
    guard.start(*BOTH, "--mode", "audit")
    guard("allow", "--user", str(TWO))
    before = guard.status()["policy"]
    assert reached(guard, ONE, TWO, STRANGER) == [ONE, TWO, STRANGER]
    assert "mode: audit -> enforce\n" in guard("mode", "enforce").answer
    assert reached(guard, ONE, TWO, STRANGER) == [ONE, TWO]
    assert guard.status()["policy"] == {**before, "mode": "enforce"}
    done = guard("mode", "audit")
    assert "warning: this locks less than now: mode: enforce -> audit\n" in done.stderr
    assert reached(guard, STRANGER) == [STRANGER]
    assert "says so already" in guard("mode", "audit").answer


def test_mode_without_a_guard_and_with_another_word(guard: Guard) -> None:
    assert guard("mode", "enforce").status == 1
    assert guard("mode", "off").status == 2


# --- the question -----------------------------------------------------------------------------------------------------


class Terminal:
    """A command whose standard input and standard error are a terminal."""

    def __init__(self, *words: str, before: str = "", stopped: bool = False) -> None:
        """``stopped``: somebody has pressed Ctrl-S."""
        self._master, slave = pty.openpty()
        try:
            argv = command.argv(words, before=before)
            if stopped:
                termios.tcflow(slave, termios.TCOOFF)
            self._process = subprocess.Popen(argv, stdin=slave, stderr=slave, stdout=subprocess.PIPE, text=True)
        finally:
            self._slave = slave
        self.said = ""

    def resume(self) -> None:
        """As Ctrl-Q does."""
        termios.tcflow(self._slave, termios.TCOON)

    def read_until(self, text: str) -> None:
        """Waits until the command has printed that."""
        while text not in self.said:
            assert select.select([self._master], [], [], TIMEOUT_S)[0], self.said
            self.said += os.read(self._master, 4096).decode()

    def answer(self, text: str) -> None:
        """Types a line."""
        os.write(self._master, f"{text}\n".encode())

    def end(self) -> Result:
        """The exit status and output. The terminal is read until the command has closed it (EIO)."""
        os.close(self._slave)
        while True:
            try:
                part = os.read(self._master, 4096).decode()
            except OSError:
                part = ""
            if not part:
                break
            self.said += part
        stdout, _ = self._process.communicate(timeout=TIMEOUT_S)
        os.close(self._master)
        return Result(self._process.returncode, stdout, self.said)


QUESTION = "[y/N] "


def test_a_terminal_that_is_stopped_keeps_nobody_waiting(guard: Guard) -> None:
    """Ctrl-S stops what the command says. It must stop neither the change nor the commands that wait for their turn."""
    terminal = Terminal(*guard.arguments("start", *BOTH), stopped=True)
    try:
        wait_until(lambda: guard("status").status == 0)
        guard("revoke", "--user", str(ONE))
        assert reached(guard, ONE) == []
    finally:
        terminal.resume()
    done = terminal.end()
    assert (done.status, "compiling" in done.stderr) == (0, True)


@pytest.mark.parametrize(("answer", "agrees"), [("y", True), ("Yes", True), ("n", False), ("", False), ("x", False)])
def test_a_change_that_unlocks_asks(guard: Guard, answer: str, agrees: bool) -> None:
    guard.start(*BOTH)
    terminal = Terminal(*guard.arguments("start", *FEWER))
    terminal.read_until(QUESTION)
    assert f"no longer locked: {NEIGHBOUR}" in terminal.said
    assert reached(guard, STRANGER, to=NEIGHBOUR) == [], "nothing is changed before the answer"
    terminal.answer(answer)
    done = terminal.end()
    assert done.status == (0 if agrees else 1)
    assert ("nothing was changed" in done.stderr) == (not agrees)
    assert reached(guard, STRANGER, to=NEIGHBOUR) == ([STRANGER] if agrees else [])
    assert done.stderr.count("locks less than now") == 1


def a_map(guard: Guard) -> Path:
    """A pin without which nobody can read the policy in force."""
    return Path(folder_of(guard.sandbox.cgroup).path, "members")


@pytest.mark.parametrize(("answer", "agrees"), [("y", True), ("n", False)])
def test_what_cannot_be_compared_is_asked_for(guard: Guard, answer: str, agrees: bool) -> None:
    """The maps are damaged: the new policy may lock less, and nobody can tell."""
    guard.start(*BOTH)
    a_map(guard).unlink()
    terminal = Terminal(*guard.arguments("start", *FEWER))
    terminal.read_until(QUESTION)
    assert "what is in force can't be read" in in_one_line(terminal.said)
    assert reached(guard, STRANGER, to=NEIGHBOUR) == []
    terminal.answer(answer)
    done = terminal.end()
    assert (done.status, "nothing was changed" in done.stderr) == ((0, False) if agrees else (1, True))
    assert reached(guard, STRANGER, to=NEIGHBOUR) == ([STRANGER] if agrees else [])
    assert done.stderr.count("what is in force can't be read") == 1


def test_what_cannot_be_read_any_more_is_not_changed_unasked(guard: Guard) -> None:
    """When the question would have been asked, it could be read."""
    guard.start(*FEWER)
    meanwhile = (
        "from imds_guard.cli import consent; import os; ask = consent.Consent.ask; "
        f"consent.Consent.ask = lambda *a: (ask(*a), os.unlink({str(a_map(guard))!r}))"
    )
    done = Terminal(*guard.arguments("start", *FEWER), before=meanwhile).end()
    assert (done.status, "another command changed the policy" in in_one_line(done.stderr)) == (1, True)


def test_a_dry_run_says_that_it_cannot_compare(guard: Guard) -> None:
    guard.start(*BOTH)
    a_map(guard).unlink()
    done = guard("start", *FEWER, "--dry-run")
    assert (done.status, "can't be read" in done.stderr, "nothing would change" in done.stdout) == (0, True, False)
    assert guard("start", *FEWER, "--dry-run", "--json").values["difference"] is None
    done = guard.start(*FEWER)
    assert done.stderr.count("before could not be read") == 1


def test_no_answer_is_no(guard: Guard) -> None:
    guard.start(*BOTH)
    terminal = Terminal(
        *guard.arguments("mode", "audit"), before="from imds_guard.cli import consent; consent.ANSWER_WITHIN_S = 0.5"
    )
    assert terminal.end().status == 1
    assert QUESTION in terminal.said
    assert reached(guard, STRANGER) == []


@pytest.mark.parametrize(
    "words",
    [
        ("start", *FEWER, "--yes"),
        ("start", *FEWER, "--json"),
        ("start", *FEWER, "--dry-run"),
        ("start", *BOTH, "--ip", "10.9.9.9"),
        ("mode", "audit", "--yes"),
        ("revoke", "--user", str(ONE)),
        ("allow", "--user", str(TWO)),
        ("stop",),
    ],
)
def test_these_do_not_ask(guard: Guard, words: tuple[str, ...]) -> None:
    guard.start(*BOTH)
    terminal = Terminal(*guard.arguments(*words))
    assert terminal.end().status == 0, terminal.said
    assert QUESTION not in terminal.said


def test_the_end_of_the_emergency_lock_is_not_asked_for(guard: Guard, tmp_path: Path) -> None:
    """It locks every built-in endpoint: nearly each configuration locks less, and everybody waits for it."""
    bad = tmp_path / "config.toml"
    bad.write_text("nonsense", encoding="ascii")
    assert guard("start", "--boot", "--config", str(bad)).status == 78
    assert guard.status()["emergency"]
    terminal = Terminal(*guard.arguments("start", *FEWER))
    assert terminal.end().status == 0
    assert QUESTION not in terminal.said
    assert "locks less" not in terminal.said


def test_another_change_during_the_question_is_not_what_was_asked(guard: Guard) -> None:
    guard.start(*BOTH)
    terminal = Terminal(*guard.arguments("start", *FEWER))
    terminal.read_until(QUESTION)
    guard.start(*BOTH, "--ip", "10.9.9.9")
    terminal.answer("y")
    done = terminal.end()
    assert done.status == 1
    assert "another command changed the policy" in in_one_line(done.stderr)
    assert reached(guard, STRANGER, to=NEIGHBOUR) == []


def test_a_change_that_opens_only_since_another_command_is_not_made_unasked(guard: Guard) -> None:
    """When the question would have been asked there was none: the policy was the same."""
    guard.start(*FEWER)
    other = guard.arguments("start", *BOTH)
    meanwhile = (
        "from imds_guard.cli import consent; import subprocess; ask = consent.Consent.ask; "
        f"consent.Consent.ask = lambda *a: (ask(*a), subprocess.run({command.argv(other)!r}, check=True))"
    )
    done = Terminal(*guard.arguments("start", *FEWER), before=meanwhile).end()
    assert (done.status, "another command changed the policy" in in_one_line(done.stderr)) == (1, True)
    assert reached(guard, STRANGER, to=NEIGHBOUR) == []


# --- the audit trail --------------------------------------------------------------------------------------------------


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(path))
        one.settimeout(TIMEOUT_S)
        yield one


def logged(guard: Guard, path: Path, words: tuple[str, ...], environment: dict[str, str] | None = None) -> Result:
    """Runs a command that has the journal's socket at ``path``/journal, and syslog's at ``path``/syslog."""
    sockets = f"journal.JOURNAL, journal.SYSLOG = {str(path / 'journal')!r}, {str(path / 'syslog')!r}"
    before = f"from imds_guard.kernel import journal; {sockets}"
    return command.run(command.argv(guard.arguments(*words), before=before), environment)


def send_for_ever(one: socket.socket) -> None:
    while True:
        one.send(b"x")


def test_each_change_is_a_line_in_the_journal(guard: Guard, tmp_path: Path) -> None:
    """By the native protocol. A command that changes nothing writes nothing."""
    with listening(tmp_path / "journal") as journald:

        def entry(*words: str) -> dict[str, str]:
            assert logged(guard, tmp_path, words, {"SUDO_UID": "1000", "SUDO_USER": "jane"}).status == 0
            lines = journald.recv(65536).decode().splitlines()
            return dict(line.split("=", 1) for line in lines)

        first = entry("start", *BOTH)
        assert (first["SYSLOG_IDENTIFIER"], first["PRIORITY"], first["IMDS_GUARD_COMMAND"]) == (
            "imds-guard",
            "5",
            "start",
        )
        allowed = entry("allow", "--user", str(TWO))
        assert allowed["IMDS_GUARD_CHANGE"] == f"+ user {TWO}"
        assert "command=allow" in allowed["MESSAGE"]
        assert "sudo_uid=1000 sudo_user=jane" in allowed["MESSAGE"]
        assert 'uid="root (0)"' in allowed["MESSAGE"]
        assert " login=" in allowed["MESSAGE"]
        assert allowed["MESSAGE"].endswith(f": + user {TWO}")
        logged(guard, tmp_path, ("allow", "--user", str(TWO)))
        logged(guard, tmp_path, ("revoke", "--user", str(TWO), "--dry-run"))
        assert entry("revoke", "--user", str(TWO))["IMDS_GUARD_CHANGE"] == f"- user {TWO}"
        assert entry("mode", "audit")["IMDS_GUARD_COMMAND"] == "mode audit"
        assert "no longer locked" in entry("stop")["IMDS_GUARD_CHANGE"]


def test_without_a_journal_the_line_goes_to_syslog(guard: Guard, tmp_path: Path) -> None:
    with listening(tmp_path / "syslog") as syslogd:
        assert logged(guard, tmp_path, ("start", *BOTH)).status == 0
        line = syslogd.recv(65536).decode()
    assert line.startswith("<85>imds-guard[")
    assert "policy changed: command=start guard=" in line


def test_without_either_nothing_breaks(guard: Guard, tmp_path: Path) -> None:
    done = logged(guard, tmp_path, ("start", *BOTH))
    assert (done.status, "log" in done.stderr) == (0, False)


def fill(path: Path) -> None:
    """Everybody may do that to the socket of the journal and of syslog."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
        flood.setblocking(False)
        flood.connect(str(path))
        with pytest.raises(BlockingIOError):
            send_for_ever(flood)


def test_a_log_that_takes_nothing_is_named_and_holds_up_nobody(guard: Guard, tmp_path: Path) -> None:
    with listening(tmp_path / "journal"):
        fill(tmp_path / "journal")
        done = logged(guard, tmp_path, ("start", *BOTH))
    assert done.status == 0
    assert "warning: the change is in force, and is missing in the log" in done.stderr
    assert reached(guard, STRANGER) == []


def test_a_log_that_takes_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever logs holds the commands' lock."""
    monkeypatch.setattr(journal, "JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setattr(journal, "SYSLOG", str(tmp_path / "none"))
    with listening(tmp_path / "journal"):
        fill(tmp_path / "journal")
        begin = time.monotonic()
        for _ in range(10):
            with pytest.raises(GuardError, match="the queue is full"):
                journal.log("line", {})
    assert time.monotonic() - begin < 5


def test_where_the_journal_takes_nothing_the_line_goes_to_syslog(guard: Guard, tmp_path: Path) -> None:
    with listening(tmp_path / "journal"), listening(tmp_path / "syslog") as syslogd:
        fill(tmp_path / "journal")
        done = logged(guard, tmp_path, ("start", *BOTH))
        assert "policy changed: command=start" in syslogd.recv(65536).decode()
    assert (done.status, "missing in the log" in done.stderr) == (0, False)


def test_nothing_that_the_caller_chose_gets_raw_into_the_log(guard: Guard, tmp_path: Path) -> None:
    evil = "x\nPRIORITY=0\x1b[2J\u202e"
    with listening(tmp_path / "journal") as journald:
        assert logged(guard, tmp_path, ("start", *BOTH), {"SUDO_UID": evil, "SUDO_USER": evil + "y" * 5000}).status == 0
        content = journald.recv(65536)
    lines = content.decode().splitlines()
    assert [line for line in lines if line.startswith("PRIORITY=")] == ["PRIORITY=5"]
    assert b"\x1b" not in content
    assert escaped("\u202e") in content.decode()
    assert len(content) < 4 * journal.MAX_BYTES
    assert "y" * 100 not in content.decode()


# --- for a time only --------------------------------------------------------------------------------------------------

_NO_TIMER = """
from imds_guard.commands import temporary
temporary.require_timers = lambda: None
temporary.start_timer = lambda seconds, cgroup: NAME
"""


def allow_for(guard: Guard, span: str, *words: str, timer: str = "first") -> Result:
    """As where systemd is the init, but no timer runs: the test does what the timer would do."""
    arguments = guard.arguments("allow", "--for", span, *words)
    return command.run(command.argv(arguments, before=_NO_TIMER.replace("NAME", repr(timer))))


def test_where_no_timer_can_take_it_back_it_is_refused(guard: Guard) -> None:
    """The tests run from a source tree, too. vagrant/guest/test_5_service.py has the real timer."""
    guard.start(*BOTH)
    done = guard("allow", "--user", str(TWO), "--for", "15m")
    assert (done.status, done.sentence.startswith("allowing for a time only: ")) == (69, True)
    assert reached(guard, TWO) == []


@pytest.mark.parametrize("words", [("--for", "15"), ("--for", "0s"), ("--for", "40d"), ("--for", "1h", "--save")])
def test_a_wrong_time_is_a_usage_error(guard: Guard, words: tuple[str, ...]) -> None:
    guard.start(*BOTH)
    assert guard("allow", "--user", str(TWO), *words).status == 2
    assert reached(guard, TWO) == []


def test_the_timer_takes_back_what_was_added_and_nothing_else(guard: Guard) -> None:
    guard.start("--user", str(ONE), "--ip", SERVICE, "--ip", NEIGHBOUR)
    guard("allow", "--user", str(TWO), "--ip", SERVICE)
    done = allow_for(guard, "15m", "--user", str(ONE), "--user", str(TWO), "--ip", NEIGHBOUR)
    assert f"+ user {TWO} at {NEIGHBOUR}\n" in done.answer
    assert "this ends at " in done.stdout
    (entry,) = guard.status()["temporary"]
    assert ([user["id"] for user in entry["users"]], entry["endpoints"]) == ([TWO], [NEIGHBOUR])
    assert "\nuntil " in guard("status").answer
    taken = guard("revoke", "--timer", "first")
    assert f"- user {TWO} at {NEIGHBOUR}\n" in taken.answer
    assert [reached(guard, ONE, TWO, to=to) for to in (SERVICE, NEIGHBOUR)] == [[ONE, TWO], [ONE]]
    assert guard.status()["temporary"] == []
    assert guard("revoke", "--timer", "first").answer == "nothing is left to take back\n"


def test_a_timer_that_ends_before_the_change_leaves_no_right_for_ever(guard: Guard) -> None:
    """Another command held the lock for that long, or somebody stopped this one (Ctrl-Z)."""
    guard.start(*BOTH)
    late = (
        _NO_TIMER.replace("NAME", "''")
        + "import threading; temporary.start_timer = lambda s, _: threading.Event().wait(s) or 'late'"
    )
    done = command.run(command.argv(guard.arguments("allow", "--for", "1s", "--user", str(TWO)), before=late))
    assert (done.status, done.sentence.startswith("the time was over before anybody was allowed")) == (1, True)
    assert reached(guard, TWO) == []
    allow_for(guard, "15m", "--user", str(TWO))
    again = command.run(command.argv(guard.arguments("allow", "--for", "1s", "--user", str(TWO)), before=late))
    assert again.status == 1
    assert f"- user {TWO}\n" in guard("revoke", "--timer", "first").answer


def test_the_timer_waits_longer_than_others_for_the_lock(guard: Guard) -> None:
    """It runs once: what it does not take back then, stays."""
    guard.start(*BOTH)
    allow_for(guard, "15m", "--user", str(TWO))
    impatient = "from imds_guard.kernel import lockfile; lockfile.WAIT_S = 0.1"
    argv = command.argv(guard.arguments("revoke", "--timer", "first"), before=impatient)
    with lockfile.exclusive(lock_name(guard.sandbox.cgroup)):
        waiting = subprocess.Popen(argv)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(3)
    assert waiting.wait(TIMEOUT_S) == 0
    assert reached(guard, TWO) == []


def test_what_was_allowed_for_good_before_does_not_end(guard: Guard) -> None:
    guard.start(*BOTH)
    assert "nothing ends" in allow_for(guard, "15m", "--user", str(ONE)).answer
    assert "nothing is left" in guard("revoke", "--timer", "first").answer
    assert reached(guard, ONE) == [ONE]


def test_what_is_allowed_for_good_meanwhile_does_not_end(guard: Guard) -> None:
    guard.start(*BOTH)
    allow_for(guard, "15m", "--user", str(TWO), "--user", str(STRANGER))
    assert "for good now" in guard("allow", "--user", str(TWO)).answer
    assert guard("revoke", "--timer", "first").status == 0
    assert reached(guard, TWO, STRANGER) == [TWO]


def test_a_second_time_takes_the_place_of_the_first(guard: Guard) -> None:
    guard.start(*BOTH)
    allow_for(guard, "15m", "--user", str(TWO))
    allow_for(guard, "2h", "--user", str(TWO), timer="second")
    assert "nothing is left" in guard("revoke", "--timer", "first").answer
    assert reached(guard, TWO) == [TWO]
    assert guard("revoke", "--timer", "second").status == 0
    assert reached(guard, TWO) == []


def test_a_start_and_a_stop_end_what_was_allowed_for_a_time(guard: Guard) -> None:
    """What a start allows, it allows for good."""
    guard.start(*BOTH)
    allow_for(guard, "15m", "--user", str(TWO))
    guard.start("--user", str(TWO), "--ip", SERVICE)
    assert "nothing is left" in guard("revoke", "--timer", "first").answer
    assert reached(guard, TWO) == [TWO]
    allow_for(guard, "15m", "--user", str(ONE))
    guard("stop")
    assert "nothing is left" in guard("revoke", "--timer", "first").answer


def test_it_is_not_saved_by_another_command(guard: Guard, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    guard.start(*BOTH)
    allow_for(guard, "15m", "--user", str(TWO))
    words = ("--save", "--without-root", "--config", str(config))
    assert guard("allow", "--user", str(STRANGER), *words).status == 0
    guard("stop")
    assert guard("start", "--config", str(config)).status == 0
    assert reached(guard, ONE, TWO, STRANGER) == [ONE, STRANGER]


def test_verify_takes_back_what_no_timer_has(guard: Guard, tmp_path: Path) -> None:
    guard.start(*BOTH)
    allow_for(guard, "15m", "--user", str(TWO))
    # The clock that nobody sets is the one that counts: somebody has set the other one to 1970.
    later = (
        "import time; now = time.clock_gettime; time.time = lambda: 0.0\n"
        "time.clock_gettime = lambda clock: now(clock) + (HOW if clock == time.CLOCK_BOOTTIME else 0)"
    )
    words = guard.arguments("verify", "--repair", "--config", str(tmp_path / "none"))

    def verified(seconds: int) -> Result:
        return command.run(command.argv(words, before=later.replace("HOW", str(seconds))))

    assert verified(600).answer.startswith("imds-guard: active")
    assert reached(guard, TWO) == [TWO]
    assert "still in force after its time" in verified(1000).answer
    assert reached(guard, ONE, TWO) == [ONE]


def test_rights_without_a_known_end_are_named_and_end_by_the_configuration(guard: Guard, tmp_path: Path) -> None:
    """Nothing can take them back, so who looks is told. Where a configuration says what is meant, repair does it."""
    config = tmp_path / "config.toml"
    guard.start(*BOTH)
    allow_for(guard, "15m", "--user", str(TWO))
    file = Path(lockfile.FOLDER) / f"{lock_name(guard.sandbox.cgroup)}.until"
    file.write_text("[", encoding="ascii")
    status = guard("status")
    assert (status.status, "nothing tells what allow --for has allowed" in in_one_line(status.stdout)) == (1, True)
    assert "nothing tells what" in guard("revoke", "--timer", "first").sentence
    assert allow_for(guard, "15m", "--user", str(STRANGER)).status == 1
    assert reached(guard, TWO, STRANGER) == [TWO]

    repair = ("verify", "--repair", "--config", str(config))
    assert "rights whose end is not known" in guard(*repair).stderr
    assert reached(guard, TWO) == [TWO]
    config.write_text(f'[lock.a]\nendpoints = ["{SERVICE}"]\nusers = [{ONE}]\n', encoding="utf-8")
    assert "the configuration's policy took its place" in in_one_line(guard(*repair).answer)
    assert (reached(guard, ONE, TWO), file.exists(), guard("status").status) == ([ONE], False, 0)


def test_a_damaged_file_does_not_keep_a_right(guard: Guard) -> None:
    """What is asked for is done, and the warning says what is not known."""
    guard.start(*BOTH)
    allow_for(guard, "15m", "--user", str(TWO))
    (Path(lockfile.FOLDER) / f"{lock_name(guard.sandbox.cgroup)}.until").write_text("[", encoding="ascii")
    taken = guard("revoke", "--user", str(TWO))
    assert (taken.status, "nothing tells what" in taken.stderr) == (0, True)
    assert reached(guard, ONE, TWO) == [ONE]


def test_status_names_a_file_that_says_another_mode(guard: Guard, tmp_path: Path) -> None:
    """--config of verify is the file that status reads at /etc/imds-guard."""
    config = tmp_path / "config.toml"
    config.write_text('mode = "audit"\n[lock.a]\nendpoints = ["192.0.2.1"]\nusers = [41001]\n', encoding="utf-8")
    guard.start(*BOTH)
    before = f"from imds_guard.commands import look; look.status.__defaults__ = ({str(config)!r},)"
    done = command.run(command.argv(guard.arguments("status"), before=before))
    assert f'note: {config} says mode = "audit"' in in_one_line(done.answer)
    guard("mode", "audit")
    assert "note:" not in command.run(command.argv(guard.arguments("status"), before=before)).answer
