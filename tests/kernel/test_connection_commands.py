# SPDX-License-Identifier: Apache-2.0
"""How start, revoke and check treat connections that are older than the policy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from imds_guard.connections.cut import find_denied
from imds_guard.present import connections as present_connections
from tests.command import ONE, SERVICE, STRANGER, TWO, Guard
from tests.kernel.clients import (
    NEEDS_THE_HOST,
    Stage,
    locked,
    opening,
    stage,
)

pytestmark = NEEDS_THE_HOST


@pytest.fixture
def here() -> Iterator[Stage]:
    with stage() as one:
        yield one


@pytest.fixture
def guarded(here: Stage) -> Iterator[tuple[Guard, Stage]]:
    guard = Guard(here.sandbox)
    try:
        yield guard, here
    finally:
        guard.backend.remove()


LOCK = ("--user", str(ONE), "--ip", f"{SERVICE}:80")


def test_start_cuts_and_reports(guarded: tuple[Guard, Stage]) -> None:
    guard, here = guarded
    denied, allowed = here.client(opening()), here.client(opening(), uid=ONE)
    done = guard.start(*LOCK)
    assert denied.write() + allowed.write() == ["ECONNABORTED", "sent"]
    (line,) = [line for line in done.stdout.splitlines() if f"(pid {denied.pid}, user {STRANGER})" in line]
    assert line.endswith(f"-> {SERVICE}:80")
    assert "cut 1 open connection (searched " in done.stdout
    assert guard.start(*LOCK).stdout.count("no open connection had to be cut (searched ") == 1


def test_start_keep_existing_cuts_nothing(guarded: tuple[Guard, Stage]) -> None:
    """It warns. The next start without the option cuts."""
    guard, here = guarded
    client = here.client(opening())
    done = guard.start(*LOCK, "--keep-existing")
    assert client.write() == ["sent"]
    assert (
        "warning: left 1 open connection that the policy does not allow, as requested (--keep-existing)" in done.stderr
    )
    assert f"(pid {client.pid}, user {STRANGER})" in done.stderr
    guard.start(*LOCK)
    assert client.write() == ["ECONNABORTED"]


def test_revoke_cuts_and_allow_does_not_search(guarded: tuple[Guard, Stage]) -> None:
    guard, here = guarded
    guard.start(*LOCK)
    assert guard("allow", "--user", str(TWO), "--json").values["connections"] is None
    client, other = here.client(opening(), uid=TWO), here.client(opening(), uid=ONE)
    revoked = guard("revoke", "--user", str(TWO), "--json").values["connections"]
    assert [process["pid"] for one in revoked["cut"] for process in one["processes"]] == [client.pid]
    assert revoked["looked_into"][0]["path"] == "/proc/thread-self/ns/net"
    assert client.write() + other.write() == ["ECONNABORTED", "sent"]


def test_audit_mode_reports_what_it_would_cut(guarded: tuple[Guard, Stage]) -> None:
    guard, here = guarded
    client = here.client(opening())
    done = guard.start(*LOCK, "--mode", "audit")
    assert client.write() == ["sent"]
    assert "would have cut 1 open connection (searched " in done.stdout
    assert f"(pid {client.pid}, user {STRANGER})" in done.stdout


def test_check_reports_what_start_would_cut(guarded: tuple[Guard, Stage]) -> None:
    guard, here = guarded
    client = here.client(opening())
    answer = guard("check", *LOCK).answer
    assert "start would cut 1 open connection:" in answer
    assert f"(pid {client.pid}, user {STRANGER})" in answer
    assert client.write() == ["sent"]


def test_the_name_of_a_process_is_safe_to_print(here: Stage) -> None:
    """PR_SET_NAME accepts any bytes (prctl(2))."""
    client = here.client(opening(), before=lambda: ctypes.CDLL(None).prctl(15, b"a\x1b[2Jb\nc", 0, 0, 0))
    (one,) = find_denied(locked(), here.scope).still_open
    text = present_connections.connection_text(one)
    assert text.startswith(f"a\\x1b[2Jb\\x0ac (pid {client.pid}, user {STRANGER}): tcp ")
    assert text.isprintable()
