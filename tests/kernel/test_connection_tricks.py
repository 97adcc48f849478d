# SPDX-License-Identifier: Apache-2.0
"""Connections from before that a process hides or disguises, and those that nobody may cut."""

from __future__ import annotations

import ipaddress
import os
import select
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from imds_guard.connections import judge as judging
from imds_guard.connections.cut import cut_denied, find_denied
from imds_guard.connections.find import Scope
from imds_guard.connections.values import WhyOpen
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sock_diag import SockDiag
from imds_guard.kernel.tcp_birth import was_accepted
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
from imds_guard.policy.ports import ALL_PORTS
from imds_guard.present.connections import connection_warnings
from tests.command import ONE, SERVICE, STRANGER
from tests.kernel.clients import NEEDS_THE_HOST, WITHIN_S, Stage, locked, opening, pids, stage, written

pytestmark = NEEDS_THE_HOST

HIGH_PORT = 8080
UDP_CORK = 1  # include/uapi/linux/udp.h


@pytest.fixture
def here() -> Iterator[Stage]:
    with stage() as one:
        yield one


# --- hidden: the maker keeps a copy that nobody sees ------------------------------------------------------------------


@pytest.fixture
def su() -> Iterator[str]:
    """A set-user-ID program of root that waits, as su waits for a password."""
    with tempfile.TemporaryDirectory(prefix="imds-guard-test-") as folder:
        os.chmod(folder, 0o755)
        path = shutil.copy(shutil.which("sleep") or "/bin/sleep", f"{folder}/su")
        os.chmod(path, 0o4755)
        yield path


def test_a_set_user_id_program_as_the_only_holder_hides_nobody(here: Stage, su: str) -> None:
    """It runs as root, who is allowed. The maker's own copy is in the queue of a Unix socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def handed_to_su() -> list[socket.socket]:
            (one,) = opening()()
            socket.send_fds(theirs, [b"."], [one.fileno()])
            subprocess.Popen([su, "60"], pass_fds=[one.fileno()])
            one.close()
            return []

        here.client(handed_to_su)
        done = cut_denied(locked(0), here.scope)
        (fd,) = socket.recv_fds(ours, 1, 1)[1]
        with socket.socket(fileno=fd) as arrived:
            assert written(arrived) == "ECONNABORTED"
        (one,) = done.cut
        assert ([holder.user for holder in one.holders], one.user) == (["root"], str(STRANGER))


def test_a_service_that_dropped_its_privileges_keeps_its_connection(here: Stage) -> None:
    """Root made the socket, and no holder is root. Only the service's user is allowed."""

    def dropped() -> list[socket.socket]:
        made = opening()()
        become((ONE,) * 3)
        return made

    client = here.client(dropped, uid=0)
    assert cut_denied(locked(ONE), here.scope).cut == ()
    assert client.write() == ["sent"]


# --- disguised: who made the connection -------------------------------------------------------------------------------


def every_port() -> Policy:
    return make_policy(
        [Lock("all", (Endpoint(ipaddress.ip_network("192.0.2.0/24"), ALL_PORTS, ALL_PORTS),), Identities())]
    )


def listening_at_its_own_port(one: socket.socket) -> socket.socket:
    """A listener at the local address and port of a connected socket."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(one.getsockname())
    listener.listen(1)
    return listener


def serve_high_port(here: Stage) -> None:
    def answer(listener: socket.socket) -> None:
        everyone = [listener]
        while True:
            for one in select.select(everyone, [], [])[0]:
                if one is listener:
                    everyone.append(listener.accept()[0])
                elif one.recv(100):
                    one.send(b"answer")
                else:
                    everyone.remove(one)

    here.sandbox.serve_with(lambda: socket.create_server((SERVICE, HIGH_PORT)), answer)


def test_a_listener_at_its_own_port_saves_no_connection(here: Stage) -> None:
    """Fresh, used, and half-closed by the peer."""
    serve_high_port(here)

    def disguised() -> list[socket.socket]:
        made = [opening(port=HIGH_PORT)()[0] for _ in range(2)]
        made[1].send(b"request")
        assert made[1].recv(100) == b"answer"
        kept.extend(listening_at_its_own_port(one) for one in made)
        return made

    kept: list[socket.socket] = []
    client = here.client(disguised)
    done = cut_denied(every_port(), here.scope)
    assert client.write() == ["ECONNABORTED"] * 2
    assert pids(done.cut) == [client.pid] * 2


def test_a_connection_that_a_peer_made_stays_also_when_it_was_used(here: Stage) -> None:
    """Here the peers' ends would be cut, since all ports are locked: both are sockets of one process."""

    def both_ends() -> list[socket.socket]:
        listener = socket.create_server((SERVICE, HIGH_PORT))
        peers = [socket.create_connection((SERVICE, HIGH_PORT), WITHIN_S) for _ in range(2)]
        taken = [listener.accept()[0] for _ in peers]
        peers[1].send(b"request")
        taken[1].recv(100)
        taken[1].send(b"x" * 60_000)
        peers[1].recv(60_000, socket.MSG_WAITALL)
        return [*peers, *taken, listener]

    client = here.client(both_ends)
    left = find_denied(every_port(), here.scope).still_open
    assert [(one.remote[1], one.holders[0].pid) for one in left] == [(HIGH_PORT, client.pid)] * 2


