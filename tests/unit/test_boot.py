# SPDX-License-Identifier: Apache-2.0
"""start --boot and verify --repair, above the backends: which policy, with which backend and options."""

from __future__ import annotations

import ipaddress
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

import pytest

from imds_guard.backends import Backend, choose
from imds_guard.backends.ebpf import other_guards
from imds_guard.backends.forwarded import LEAVE, Forwarded
from imds_guard.commands import boot, guard, look, verify
from imds_guard.commands.guard import Steps
from imds_guard.commands.look import Status
from imds_guard.commands.options import GuardOptions, Progress
from imds_guard.commands.outcome import Outcome
from imds_guard.commands.preflight import Preflight
from imds_guard.config import boot_file
from imds_guard.config.boot_file import BootFile
from imds_guard.config.names import Answers, Name
from imds_guard.config.read import Config, parse_config
from imds_guard.errors import BadPolicy, GuardError, NotPermitted, Unsupported, UsageError
from imds_guard.kernel import accounts
from imds_guard.kernel.deadline import Deadline
from imds_guard.policy.emergency import emergency_policy
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS

POLICY = make_policy(
    [Lock("web", (Endpoint(ipaddress.ip_network("192.0.2.1"), ALL_PORTS),), Identities(frozenset({7})))]
)
CONFIG = '[lock.web]\nendpoints = ["192.0.2.1"]\nusers = [7]\n'


class Holder:
    """A backend that holds a policy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def read(self) -> Policy:
        """Backend.read()."""
        return self._policy

    def unaltered(self) -> Policy:
        """Backend.unaltered()."""
        return self._policy


class Start:
    """Stands in for guard.start() and guard.stop(): writes down what it is asked for, and fails for some backends."""

    def __init__(self, **failing: BaseException) -> None:
        self.asked: list[GuardOptions] = []
        self.policies: list[Policy | None] = []
        """What was in force after each call; None after a stop."""
        self._failing = failing

    @property
    def steps(self) -> Steps:
        """These calls, as the boot makes them."""
        return Steps(self, self._stop)

    def _stop(self, cgroup: str | None) -> list[str]:
        self.policies.append(None)
        return [f"stopped {cgroup}"]

    def __call__(self, policy: Policy, options: GuardOptions, progress: Progress) -> Outcome:
        """Steps.start."""
        self.asked.append(options)
        if options.backend in self._failing:
            raise self._failing[options.backend]
        self.policies.append(policy)
        return Outcome("iptables", policy, ["done"], [], Preflight())


def ignore(_: str) -> None:
    return None


def hold(policy: Policy, monkeypatch: pytest.MonkeyPatch, backend: str = "iptables") -> None:
    """Lets a backend hold the policy for the whole machine, and none for a cgroup."""
    backends = {backend: cast(Backend, Holder(policy))}

    def running(cgroup: str | None, wanted: str = choose.AUTO) -> dict[str, Backend]:
        return backends if cgroup is None and wanted in (choose.AUTO, backend) else {}

    monkeypatch.setattr(choose, "running", running)


def test_a_backend_that_fails_makes_way_for_iptables() -> None:
    start = Start(auto=GuardError("the verifier said no"))
    outcome = boot.put_in_force(POLICY, GuardOptions(), ignore, start.steps)
    assert [one.backend for one in start.asked] == ["auto", "iptables"]
    assert outcome.warnings == ["ebpf failed: the verifier said no"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (GuardOptions(backend="ebpf"), GuardError("failed")),
        (GuardOptions(cgroup="/sys/fs/cgroup/x"), GuardError("failed")),
        (GuardOptions(), Unsupported("refused")),
    ],
    ids=["a backend was named", "iptables knows no cgroup", "every backend was asked already"],
)
def test_iptables_is_not_tried_where_it_was_not_meant(options: GuardOptions, error: GuardError) -> None:
    start = Start(**{options.backend: error})
    with pytest.raises(type(error), match=str(error)):
        boot.put_in_force(POLICY, options, ignore, start.steps)
    assert start.asked == [options]


@pytest.mark.parametrize(
    ("held", "cgroup", "removed"),
    [
        (emergency_policy(""), "/sys/fs/cgroup", True),
        (emergency_policy(""), None, False),
        (POLICY, "/sys/fs/cgroup", False),
    ],
    ids=["replaced by a policy for a cgroup", "replaced by a policy for the machine", "another policy"],
)
def test_the_emergency_lock_of_the_machine_does_not_outlive_its_reason(
    held: Policy, cgroup: str | None, removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy for a cgroup does not take its place, so it is removed after that policy is in force."""
    hold(held, monkeypatch)
    path = tmp_path / "config.toml"
    path.write_text((f'cgroup = "{cgroup}"\n' if cgroup else "") + CONFIG, encoding="utf-8")
    result = boot.start(BootFile(str(path)), GuardOptions(), ignore, Start().steps)
    assert result.outcome is not None
    assert result.outcome.done == ["done", *(["stopped None"] if removed else [])]


