# SPDX-License-Identifier: Apache-2.0
"""A guard, the service, and callers of each kind, in a namespace with a metadata service: who gets what."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.commands import filter_places, filter_service
from imds_guard.kernel import accounts, lockfile
from imds_guard.kernel.credentials import become
from imds_guard.kernel.name_service import User
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.filters import Filter, FilterRules
from imds_guard.policy.model import Identities, Lock, Policy, make_policy
from tests.filter.test_process import METADATA, serve_metadata, wait_until
from tests.kernel import guards

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="attaches programs to a cgroup of its own")

ACCOUNT = User("imds-guard-filter", 41_990, 51_990)
ALLOWED, BY_USER, BY_GROUP, STRANGER = 61_001, 61_002, 61_003, 61_004
GROUP = 62_007
REGION = "/latest/meta-data/placement/region"
SECRET = "/latest/meta-data/iam/security-credentials/role"
DENIED = "EPERM"


def policy_of(*allow: str, users: tuple[int, ...] = (BY_USER,), deny: tuple[str, ...] = ()) -> Policy:
    lock = Lock("default", guards.OLD_POLICY.locks[0].endpoints[:1], Identities(frozenset((ALLOWED,))))
    who = Identities(frozenset(users), frozenset((GROUP,)))
    return make_policy(
        [lock], filters=[Filter("region", ("default",), who, rules=FilterRules(allow, deny))], filter_uid=ACCOUNT.uid
    )


POLICY = policy_of("GET /*/meta-data/placement/**")


class Scene:
    """A guarded namespace."""

    def __init__(self, sandbox: Sandbox, backend: EbpfBackend) -> None:
        self.sandbox = sandbox
        self.backend = backend
        self.service = 0

    def start(self) -> None:
        """Starts the service, and returns when it serves."""
        self.service = self.sandbox.spawn(lambda: filter_service.serve(self.sandbox.cgroup, _fail))
        wait_until(lambda: self.sandbox.call(lambda: filter_places.faults(self.sandbox.cgroup)) == [])

    def reload(self) -> list[str]:
        """What a command does after a change of the policy."""
        return self.sandbox.call(lambda: filter_service.reload(self.sandbox.cgroup))

    def faults(self) -> list[str]:
        """What status says of the filters."""
        return self.sandbox.call(lambda: filter_places.faults(self.sandbox.cgroup))

    def ask(self, user: int, path: str, group: int = 62_001) -> str:
        """The status that a GET of this user gets; EPERM where the connect is denied."""
        return self.sandbox.call(lambda: _ask(user, path, group))


def _fail(warnings: list[str]) -> None:
    assert warnings == []


def _ask(user: int, path: str, group: int) -> str:
    become(uids=(user,) * 3, gids=(62_001,) * 3, groups=(group,))
    with socket.socket() as one:
        one.settimeout(5)
        try:
            one.connect((METADATA, 80))
        except PermissionError:
            return DENIED
        assert one.getpeername() == (METADATA, 80)
        one.sendall(f"GET {path} HTTP/1.1\r\nHost: {METADATA}\r\nConnection: close\r\n\r\n".encode())
        return one.recv(65536).split(b" ")[1].decode()


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(lockfile, "FOLDER", str(folder))
    monkeypatch.setattr(accounts, "user_in_files", lambda name: ACCOUNT)
    with Sandbox((METADATA,)) as sandbox:
        sandbox.spawn(serve_metadata)
        backend = EbpfBackend(sandbox.cgroup, guards.FAST)
        backend.apply(POLICY)
        try:
            yield Scene(sandbox, backend)
        finally:
            backend.remove()


def test_who_gets_what(scene: Scene) -> None:
    """The allowed user is not filtered, and nobody else gets anything."""
    assert scene.ask(BY_USER, REGION) == DENIED, "without the service"
    scene.start()
    rows = {
        "allowed": [scene.ask(ALLOWED, path) for path in (REGION, SECRET)],
        "by user": [scene.ask(BY_USER, path) for path in (REGION, SECRET)],
        "by supplementary group": [scene.ask(STRANGER, path, GROUP) for path in (REGION, SECRET)],
        "stranger": [scene.ask(STRANGER, path) for path in (REGION, SECRET)],
        "the filter's user": [scene.ask(ACCOUNT.uid, path) for path in (REGION, SECRET)],
    }
    assert rows == {
        "allowed": ["200", "200"],
        "by user": ["200", "403"],
        "by supplementary group": ["200", "403"],
        "stranger": [DENIED, DENIED],
        "the filter's user": ["200", "200"],
    }


def test_a_changed_rule_has_a_new_listener(scene: Scene) -> None:
    """Until a command has made it, the caller is denied: the old listener has other rules."""
    scene.start()
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET)) == ("200", "403")
    scene.backend.change(policy_of("GET /**", deny=("/*/meta-data/placement/**",)))
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET)) == (DENIED, DENIED)
    assert "the filter does not serve 'region'" in scene.faults()[0]
    assert scene.reload() == []
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET), scene.faults()) == ("403", "200", [])


def test_other_callers_change_no_listener(scene: Scene) -> None:
    scene.start()
    scene.backend.change(policy_of("GET /*/meta-data/placement/**", users=(STRANGER,)))
    assert (scene.ask(STRANGER, REGION), scene.ask(BY_USER, REGION), scene.faults()) == ("200", DENIED, [])


def test_a_policy_without_filters_closes_the_listeners(scene: Scene) -> None:
    scene.start()
    scene.backend.change(make_policy(POLICY.locks))
    assert scene.reload() == []
    assert (scene.ask(BY_USER, REGION), scene.faults()) == (DENIED, [])


def test_kill_9_never_gives_direct_access(scene: Scene) -> None:
    """The caller is denied at once, status says so, and a new service takes over."""
    scene.start()
    os.kill(scene.service, signal.SIGKILL)
    os.waitpid(scene.service, 0)
    scene.sandbox._spawned.remove(scene.service)
    assert (scene.ask(BY_USER, SECRET), scene.ask(BY_USER, REGION)) == (DENIED, DENIED)
    assert "the filter does not serve 'region', so its callers are denied" in scene.faults()[0]
    scene.start()
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET)) == ("200", "403")