def infos() -> dict[str, list[bytes]]:
    """tcp_info of both ends of connections in several states, in a namespace of their own."""
    found: dict[str, list[bytes]] = {"made": [], "accepted": []}
    with ExitStack() as stack, SockDiag() as diag:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for traffic in range(4):
            client = stack.enter_context(socket.create_connection(listener.getsockname(), WITHIN_S))
            server = stack.enter_context(listener.accept()[0])
            for one, other in [(client, server), (server, client)][: traffic % 4]:
                one.sendall(b"x" * 100_000)
                other.settimeout(None)  # with a timeout MSG_WAITALL does not wait for all
                other.recv(100_000, socket.MSG_WAITALL)
            if traffic == 3:
                server.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
            by_inode = {one.inode: one for one in diag.sockets(socket.AF_INET, socket.IPPROTO_TCP, (1, 4, 5, 8))}
            for name, end in (("made", client), ("accepted", server)):
                info = diag.tcp_info(by_inode[os.fstat(end.fileno()).st_ino])
                assert info is not None
                found[name].append(info)
    return found


def test_the_counters_tell_who_made_a_connection(here: Stage) -> None:
    """Unused, one that sent, both sent, and one whose server has sent its FIN: then nobody can tell."""
    found = here.sandbox.call(infos)
    assert [was_accepted(info) for info in found["made"]] == [False] * 4
    assert [was_accepted(info) for info in found["accepted"]] == [True, True, True, False]


def made_up(**fields: int) -> bytes:
    """struct tcp_info of an accepted connection that has sent ten segments of 100 bytes, but for these fields."""
    values = {"state": 1, "options": 2, "unacked": 0, "retransmitted": 0, "acked": 1000, "segments": 10}
    values.update({"delivered": 11, "sent": 1000, "sent_again": 0}, **fields)
    return struct.pack("=B4xB18xI72xI16xQ28xI32xI4xQQ", *values.values())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"acked": 0, "unacked": 3}, True),
        ({"acked": 1001}, False),
        pytest.param({"segments": 11}, False, id="a segment of one byte was refused by the device and sent again"),
        pytest.param({"segments": 11, "retransmitted": 1}, False, id="and the SYN was, too"),
        ({"unacked": 1}, False),
        ({"sent_again": 1}, False),
        pytest.param({"options": 0}, False, id="no SACK"),
        pytest.param({"state": 5}, False, id="FIN_WAIT2"),
    ],
)
def test_where_the_counters_do_not_add_up_nobody_can_tell(fields: dict[str, int], expected: bool) -> None:
    """A connect has one acknowledged byte more than it has sent. Who has it sent twice hides that."""
    assert was_accepted(made_up(**fields)) is expected


def test_before_linux_4_19_nobody_can_tell() -> None:
    """The counters are missing."""
    assert not was_accepted(made_up()[:192])


# --- nobody's: the kernel's own ---------------------------------------------------------------------------------------


def queued(to: socket.socket) -> list[socket.socket]:
    """Connected, and then only in the queue of a Unix socket: no process holds it."""
    (one,) = opening()()
    socket.send_fds(to, [b"."], [one.fileno()])
    one.close()
    return []


def test_a_socket_of_root_that_no_process_holds_is_named_and_stays(
    here: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """iSCSI and NFS have such sockets. The sandbox takes the place of the host's network namespace."""
    inode = os.fstat(here.sandbox.netns_fd).st_ino
    monkeypatch.setattr(judging, "_host_namespace", lambda: inode)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        here.client(lambda: queued(theirs), uid=0)
        done = cut_denied(locked(), here.scope)
        assert done.cut == ()
        (left,) = done.still_open
        assert (left.holders, left.user, left.why_open) == ((), "root", WhyOpen.NO_PROCESS)
        (fd,) = socket.recv_fds(ours, 1, 1)[1]
        with socket.socket(fileno=fd) as arrived:
            assert written(arrived) == "sent"
    (warning, *_) = connection_warnings(done, strict=False)
    assert "since root made them and no process holds them" in warning


def test_in_a_container_it_is_cut(here: Stage) -> None:
    """Outside the host's network namespace. Root of a container is denied, and could hide a connection so."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        here.client(lambda: queued(theirs), uid=0)
        (one,) = cut_denied(locked(0), here.scope).cut
    assert (one.user, one.why) == ("root", "container in lock 'web'")


# --- not sent yet -----------------------------------------------------------------------------------------------------


def test_a_cut_does_not_drop_what_is_corked(here: Stage) -> None:
    """What docs/security.md says of datagram-corked: a datagram that was begun before leaves with its old address."""

    def work() -> tuple[int, bytes]:
        with socket.socket(type=socket.SOCK_DGRAM) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
            server.bind((SERVICE, HIGH_PORT))
            server.settimeout(WITHIN_S)
            client.bind((SERVICE, 9000))
            client.connect((SERVICE, HIGH_PORT))
            client.send(b"request", socket.MSG_MORE)
            done = cut_denied(every_port(), Scope(here.scope.cgroup, every_namespace=False))
            client.setsockopt(socket.IPPROTO_UDP, UDP_CORK, 1)
            client.setsockopt(socket.IPPROTO_UDP, UDP_CORK, 0)
            return len(done.cut), server.recv(100)

    assert here.sandbox.call(work) == (1, b"request")
