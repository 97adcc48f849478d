# SPDX-License-Identifier: Apache-2.0
"""Real connections that are older than a policy. The scope of every search is the cgroup of a sandbox."""

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
from collections.abc import Iterator, Sequence
from typing import Any, Callable

import pytest

from imds_guard.connections.cut import MAX_SEARCHES, cut_denied, find_denied
from imds_guard.connections.find import Scope
from imds_guard.connections.values import Connection, CutResult, WhyOpen
from imds_guard.kernel import children, namespaces, syscalls
from imds_guard.kernel.credentials import become
from imds_guard.kernel.listeners import family, listen, sockaddr
from imds_guard.kernel.privileges import CAP_NET_ADMIN, CAP_SYS_ADMIN
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.kernel.sock_diag import CONNECTED, SockDiag
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS
from imds_guard.present import connections as present_connections
from tests.command import ONE, SERVICE, SERVICE_V6, STAFF, STRANGER, TWO, Guard
from tests.kernel.places import without_capabilities
from tests.kernel.rules_in_a_sandbox import NO_GROUP

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces and cgroups needs root"),
    pytest.mark.skipif(
        os.stat("/proc/self/ns/pid").st_ino != 0xEFFFFFFC, reason="in a container all callers are denied"
    ),
]

WITHIN_S = 20.0
MPTCP = 262  # IPPROTO_MPTCP in include/uapi/linux/in.h
MAX_CONNECTS = 4  # until one stays in SYN_SENT
MAPPED = f"::ffff:{SERVICE}"
UNLOCKED = "192.0.2.9"
PORT = 80
WEB = ((PORT, PORT),)


def locked(
    *users: int, groups: Sequence[int] = (), mode: Mode = Mode.ENFORCE, containers: Verdict = Verdict.DENY
) -> Policy:
    """Locks port 80 of the service, TCP and UDP. Only these users and groups are allowed."""
    endpoints = tuple(Endpoint(ipaddress.ip_network(one), WEB, WEB) for one in (SERVICE, SERVICE_V6))
    lock = Lock("web", endpoints, Identities(frozenset(users), frozenset(groups)))
    return make_policy([lock], mode, containers)


# --- clients --------------------------------------------------------------------------------------------------------

Open = Callable[[], list[socket.socket]]


def opening(to: str = SERVICE, kind: int = socket.SOCK_STREAM, protocol: int = 0, port: int = PORT) -> Open:
    """Makes one connected socket."""

    def made() -> list[socket.socket]:
        one = socket.socket(family(to), kind, protocol)
        one.settimeout(WITHIN_S)
        one.connect(sockaddr(to, port))
        return [one]

    return made


class Client:
    """A process with connections. It is controlled through a pair of sockets."""

    def __init__(self, pid: int, line: socket.socket) -> None:
        self.pid = pid
        self._line = line

    def write(self) -> list[str]:
        """Writes to each of its sockets. Returns ``sent`` or the errno for each."""
        self._line.send(b"w")
        return self._line.recv(4096).decode().split()


def _serve(line: socket.socket, sockets: list[socket.socket]) -> None:
    line.send(b".")
    while line.recv(1):
        line.send(" ".join(map(_written, sockets)).encode() or b"-")


def _written(one: socket.socket) -> str:
    """The pending error of a socket; else the result of a write."""
    pending = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if pending:
        return errno.errorcode[pending]
    try:
        one.send(b"x")
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "sent"


class Stage:
    """A sandbox with a service, and clients in it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.scope = Scope(sandbox.cgroup)
        self._lines: list[socket.socket] = []

    def client(
        self,
        made: Open,
        *,
        uid: int = STRANGER,
        gid: int = NO_GROUP,
        groups: Sequence[int] = (),
        before: Callable[[], object] = lambda: None,
    ) -> Client:
        """A process with these IDs. Its sockets are connected when this returns."""
        ours, theirs = socket.socketpair()
        ours.settimeout(WITHIN_S)
        self._lines.append(ours)

        def work() -> None:
            ours.close()
            before()
            become((uid,) * 3, (gid,) * 3, groups)
            _serve(theirs, made())

        pid = self.sandbox.spawn(work)
        theirs.close()
        assert ours.recv(1) == b"."
        return Client(pid, ours)

    def open_to(self, address: str = SERVICE, port: int = PORT) -> int:
        """How many TCP sockets in the namespace are connected to this address and port."""
        wanted = (ipaddress.ip_address(address).packed, port)
        with SockDiag(self.sandbox.netns_fd) as diag:
            found = diag.sockets(family(address), socket.IPPROTO_TCP, CONNECTED)
        return sum((one.remote, one.remote_port) == wanted for one in found)

    def close(self) -> None:
        """Lets the clients end."""
        for line in self._lines:
            line.close()


def _keep_forever(listening: list[socket.socket]) -> None:
    """Accepts every connection and closes none."""
    kept = []
    streams = {one.fileno(): one for one in listening if one.type == socket.SOCK_STREAM}
    poll = select.poll()
    for fd in streams:
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            kept.append(streams[fd].accept()[0])


@contextlib.contextmanager
def stage(addresses: Sequence[str] = (SERVICE, SERVICE_V6, UNLOCKED)) -> Iterator[Stage]:
    with Sandbox(addresses) as sandbox:
        sandbox.serve_with(lambda: listen(addresses, (PORT,)), _keep_forever)
        one = Stage(sandbox)
        try:
            yield one
        finally:
            one.close()


@pytest.fixture
def here() -> Iterator[Stage]:
    with stage() as one:
        yield one


def pids(several: Sequence[Connection]) -> list[int]:
    return sorted(holder.pid for one in several for holder in one.holders)


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
    assert bool(done.errors) == bool(namespaces.network_namespaces()[1])
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
    here.sandbox.serve_with(lambda: _listening_at(SERVICE, 8080), _keep_forever)
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
            assert _written(arrived) == outcome
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
        _wait_until(lambda: _is_empty(below))
        os.rmdir(below)


def _join(cgroup: str) -> None:
    with open(f"{cgroup}/cgroup.procs", "w", encoding="ascii") as file:
        file.write(str(os.getpid()))


def _is_empty(cgroup: str) -> bool:
    with open(f"{cgroup}/cgroup.procs", encoding="ascii") as file:
        return not file.read()


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < deadline, "the condition did not become true"
        select.select([], [], [], 0.005)


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
        found = {one.inode: one for one in namespaces.network_namespaces()[0]}
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
            _wait_until(lambda: bool(diag.sockets(socket.AF_INET, socket.IPPROTO_TCP, CONNECTED)))
        assert child
        return []

    here.client(connects_again)
    done = cut_denied(locked(), here.scope)
    while done.why_open != WhyOpen.REOPENED:  # a search between two connections finds none, and ends
        assert done.still_open == ()
        done = cut_denied(locked(), here.scope)
    assert len(done.cut) >= MAX_SEARCHES


# --- many -----------------------------------------------------------------------------------------------------------


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
    assert len(done.cut) == 2000
    assert set(pids(done.cut)) == {client.pid}
    assert allowed.write() == ["sent"]
    lines = present_connections.connection_lines(done)
    assert lines[0].startswith("cut 2000 open connections (searched ")
    assert lines[-1] == "  and 1988 more (--json has them all)"
    assert len(lines) == 14


# --- the commands ---------------------------------------------------------------------------------------------------


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
