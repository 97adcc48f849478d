# SPDX-License-Identifier: Apache-2.0
"""Where connections are searched for, and what is reported when cutting fails."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imds_guard.commands import followup, preflight
from imds_guard.commands.outcome import Outcome, Pending
from imds_guard.commands.preflight import Preflight
from imds_guard.commands.turn import Turn
from imds_guard.connections import find
from imds_guard.connections.cut import MAX_SEARCHES, cut_denied, find_denied
from imds_guard.connections.find import Scope
from imds_guard.connections.values import CutResult, WhyOpen
from imds_guard.kernel import children, namespaces, syscalls
from imds_guard.kernel.abandonable import Limits
from imds_guard.kernel.privileges import CAP_NET_ADMIN, CAP_SYS_ADMIN
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.kernel.sock_diag import CONNECTED, SockDiag
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, make_policy
from imds_guard.policy.ports import ALL_PORTS
from imds_guard.present import connections as present_connections
from tests.command import ONE, SERVICE, STRANGER
from tests.hostile import serve_nothing
from tests.kernel.clients import (
    NEEDS_THE_HOST,
    WITHIN_S,
    Client,
    Stage,
    locked,
    opening,
    pids,
    stage,
    wait_until,
)
from tests.kernel.places import own_mounts, without_capabilities

pytestmark = NEEDS_THE_HOST


@pytest.fixture
def here() -> Iterator[Stage]:
    with stage() as one:
        yield one


# --- what is requested ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [WhyOpen.KEPT, WhyOpen.AUDIT])
def test_connections_to_keep_are_reported_and_stay(here: Stage, keep: WhyOpen) -> None:
    client = here.client(opening())
    done = cut_denied(locked(ONE), here.scope, keep)
    assert (pids(done.still_open), done.cut, done.why_open) == ([client.pid], (), keep)
    assert client.write() == ["sent"]


def test_find_denied_cuts_nothing(here: Stage) -> None:
    client = here.client(opening())
    assert pids(find_denied(locked(ONE), here.scope).still_open) == [client.pid]
    assert client.write() == ["sent"]


@pytest.mark.parametrize(("mode", "why"), [(Mode.ENFORCE, None), (Mode.AUDIT, WhyOpen.AUDIT)])
def test_find_denied_knows_that_audit_mode_cuts_nothing(here: Stage, mode: Mode, why: WhyOpen | None) -> None:
    client = here.client(opening())
    found = find_denied(locked(ONE, mode=mode), here.scope)
    assert (pids(found.still_open), found.why_open) == ([client.pid], why)


def test_sockets_of_another_cgroup_stay(here: Stage) -> None:
    """The scope is one cgroup with those below it."""
    with Sandbox() as elsewhere:
        client = here.client(opening())
        assert cut_denied(locked(), Scope(elsewhere.cgroup)).cut == ()
        assert client.write() == ["sent"]
    below = os.path.join(here.sandbox.cgroup, "below")
    os.mkdir(below)
    try:
        inner = here.client(opening(), before=lambda: _join(below))
        assert pids(cut_denied(locked(), Scope(below)).cut) == [inner.pid]
        assert pids(cut_denied(locked(), here.scope).cut) == [client.pid]
    finally:
        os.kill(inner.pid, 9)
        wait_until(lambda: _is_empty(below))
        os.rmdir(below)


def _join(cgroup: str) -> None:
    with open(f"{cgroup}/cgroup.procs", "w", encoding="ascii") as file:
        file.write(str(os.getpid()))


def _is_empty(cgroup: str) -> bool:
    with open(f"{cgroup}/cgroup.procs", encoding="ascii") as file:
        return not file.read()


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_so_many_sockets_of_a_namespace_are_judged_and_the_rest_counted(here: Stage) -> None:
    """Anybody can make any number of them. They are not even kept in the child that lists them."""
    several = [here.client(opening()) for _ in range(4)]

    def work() -> tuple[int, list[str]]:
        vars(find)["MAX_SOCKETS"] = 3  # in this child alone
        done = find_denied(locked(), here.scope)
        return len(done.still_open), list(done.errors)

    found, errors = children.run_in_child(work)
    assert (found, len(several)) == (3, 4)
    assert [text for text in errors if text.startswith("1 more socket to locked addresses: at most 3 of a namespace")]


def test_so_many_sockets_of_all_namespaces_are_judged(here: Stage) -> None:
    several = [here.client(opening()) for _ in range(3)]

    def work() -> tuple[int, list[str]]:
        vars(find)["MAX_ALL_SOCKETS"] = 2  # in this child alone
        done = find_denied(locked(), here.scope)
        return len(done.still_open), list(done.errors)

    found, errors = children.run_in_child(work)
    assert (found, len(several)) == (2, 3)
    assert [text for text in errors if text.startswith("1 more socket to locked addresses: at most")]


@pytest.mark.parametrize(
    ("bound", "value", "expected"),
    [("MAX_SOCKETS", 4, ([False] * 3 + [True], ["2 more sockets"])), ("MAX_LISTENING", 0, ([False] * 6, []))],
)
def test_connections_that_others_seem_to_have_made_come_last(
    here: Stage, bound: str, value: int, expected: tuple[list[bool], list[str]]
) -> None:
    """A busy server has more of them than sockets that are judged. Where its listener is not known they look alike."""

    def work() -> tuple[list[bool], list[str]]:
        vars(find)[bound] = value  # in this child alone
        with socket.create_server((SERVICE, 2000)) as server:
            pairs = []
            for _ in range(3):
                client = socket.create_connection((SERVICE, 2000), WITHIN_S)
                pairs += [client, server.accept()[0]]
            every_port = Endpoint(ipaddress.ip_network(SERVICE), ALL_PORTS)
            everything = make_policy([Lock("all", (every_port,), Identities())])
            done = find.find_sockets(everything, Scope(here.scope.cgroup, every_namespace=False))
            for one in pairs:
                one.close()
        return [one.seems_accepted for one in done.sockets], [
            text[:14] for text in done.errors if "more socket" in text
        ]

    assert here.sandbox.call(work) == expected


def test_a_namespace_that_hangs_is_named_and_the_others_are_searched(here: Stage, tmp_path: Path) -> None:
    """A path on a FUSE filesystem whose server does not answer. The child that opens it can't even be killed."""
    client = here.client(opening())

    def work() -> tuple[list[int], list[str], float]:
        own_mounts()
        server = serve_nothing(tmp_path)
        found, hidden, more = namespaces.network_namespaces()
        hangs = namespaces.Namespace(1, str(tmp_path / "file"), None)
        vars(find)["network_namespaces"] = lambda: namespaces.Namespaces([found[0], hangs, *found[1:]], hidden, more)
        vars(find)["LIMITS"] = find.LIMITS._replace(share_s=1.0)
        before = time.monotonic()
        done = find_denied(locked(), here.scope)
        took = time.monotonic() - before
        children.end(server)
        return pids(done.still_open), list(done.errors), took

    found, errors, took = children.run_in_child(work)
    assert found == [client.pid]
    assert [text for text in errors if text.startswith(f"entering {tmp_path}/file: no answer within")]
    assert took < 5


