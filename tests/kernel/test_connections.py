# SPDX-License-Identifier: Apache-2.0
"""Which connections a policy cuts: real connections that are older than the policy, in a sandbox."""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
from collections.abc import Iterator

import pytest

from imds_guard.connections.cut import cut_denied
from imds_guard.kernel import children, namespaces, syscalls
from imds_guard.kernel.credentials import become
from imds_guard.kernel.listeners import family, sockaddr
from imds_guard.kernel.sock_diag import SockDiag
from imds_guard.policy.model import Endpoint, Lock, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS
from tests.command import ONE, SERVICE, SERVICE_V6, STAFF, STRANGER, TWO
from tests.kernel.clients import (
    NEEDS_THE_HOST,
    PORT,
    UNLOCKED,
    Open,
    Stage,
    keep_forever,
    locked,
    opening,
    pids,
    stage,
    written,
)

pytestmark = NEEDS_THE_HOST

MPTCP = 262  # IPPROTO_MPTCP in include/uapi/linux/in.h
MAX_CONNECTS = 4  # until one stays in SYN_SENT
MAPPED = f"::ffff:{SERVICE}"


@pytest.fixture
def here() -> Iterator[Stage]:
    with stage() as one:
        yield one


KINDS: dict[str, Open] = {
    "tcp": opening(),
    "tcp6": opening(SERVICE_V6),
    "tcp-mapped": opening(MAPPED),
    "udp": opening(kind=socket.SOCK_DGRAM),
    "udp6": opening(SERVICE_V6, socket.SOCK_DGRAM),
    "udp-mapped": opening(MAPPED, socket.SOCK_DGRAM),
}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_denied_connection_is_cut_and_reported(here: Stage, name: str) -> None:
    """The report names the process, its user, and both ends; an IPv4-mapped address is shown as IPv4."""
    client = here.client(KINDS[name])
    done = cut_denied(locked(ONE), here.scope)
    assert client.write() == ["ECONNABORTED"]
    (one,) = done.cut
    assert [(holder.pid, holder.user) for holder in one.holders] == [(client.pid, str(STRANGER))]
    assert one.remote == (ipaddress.ip_address(SERVICE_V6 if "6" in name else SERVICE), PORT)
    assert one.local[0] == one.remote[0]
    assert (one.protocol.value, one.why) == (name[:3], "not-listed in lock 'web'")
    assert (done.still_open, done.why_open) == ((), None)
    assert bool(done.errors) == bool(namespaces.network_namespaces().hidden)
    assert cut_denied(locked(ONE), here.scope).cut == ()


def test_mptcp_loses_its_subflow(here: Stage) -> None:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP).close()
    except OSError as error:
        pytest.skip(f"this kernel makes no MPTCP socket: {errno.errorcode[error.errno or 0]}")
    client = here.client(opening(protocol=MPTCP))
    done = cut_denied(locked(ONE), here.scope)
    assert pids(done.cut) == [client.pid]
    assert here.open_to() == 0


def test_an_unfinished_connect_is_cut(here: Stage) -> None:
    """In SYN_SENT: the queue of the listener is full."""
    full = here.sandbox.serve_with(_listen_to_one, lambda _: select.select([], [], []))
    client = here.client(_connects_until_one_waits)
    assert full
    done = cut_denied(_other_port(), here.scope)
    assert set(client.write()) == {"ECONNABORTED"}
    assert set(pids(done.cut)) == {client.pid}
    with SockDiag(here.sandbox.netns_fd) as diag:
        assert diag.sockets(socket.AF_INET, socket.IPPROTO_TCP, (2,)) == []


def _other_port() -> Policy:
    return make_policy([Lock("web", (Endpoint(ipaddress.ip_network(SERVICE), ((81, 81),)),))])


def _listen_to_one() -> socket.socket:
    one = socket.socket()
    one.bind((SERVICE, 81))
    one.listen(0)
    return one


def _connects_until_one_waits() -> list[socket.socket]:
    """Non-blocking connects. A listener with a full queue drops their first packet (listen(2))."""
    made = []
    for _ in range(MAX_CONNECTS):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex((SERVICE, 81))
        made.append(one)
    with SockDiag() as diag:
        assert diag.sockets(socket.AF_INET, socket.IPPROTO_TCP, (2,)), "no connect waits"
    return made


def test_a_half_closed_connection_is_cut(here: Stage) -> None:
    """A half-closed connection can still be read."""

    def half() -> list[socket.socket]:
        (one,) = opening()()
        one.shutdown(socket.SHUT_WR)
        return [one]

    client = here.client(half)
    assert pids(cut_denied(locked(ONE), here.scope).cut) == [client.pid]
    assert client.write() == ["ECONNABORTED"]


# --- which connections stay -----------------------------------------------------------------------------------------


def test_allowed_callers_keep_their_connections(here: Stage) -> None:
    """Allowed by user, by primary group, and by supplementary group."""
    clients = [
        here.client(opening(), uid=ONE),
        here.client(opening(), gid=STAFF),
        here.client(opening(), groups=(7, STAFF)),
    ]
    denied = here.client(opening())
    done = cut_denied(locked(ONE, groups=(STAFF,)), here.scope)
    assert [client.write() for client in clients] == [["sent"]] * 3
    assert (pids(done.cut), denied.write()) == ([denied.pid], ["ECONNABORTED"])


