# SPDX-License-Identifier: Apache-2.0
"""start --boot and verify --repair, above the backends: which policy, with which backend and options."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import cast

import pytest

from imds_guard.backends import Backend, choose
from imds_guard.backends.forwarded import LEAVE, Forwarded
from imds_guard.commands import boot, guard, look, verify
from imds_guard.commands.guard import Outcome
from imds_guard.commands.look import Status
from imds_guard.commands.options import GuardOptions, Progress
from imds_guard.commands.preflight import Preflight
from imds_guard.errors import GuardError, Unsupported
from imds_guard.policy.emergency import emergency_policy
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
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
    """Stands in for guard.start(): writes down what it is asked for, and fails for some backends."""

    def __init__(self, **failing: GuardError) -> None:
        self.asked: list[GuardOptions] = []
        self._failing = failing

    def __call__(self, policy: Policy, options: GuardOptions, progress: Progress) -> Outcome:
        """Type Start of commands/boot.py."""
        self.asked.append(options)
        if options.backend in self._failing:
            raise self._failing[options.backend]
        return Outcome("iptables", policy, ["done"], [], Preflight())


def ignore(_: str) -> None:
    return None


def hold(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a backend hold the policy for the whole machine, and none for a cgroup."""
    running = {"iptables": cast(Backend, Holder(policy))}
    monkeypatch.setattr(choose, "running", lambda cgroup: running if cgroup is None else {})


def test_a_backend_that_fails_makes_way_for_iptables() -> None:
    start = Start(auto=GuardError("the verifier said no"))
    outcome = boot.put_in_force(POLICY, GuardOptions(), ignore, start)
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
        boot.put_in_force(POLICY, options, ignore, start)
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
    monkeypatch.setattr(guard, "stop", lambda cgroup: [f"stopped {cgroup}"])
    path = tmp_path / "config.toml"
    path.write_text((f'cgroup = "{cgroup}"\n' if cgroup else "") + CONFIG, encoding="utf-8")
    result = boot.start(str(path), GuardOptions(), ignore, Start())
    assert result.outcome is not None
    assert result.outcome.done == ["done", *(["stopped None"] if removed else [])]


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
    verify._put_back(before, str(tmp_path / "config.toml"), GuardOptions(), ignore)
    assert [(one.backend, one.forwarded) for one in start.asked] == [("iptables", option)]