# --- when it searches -----------------------------------------------------------------------------------------------


def test_a_connect_that_was_in_progress_is_cut_by_the_second_look(
    here: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is past the hook, and sock_diag does not see it before it has a port. Here it appears between the looks."""
    late: list[Client] = []

    def shut_out(policy: Policy, limits: Limits) -> Preflight:
        late.append(here.client(opening()))
        return Preflight()

    monkeypatch.setattr(preflight, "shut_out", shut_out)
    pending = Pending(Turn(str(tmp_path / "none"), ""), here.scope.cgroup)
    existing = followup.complete(Outcome("ebpf", locked(ONE), [], [], pending=pending)).existing
    assert existing is not None
    assert pids(existing.cut) == [late[0].pid]
    assert late[0].write() == ["ECONNABORTED"]


# --- where it searches ----------------------------------------------------------------------------------------------


def test_every_namespace_is_searched_and_reported(here: Stage) -> None:
    """Its own namespace first. The sandbox's is found through its processes, unless only its own is searched."""
    client = here.client(opening())
    done = find_denied(locked(), here.scope)
    theirs = os.fstat(here.sandbox.netns_fd).st_ino
    assert done.searched[0].inode == os.stat("/proc/thread-self/ns/net").st_ino
    assert theirs in [namespace.inode for namespace in done.searched]
    assert [one.namespace for one in done.still_open] == [theirs]
    alone = find_denied(locked(), Scope(here.sandbox.cgroup, every_namespace=False))
    assert (len(alone.searched), alone.still_open) == (1, ())
    assert client.write() == ["sent"]


def test_a_namespace_without_a_process_is_found_where_it_is_mounted(tmp_path: Any) -> None:
    """``ip netns add`` makes such a namespace."""

    def work() -> bool:
        syscalls.unshare(0x00020000)  # CLONE_NEWNS: so that nobody else sees the mount
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mount(b"none", b"/", None, ctypes.c_ulong(1 << 18 | 1 << 14), None) == 0  # MS_PRIVATE | MS_REC
        place = tmp_path / "kept"
        place.touch()

        def keep() -> int:
            syscalls.unshare(syscalls.CLONE_NEWNET)
            return os.stat("/proc/thread-self/ns/net").st_ino

        reader, writer = os.pipe()

        def stay() -> None:
            os.write(writer, struct.pack("=Q", keep()))
            select.select([], [], [])

        child = children.fork(stay)
        (inode,) = struct.unpack("=Q", os.read(reader, 8))
        source = f"/proc/{child}/ns/net".encode()
        assert libc.mount(source, str(place).encode(), None, ctypes.c_ulong(4096), None) == 0  # MS_BIND
        children.end(child)
        found = {one.inode: one for one in namespaces.network_namespaces().found}
        assert (found[inode].path, found[inode].pid) == (str(place), None)
        done = find_denied(locked(), Scope("/sys/fs/cgroup/none"))
        return inode in [one.inode for one in done.searched]

    assert children.run_in_child(work)


def test_a_namespace_that_cannot_be_entered_is_reported(here: Stage) -> None:
    """setns(2) needs CAP_SYS_ADMIN. Without it only our own namespace is searched."""

    def work() -> tuple[int, list[str]]:
        without_capabilities(CAP_SYS_ADMIN)
        done = find_denied(locked(), here.scope)
        return len(done.searched), list(done.errors)

    searched, errors = children.run_in_child(work)
    assert searched == 1
    (text,) = [text for text in errors if "EPERM" in text]
    assert text.startswith("entering /proc/")
    assert text.endswith(": EPERM (Operation not permitted), it takes CAP_SYS_ADMIN")


# --- where cutting fails --------------------------------------------------------------------------------------------


def test_without_the_privilege_the_open_connections_are_reported(here: Stage) -> None:
    """sock_diag_destroy() in Linux needs CAP_NET_ADMIN."""
    client = here.client(opening())

    def work() -> CutResult:
        without_capabilities(CAP_NET_ADMIN)
        return cut_denied(locked(), here.scope)

    done = children.run_in_child(work)
    assert (pids(done.still_open), done.cut, done.why_open) == ([client.pid], (), WhyOpen.REFUSED)
    assert "ending a connection: EPERM (Operation not permitted)" in done.errors
    (warning, *_) = present_connections.connection_warnings(done, strict=False)
    assert warning.startswith(
        "left 1 open connection that the policy does not allow, since the kernel did not end them: end "
    )
    assert f"(pid {client.pid}, user {STRANGER})" in warning
    assert client.write() == ["sent"]


def test_a_kernel_that_cannot_cut_is_reported_as_such(here: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of the matrix has CONFIG_INET_DIAG_DESTROY, so the error of one without it is simulated."""

    def destroy(_: SockDiag, one: Any) -> bool:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    client = here.client(opening())
    monkeypatch.setattr(SockDiag, "destroy", destroy)
    done = cut_denied(locked(), here.scope)
    assert (pids(done.still_open), done.cut, done.why_open) == ([client.pid], (), WhyOpen.UNSUPPORTED)
    (warning, *_) = present_connections.connection_warnings(done, strict=False)
    assert (
        "this kernel can't end connections (CONFIG_INET_DIAG_DESTROY): end the processes, or start with --strict"
        in warning
    )
    (warning, *_) = present_connections.connection_warnings(done, strict=True)
    assert "but their packets are dropped (--strict)" in warning


def test_the_search_ends_although_a_client_connects_again_and_again(here: Stage) -> None:
    """No policy is in force here that would deny it."""

    def connects_again() -> list[socket.socket]:
        def again() -> None:
            while True:
                (one,) = opening()()
                with contextlib.suppress(OSError):
                    one.recv(1)
                one.close()

        child = children.fork(again)
        with SockDiag() as diag:
            wait_until(lambda: bool(diag.sockets(socket.AF_INET, socket.IPPROTO_TCP, CONNECTED)))
        assert child
        return []

    here.client(connects_again)
    done = cut_denied(locked(), here.scope)
    while done.why_open != WhyOpen.REOPENED:  # a search between two connections finds none, and ends
        assert done.still_open == ()
        done = cut_denied(locked(), here.scope)
    assert len(done.cut) >= MAX_SEARCHES


def test_many_connections_are_cut_in_time(here: Stage) -> None:
    """2,000 denied connections of one process, and one of an allowed user."""
    import resource

    def many() -> list[socket.socket]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        return [opening(kind=socket.SOCK_DGRAM)()[0] for _ in range(2000)]

    client = here.client(many, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)))
    allowed = here.client(opening(), uid=ONE)
    began = time.monotonic()
    done = cut_denied(locked(ONE), here.scope)
    assert time.monotonic() - began < WITHIN_S
    assert set(pids(done.cut)) == {client.pid}
    assert len(done.cut) > 1000
    assert allowed.write() == ["sent"]
    if len(done.cut) < 2000:  # a busy machine did not get to the end before the deadline: the next command does
        assert len(cut_denied(locked(ONE), here.scope).cut) + len(done.cut) >= 2000
        return
    lines = present_connections.connection_lines(done)
    assert lines[0].startswith("cut 2000 open connections (searched ")
    assert lines[-1] == "  and 1988 more (--json has them all)"
    assert len(lines) == 14