def test_connections_to_unlocked_endpoints_stay(here: Stage) -> None:
    """To another address, and to another port of the locked address."""
    here.sandbox.serve_with(lambda: _listening_at(SERVICE, 8080), keep_forever)
    others = [here.client(opening(UNLOCKED)), here.client(opening(port=8080))]
    assert cut_denied(locked(), here.scope).cut == ()
    assert [client.write() for client in others] == [["sent"]] * 2


def _listening_at(address: str, port: int) -> list[socket.socket]:
    one = socket.socket(family(address))
    one.bind(sockaddr(address, port))
    one.listen(8)
    return [one]


def test_an_incoming_connection_stays(here: Stage) -> None:
    """All ports are locked, so the remote end of the service's own sockets is locked, too."""
    client = here.client(opening())
    everything = make_policy([Lock("all", (Endpoint(ipaddress.ip_network("192.0.2.0/24"), ALL_PORTS),))])
    done = cut_denied(everything, here.scope)
    assert [(one.remote[1], one.holders[0].pid) for one in done.cut] == [(PORT, client.pid)]


def test_one_denied_holder_is_enough(here: Stage) -> None:
    """An allowed user has the socket, and a child that runs as another user has inherited it."""

    def two() -> list[socket.socket]:
        made = opening()()
        reader, writer = os.pipe()

        def stay() -> None:
            become((TWO,) * 3)
            os.write(writer, b".")
            select.select([], [], [])

        child = children.fork(stay)
        assert os.read(reader, 1) == b"."
        become((ONE,) * 3)
        assert child
        return made

    client = here.client(two, uid=0)
    assert cut_denied(locked(ONE, TWO), here.scope).cut == ()
    (one,) = cut_denied(locked(ONE), here.scope).cut
    assert sorted(holder.user for holder in one.holders) == [str(ONE), str(TWO)]
    assert client.write() == ["ECONNABORTED"]


@pytest.mark.parametrize(("allowed", "outcome"), [(STRANGER, "sent"), (ONE, "ECONNABORTED")])
def test_a_socket_without_a_holder_is_judged_by_the_user_who_made_it(here: Stage, allowed: int, outcome: str) -> None:
    """It is in the queue of a Unix socket, where no process has a descriptor of it (SCM_RIGHTS in unix(7)).

    The policy allows containers: outside the host's network namespace the socket is treated as one of a container.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def send_away() -> list[socket.socket]:
            (one,) = opening()()
            socket.send_fds(theirs, [b"."], [one.fileno()])
            one.close()
            return []

        here.client(send_away)
        done = cut_denied(locked(allowed, containers=Verdict.ALLOW), here.scope)
        (fd,) = socket.recv_fds(ours, 1, 1)[1]
        with socket.socket(fileno=fd) as arrived:
            assert written(arrived) == outcome
        assert [(one.holders, one.user) for one in done.cut] == ([] if outcome == "sent" else [((), str(STRANGER))])


def test_outside_the_host_namespace_a_socket_without_a_holder_is_treated_as_a_containers(here: Stage) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def send_away() -> list[socket.socket]:
            (one,) = opening()()
            socket.send_fds(theirs, [b"."], [one.fileno()])
            one.close()
            return []

        here.client(send_away)
        (one,) = cut_denied(locked(STRANGER), here.scope).cut
        assert one.why == "container in lock 'web'"


def test_a_process_in_a_container_is_denied_whatever_its_ids(here: Stage) -> None:
    """It has its own PID namespace. A policy that allows containers judges it by its IDs."""
    client = here.client(_in_pid_namespace(opening()), uid=0)
    assert cut_denied(locked(0, containers=Verdict.ALLOW), here.scope).cut == ()
    (one,) = cut_denied(locked(0), here.scope).cut
    assert one.why == "container in lock 'web'"
    assert client.write() == ["ECONNABORTED"]


def _in_pid_namespace(made: Open) -> Open:
    """Hands the connection to the first process of a new PID namespace, and closes its own descriptor."""

    def work() -> list[socket.socket]:
        syscalls.unshare(syscalls.CLONE_NEWPID)
        ours, theirs = socket.socketpair()
        (one,) = made()
        child = children.fork(lambda: (theirs.send(b"."), select.select([], [], [])))
        assert child
        assert ours.recv(1) == b"."
        # The client keeps its copy in the queue of a Unix socket, so that the child is the only holder.
        return [_Lent(one, *socket.socketpair())]  # type: ignore[list-item]

    return work


class _Lent:
    """A socket that its process holds only while it writes."""

    def __init__(self, one: socket.socket, mine: socket.socket, other: socket.socket) -> None:
        self._mine, self._other = mine, other
        socket.send_fds(other, [b"."], [one.fileno()])
        one.close()

    def _borrow(self) -> socket.socket:
        return socket.socket(fileno=socket.recv_fds(self._mine, 1, 1)[1][0])

    def getsockopt(self, level: int, option: int) -> int:
        with self._borrow() as one:
            value = one.getsockopt(level, option)
            socket.send_fds(self._other, [b"."], [one.fileno()])
        return value

    def send(self, text: bytes) -> int:
        with self._borrow() as one:
            return one.send(text)