@pytest.mark.parametrize(
    ("held", "cgroup", "after", "taken_off"),
    [
        (emergency_policy(""), "/sys/fs/cgroup/a", POLICY, True),
        (POLICY, "/sys/fs/cgroup/a", POLICY, False),
        (emergency_policy(""), "/sys/fs/cgroup/b", POLICY, False),
        (emergency_policy(""), None, POLICY, False),
        (emergency_policy(""), "/sys/fs/cgroup/a", None, False),
        (emergency_policy(""), "/sys/fs/cgroup/a", emergency_policy(""), False),
    ],
    ids=["boot was ended", "another policy", "another cgroup", "no cgroup", "nothing in force", "the same there"],
)
def test_a_repair_ends_the_emergency_lock_beside_the_guard_of_a_cgroup(
    held: Policy, cgroup: str | None, after: Policy | None, taken_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(held, monkeypatch)
    monkeypatch.setattr(guard, "TAKING_THE_LOCK", Start().steps)
    config = Config(POLICY, cgroup=cgroup)
    status = Status(None if after is None else "ebpf", after, [])
    done = verify._end_machine_emergency(config, status, GuardOptions(cgroup="/sys/fs/cgroup/a"))
    sentence = "the machine had the emergency lock beside the guard of the cgroup: it was taken off (stopped None)"
    assert done == ([sentence] if taken_off else [])


@pytest.mark.parametrize("usable", [True, False])
def test_a_repair_looks_for_that_emergency_lock_where_nothing_else_is_wrong(
    usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(emergency_policy(""), monkeypatch)
    monkeypatch.setattr(guard, "TAKING_THE_LOCK", Start().steps)
    monkeypatch.setattr(guard, "one_at_a_time", lambda _: nullcontext())
    monkeypatch.setattr(guard, "look_again", lambda _: None)
    monkeypatch.setattr(look, "status", lambda *_: Status("ebpf", POLICY, []))
    path = tmp_path / "config.toml"
    path.write_text(f'cgroup = "/sys/fs/cgroup/a"\n{CONFIG if usable else ""}', encoding="utf-8")
    done = verify.repair(str(path), GuardOptions(cgroup="/sys/fs/cgroup/a"), ignore)
    assert len(done.repaired) == usable


@pytest.mark.parametrize("option", [LEAVE, None])
def test_a_repair_keeps_the_option_about_forwarded_packets(
    option: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, a machine that was started with --forwarded leave would drop forwarded packets after a repair."""
    hold(POLICY, monkeypatch)
    start = Start()
    monkeypatch.setattr(guard, "start_locked", start)
    forwarded = Forwarded(state_folder=str(tmp_path))
    forwarded.state_file.write(option or "")
    monkeypatch.setattr(look, "forwarded", lambda: forwarded)
    before = Status("iptables", POLICY, ["a fault"])
    verify._put_back(before, BootFile(str(tmp_path / "config.toml")), GuardOptions(), ignore)
    assert [(one.backend, one.forwarded) for one in start.asked] == [("iptables", option)]


# --- the order of boot ------------------------------------------------------------------------------------------------

EMERGENCY, CONFIGURED = emergency_policy(""), parse_config(CONFIG).policy


@pytest.fixture
def nothing_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """No guard is there, and the machine has no DMI."""
    monkeypatch.setattr(choose, "running", lambda *_: {})
    monkeypatch.setattr(other_guards, "are_in_force", lambda: False)
    monkeypatch.setattr(boot, "dmi_text", lambda: "")


def file_of(folder: Path, text: str) -> BootFile:
    """A configuration."""
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return BootFile(str(path))


@pytest.mark.usefixtures("nothing_in_force")
def test_the_emergency_lock_is_on_before_the_configuration_is_read(tmp_path: Path) -> None:
    """It cuts no connection: the configuration may allow it."""
    start = Start()
    result = boot.start(file_of(tmp_path, CONFIG), GuardOptions(), ignore, start.steps)
    assert (start.policies, result.error) == ([EMERGENCY, CONFIGURED], None)
    assert [one.keep_existing for one in start.asked] == [True, False]


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize(
    ("text", "first"),
    [
        (f'mode = "audit"\n{CONFIG}', None),
        (f'mode = "audit"\n{CONFIG}surplus = 1\n', EMERGENCY),
        (f'mode = "enforce"\n{CONFIG}', EMERGENCY),
        (f'{CONFIG}mode = "audit"\n', EMERGENCY),
        ("", EMERGENCY),
    ],
    ids=["audit", "audit, and an error", "enforce", "in a table", "nothing"],
)
def test_a_configuration_that_denies_nobody_gets_the_emergency_lock_only_after_an_error(
    text: str, first: Policy | None, tmp_path: Path
) -> None:
    start = Start()
    result = boot.start(file_of(tmp_path, text), GuardOptions(), ignore, start.steps)
    assert (start.policies[0] if first else result.error) == first
    assert (EMERGENCY in start.policies) is (first is not None)


@pytest.mark.usefixtures("nothing_in_force")
def test_nobody_waits_for_a_file_to_say_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot_file, "_says_audit", lambda _: signal.pause())
    start = Start()
    boot.start(file_of(tmp_path, f'mode = "audit"\n{CONFIG}'), GuardOptions(), ignore, start.steps)
    assert start.policies[0] == EMERGENCY


def test_a_command_that_ends_meanwhile_keeps_its_policy(
    kernel: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as another start --boot: nothing was in force when this one looked, and then it waited for that one."""

    @contextmanager
    def wait(_: str | None) -> Iterator[None]:
        kernel.policies.append(POLICY)
        yield

    steps = kernel.steps
    monkeypatch.setattr(boot, "TAKING_THE_LOCK", steps)
    monkeypatch.setattr(boot, "holding_the_lock", lambda _: steps)
    monkeypatch.setattr(guard, "one_at_a_time", wait)
    result = boot.start(file_of(tmp_path, "[lock.default]\n"), GuardOptions(), ignore, steps)
    assert kernel.policies == [POLICY]
    assert str(result.error).endswith("what was in force stays so")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_a_configuration_that_others_can_change_is_not_asked(on_error: str, tmp_path: Path) -> None:
    start = Start()
    one = file_of(tmp_path, f'on_error = "{on_error}"\n{CONFIG}')
    os.chown(one.path, 41_001, 0)
    result = boot.start(one, GuardOptions(), ignore, start.steps)
    assert start.policies == [EMERGENCY, EMERGENCY]
    assert f"{one.path} (owner 41001, group 0, mode 0644) can be changed by others than root" in str(result.error)


ANYTHING = (
    GuardError("x"),
    UsageError("x"),
    OSError(5, "x"),
    ValueError("x"),
    UnicodeError("x"),
    RecursionError("x"),
    MemoryError(),
    KeyError("x"),
)


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize("error", ANYTHING, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_whatever_goes_wrong_ends_in_what_on_error_says(
    error: Exception, on_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Config:
        raise error

    start = Start()
    monkeypatch.setattr(boot_file, "config_of", fail)
    result = boot.start(file_of(tmp_path, f'on_error = "{on_error}"\n'), GuardOptions(), ignore, start.steps)
    assert start.policies == [EMERGENCY, EMERGENCY if on_error == "closed" else None]
    assert isinstance(result.error, GuardError)
    assert not isinstance(result.error, UsageError)
    assert (result.outcome is None) == (on_error == "open")


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_a_deadline_never_opens(on_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the configuration says that an error opens: whoever can delay boot must not open the lock."""

    def hang(*_: object) -> Config:
        before, _repeated = signal.setitimer(signal.ITIMER_REAL, 0.05)  # the file was read: it says what an error does
        assert 0 < before <= boot.DEADLINE_S
        while True:
            signal.pause()

    start = Start()
    monkeypatch.setattr(boot_file, "config_of", hang)
    result = boot.start(file_of(tmp_path, f'on_error = "{on_error}"\n'), GuardOptions(), ignore, start.steps)
    assert start.policies == [EMERGENCY, EMERGENCY]
    assert "was given up; until that is corrected the built-in endpoints are locked" in str(result.error)


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize(
    "error", [NotPermitted("x"), MemoryError(), OSError(1, "x")], ids=lambda one: type(one).__name__
)
def test_a_backend_that_can_not_be_used_makes_way_whatever_the_reason(error: Exception, tmp_path: Path) -> None:
    start = Start(auto=error)
    result = boot.start(file_of(tmp_path, CONFIG), GuardOptions(), ignore, start.steps)
    assert (start.policies, result.error) == ([EMERGENCY, CONFIGURED], None)
    assert [one.backend for one in start.asked] == ["auto", "iptables"] * 2


@pytest.mark.usefixtures("nothing_in_force")
def test_without_an_emergency_lock_the_backend_of_the_configuration_is_tried(tmp_path: Path) -> None:
    start = Start(auto=Unsupported("no backend"))
    result = boot.start(file_of(tmp_path, f'backend = "iptables"\n{CONFIG}'), GuardOptions(), ignore, start.steps)
    assert (start.policies, result.error) == ([CONFIGURED], None)
    assert result.outcome is not None
    assert result.outcome.warnings == ["the emergency lock could not be put on first: no backend"]


@pytest.mark.usefixtures("nothing_in_force")
def test_when_nothing_can_be_locked_the_error_says_so(tmp_path: Path) -> None:
    start = Start(auto=Unsupported("no backend"), iptables=Unsupported("no iptables"))
    with pytest.raises(Unsupported, match="the emergency lock could not be put on either, nothing is locked"):
        boot.start(file_of(tmp_path, CONFIG), GuardOptions(), ignore, start.steps)


def test_a_policy_in_force_stays_where_the_configuration_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(POLICY, monkeypatch)
    start = Start()
    result = boot.start(file_of(tmp_path, "[lock.default]\n"), GuardOptions(), ignore, start.steps)
    assert start.policies == []
    assert str(result.error).endswith("what was in force stays so")


def test_the_guard_of_a_cgroup_may_be_the_one_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload must not lock the whole machine for a moment, where only a cgroup is guarded."""
    monkeypatch.setattr(choose, "running", lambda *_: {})
    monkeypatch.setattr(other_guards, "are_in_force", lambda: True)
    start = Start()
    boot.start(file_of(tmp_path, f'cgroup = "/sys/fs/cgroup/a"\n{CONFIG}'), GuardOptions(), ignore, start.steps)
    assert start.policies == [CONFIGURED]


# --- what is in force is never given up -------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Calls whose last policy is in force afterwards."""
    start = Start()

    def running(cgroup: str | None, wanted: str = choose.AUTO) -> dict[str, Backend]:
        policy = start.policies[-1] if start.policies else None
        held = policy is not None and cgroup is None and wanted in (choose.AUTO, "ebpf")
        return {"ebpf": cast(Backend, Holder(cast(Policy, policy)))} if held else {}

    monkeypatch.setattr(choose, "running", running)
    monkeypatch.setattr(other_guards, "are_in_force", lambda: False)
    monkeypatch.setattr(boot, "dmi_text", lambda: "")
    return start


@pytest.mark.parametrize("on_error", ["closed", "open"])
@pytest.mark.parametrize("error", [ValueError("x"), Deadline()], ids=["error", "deadline"])
def test_what_goes_wrong_when_the_policy_is_in_force_does_not_replace_it(
    error: BaseException, on_error: str, kernel: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emergency lock has other endpoints, and lets root in: it is no substitute for the policy."""

    def fail(_: Policy) -> list[str]:
        raise error

    monkeypatch.setattr(boot, "sub_id_warnings", fail)
    result = boot.start(file_of(tmp_path, f'on_error = "{on_error}"\n{CONFIG}'), GuardOptions(), ignore, kernel.steps)
    assert kernel.policies == [EMERGENCY, CONFIGURED]
    assert str(result.error).endswith("the policy that was put in force before that stays so")


@pytest.mark.parametrize("cgroup", ["/sys/fs/cgroup/no-such-cgroup", "/sys\\u0000"])
@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_a_reload_for_a_cgroup_that_does_not_exist_leaves_the_policy_of_the_machine(
    cgroup: str, on_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(POLICY, monkeypatch)
    start = Start(auto=GuardError("there is no such cgroup"))
    text = f'on_error = "{on_error}"\ncgroup = "{cgroup}"\n{CONFIG}'
    result = boot.start(file_of(tmp_path, text), GuardOptions(), ignore, start.steps)
    assert start.policies == []
    assert str(result.error).endswith("what was in force stays so")


@pytest.mark.parametrize("error", ANYTHING, ids=lambda one: type(one).__name__)
def test_a_backend_that_can_not_be_asked_does_not_hide_the_policy_of_the_other_one(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def running(_: str | None, wanted: str = choose.AUTO) -> dict[str, Backend]:
        if wanted != "ebpf":
            raise error
        return {"ebpf": cast(Backend, Holder(POLICY))}

    monkeypatch.setattr(choose, "running", running)
    start = Start()
    result = boot.start(file_of(tmp_path, "[lock.default]\n"), GuardOptions(), ignore, start.steps)
    assert (start.policies, str(result.error).endswith("what was in force stays so")) == ([], True)


@pytest.mark.parametrize("error", ANYTHING, ids=lambda one: type(one).__name__)
def test_a_policy_that_can_not_be_read_is_in_force_all_the_same(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: Holder) -> Policy:
        raise error

    hold(POLICY, monkeypatch)
    monkeypatch.setattr(Holder, "read", read)
    start = Start()
    result = boot.start(file_of(tmp_path, "[lock.default]\n"), GuardOptions(), ignore, start.steps)
    assert (start.policies, str(result.error).endswith("what was in force stays so")) == ([], True)


@pytest.mark.parametrize("held", [POLICY, CONFIGURED], ids=["another policy", "this policy"])
def test_ebpf_does_not_make_way_for_iptables_where_it_holds_a_policy(
    held: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules of iptables see one network namespace alone, and can't hold every policy."""
    hold(held, monkeypatch, "ebpf")
    start = Start(ebpf=GuardError("no memory"), auto=GuardError("no memory"))
    result = boot.start(file_of(tmp_path, CONFIG), GuardOptions(), ignore, start.steps)
    assert [one.backend for one in start.asked] == ["ebpf"]
    assert str(result.error) == "no memory; what was in force stays so"


def test_ebpf_does_not_make_way_when_it_failed_with_the_emergency_lock_in_force(kernel: Start) -> None:
    """Something went wrong after the policy was put in force."""
    kernel.policies.append(EMERGENCY)
    failing = Start(auto=GuardError("the rules for forwarded packets failed"))
    with pytest.raises(GuardError, match="forwarded"):
        boot.put_in_force(EMERGENCY, GuardOptions(), ignore, failing.steps)
    assert len(failing.asked) == 1


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize("text", [CONFIG, "[lock.x]\n"], ids=["usable", "unusable"])
@pytest.mark.parametrize("error", ANYTHING, ids=lambda one: type(one).__name__)
def test_what_goes_wrong_with_open_connections_does_not_hide_what_boot_did(
    error: Exception, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complete(*_: object) -> Outcome:
        raise error

    steps = Start().steps
    monkeypatch.setattr(boot, "TAKING_THE_LOCK", steps)
    monkeypatch.setattr(boot, "holding_the_lock", lambda _: steps)
    monkeypatch.setattr(guard, "complete", complete)
    result = boot.start(file_of(tmp_path, text), GuardOptions(), ignore, steps)
    assert result.outcome is not None
    if text == CONFIG:
        assert str(result.error).endswith("open connections were not all looked at; what was put in force stays so")
    else:
        assert "lock 'x' locks nothing" in str(result.error)


# --- a second failure -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize("error", ANYTHING, ids=lambda one: type(one).__name__)
def test_the_emergency_lock_stays_when_it_can_not_be_put_on_again(error: Exception, tmp_path: Path) -> None:
    start = Start(ebpf=error)

    def fail_later(policy: Policy, options: GuardOptions, progress: Progress) -> Outcome:
        return start(policy, options._replace(backend="ebpf") if start.policies else options, progress)

    result = boot.start(file_of(tmp_path, "[lock.x]\n"), GuardOptions(), ignore, Steps(fail_later, start.steps.stop))
    assert start.policies == [EMERGENCY]
    assert str(result.error).endswith("locked for everyone but root (emergency lock)")


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize("error", ANYTHING, ids=lambda one: type(one).__name__)
def test_every_error_is_reported_when_nothing_can_be_locked(error: Exception, tmp_path: Path) -> None:
    start = Start(auto=error, iptables=error)
    with pytest.raises(GuardError, match="the emergency lock could not be put on either, nothing is locked"):
        boot.start(file_of(tmp_path, CONFIG), GuardOptions(), ignore, start.steps)


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize("error", ANYTHING, ids=lambda one: type(one).__name__)
def test_a_lock_that_can_not_be_taken_off_is_not_said_to_be_open(error: Exception, tmp_path: Path) -> None:
    def stop(_: str | None) -> list[str]:
        raise error

    start = Start()
    file = file_of(tmp_path, 'on_error = "open"\n[lock.x]\n')
    result = boot.start(file, GuardOptions(), ignore, Steps(start, stop))
    assert start.policies == [EMERGENCY]
    assert "lock 'x' locks nothing" in str(result.error)
    assert "the emergency lock could not be taken off" in str(result.error)


# --- names ------------------------------------------------------------------------------------------------------------

ACCOUNT, GROUP, ABSENT = Name("user", "ldap-user"), Name("group", "ldap-group"), Name("user", "gone")

NAMED = """
[lock.web]
endpoints = ["192.0.2.1"]
users = [7, "ldap-user"]
"""


def answering(monkeypatch: pytest.MonkeyPatch, answers: Answers, asked: list[list[Name]] | None = None) -> None:
    """A name service that knows these names, and does not answer for others."""

    def ask(names: Iterable[Name]) -> Answers:
        wanted = list(names)
        if asked is not None:
            asked.append(wanted)
        return {name: answers[name] for name in wanted if name in answers}

    monkeypatch.setattr(boot_file, "ask", ask)


def allowed(policy: Policy | None) -> Identities:
    """The allow list of the only lock."""
    assert policy is not None
    (lock,) = policy.locks
    return lock.allow


@pytest.mark.usefixtures("nothing_in_force")
def test_no_name_service_stands_before_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First without the name, then with it."""
    asked: list[list[Name]] = []
    answering(monkeypatch, {ACCOUNT: 5000}, asked)
    start = Start()
    result = boot.start(file_of(tmp_path, NAMED), GuardOptions(), ignore, start.steps)
    assert start.policies[0] == EMERGENCY
    assert [allowed(policy).users for policy in start.policies[1:]] == [{7}, {7, 5000}]
    assert [one.keep_existing for one in start.asked] == [True, True, False]
    assert (asked, result.error) == ([[ACCOUNT]], None)
    assert result.outcome is not None
    assert result.outcome.warnings == []


@pytest.mark.usefixtures("nothing_in_force")
def test_a_name_without_an_answer_lets_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {})
    start = Start()
    result = boot.start(file_of(tmp_path, NAMED), GuardOptions(), ignore, start.steps)
    assert allowed(start.policies[-1]).users == {7}
    assert (result.outcome is not None, result.error) == (True, None)
    assert result.outcome is not None
    (warning,) = result.outcome.warnings
    assert warning == "users: the name service gave no ID for 'ldap-user' yet; until it does, this entry lets nobody in"


@pytest.mark.usefixtures("nothing_in_force")
def test_a_denied_name_without_an_answer_denies_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may be in the group.

    Also when it is unknown: that is what the C library says while the daemon of a directory does not run yet.
    """
    text = '[lock.web]\nendpoints = ["192.0.2.1"]\nusers = [7]\ndeny_groups = [9, "ldap-group"]\n'
    for answers, expected in (({}, set()), ({GROUP: None}, set()), ({GROUP: 6000}, {7})):
        answering(monkeypatch, answers)
        start = Start()
        boot.start(file_of(tmp_path, text), GuardOptions(), ignore, start.steps)
        assert [allowed(policy).users for policy in start.policies[1:]] == [set(), expected]
        last = start.policies[-1]
        assert last is not None
        assert last.locks[0].deny.groups == ({9, 6000} if answers.get(GROUP) else {9})
        assert last.locks[0].default is Verdict.DENY


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({GROUP: 6000}, [Verdict.DENY, Verdict.ALLOW]),
        ({GROUP: None}, [Verdict.DENY, Verdict.DENY]),
        ({}, [Verdict.DENY, Verdict.DENY]),
    ],
    ids=["known", "unknown", "no answer"],
)
def test_a_deny_list_alone_does_not_let_all_others_in_while_it_is_incomplete(
    answers: Answers, expected: list[Verdict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '[lock.web]\nendpoints = ["192.0.2.1"]\ndeny_groups = ["ldap-group"]\n'
    answering(monkeypatch, answers)
    start = Start()
    result = boot.start(file_of(tmp_path, text), GuardOptions(), ignore, start.steps)
    defaults = [policy.locks[0].default for policy in start.policies[1:] if policy is not None]
    assert defaults == expected
    assert result.outcome is not None
    assert len(result.outcome.warnings) == (expected[-1] is Verdict.DENY)


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ("", {0}),
        ("deny_users = [0]", set()),
        ('users = ["root", 7]', {0}),
        ("users = [7]", set()),
        ("nobody = true", set()),
    ],
)
def test_an_incomplete_deny_list_lets_in_root_at_most(
    lists: str, expected: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure's agent is root, and a machine does not come up without it."""
    answering(monkeypatch, {})
    start = Start()
    text = f'[lock.web]\nendpoints = ["192.0.2.1"]\ndeny_groups = ["ldap-group"]\n{lists}\n'
    boot.start(file_of(tmp_path, text), GuardOptions(), ignore, start.steps)
    assert allowed(start.policies[-1]) == Identities(frozenset(expected))


def test_below_another_root_a_denied_name_that_is_in_no_file_denies_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(accounts.VARIABLE, str(tmp_path))
    one = file_of(tmp_path, '[lock.web]\nendpoints = ["192.0.2.1"]\ndeny_groups = ["ldap-group"]\n')
    assert one.load().policy.locks[0].default is Verdict.DENY


@pytest.mark.usefixtures("nothing_in_force")
def test_a_deleted_account_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {ABSENT: None, ACCOUNT: None})
    text = NAMED.replace("7,", '7, { name = "gone", id = 8 },')
    start = Start()
    result = boot.start(file_of(tmp_path, text), GuardOptions(), ignore, start.steps)
    assert allowed(start.policies[-1]).users == {7, 8}
    assert result.error is None
    assert result.outcome is not None
    assert result.outcome.warnings == [
        "users: 'gone' was 8 when it was saved and is not known now; the saved ID is used",
        "users: there is no user 'ldap-user', so this entry is left out",
    ]


DENIED = '[lock.web]\nendpoints = ["192.0.2.1"]\ndeny_groups = ["ldap-group"]\n'
MOVED = '[lock.web]\nendpoints = ["192.0.2.1"]\nusers = [{ name = "ldap-user", id = 7 }]\n'


@pytest.mark.usefixtures("nothing_in_force")
def test_a_name_that_has_another_id_fails_the_boot_visibly_and_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, {ACCOUNT: 5000})
    start = Start()
    result = boot.start(file_of(tmp_path, MOVED), GuardOptions(), ignore, start.steps)
    assert allowed(start.policies[-1]).users == {7}
    assert result.outcome is not None
    assert isinstance(result.error, BadPolicy)
    assert "users: 'ldap-user' was 7 when it was saved and is 5000 now" in str(result.error)
    assert str(result.error).endswith("the saved IDs are in force")


@pytest.mark.usefixtures("nothing_in_force")
@pytest.mark.parametrize(
    ("answers", "fails"), [({Name("user", "root"): 7}, False), ({Name("user", "root"): 0}, True), ({}, False)]
)
def test_a_saved_id_of_the_directory_is_right_where_a_file_has_another_one(
    answers: Answers, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nsswitch.conf(5) may say ``passwd: sss files``, and start --save has asked the name service."""
    answering(monkeypatch, answers)
    start = Start()
    file = file_of(tmp_path, MOVED.replace("ldap-user", "root"))
    result = boot.start(file, GuardOptions(), ignore, start.steps)
    assert allowed(start.policies[-1]).users == {7}
    assert (result.error is not None) == fails


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (MOVED, {ACCOUNT: 5000}, "is 5000 now: correct the name or the id; what was in force stays so"),
        (NAMED, {}, "the name service gave no ID for 'ldap-user' within 10 s"),
        (DENIED, {GROUP: None}, "the name service gave no ID for 'ldap-group' within 10 s"),
    ],
    ids=["another ID", "no answer", "no such group to deny"],
)
def test_a_reload_changes_nothing_until_every_name_is_known(
    text: str, answers: Answers, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy in force is worth more than a part of the new one."""
    hold(POLICY, monkeypatch)
    answering(monkeypatch, answers)
    start = Start()
    result = boot.start(file_of(tmp_path, text), GuardOptions(), ignore, start.steps)
    assert start.policies == []
    assert expected in str(result.error)


def test_a_reload_asks_first_and_then_changes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(POLICY, monkeypatch)
    answering(monkeypatch, {ACCOUNT: 5000})
    start = Start()
    boot.start(file_of(tmp_path, NAMED), GuardOptions(), ignore, start.steps)
    assert [allowed(policy).users for policy in start.policies] == [{7, 5000}]
