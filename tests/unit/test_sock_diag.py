# SPDX-License-Identifier: Apache-2.0
"""Sockets as NETLINK_SOCK_DIAG shows them, compared with the sockets themselves; their holders; namespaces."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.connections.cut import _in_turns
from imds_guard.connections.find import FoundSocket, _locked_endpoints
from imds_guard.connections.judge import Denied
from imds_guard.connections.values import Connection
from imds_guard.kernel import netns, processes
from imds_guard.kernel.children import run_in_child
from imds_guard.kernel.credentials import become
from imds_guard.kernel.namespaces import Namespace, network_namespaces
from imds_guard.kernel.sock_diag import CONNECTED, ESTABLISHED, LISTEN, SockDiag, Socket
from imds_guard.kernel.socket_holders import holders_of
from imds_guard.kernel.syscall_numbers import syscall_number
from imds_guard.kernel.untrusted import name_of
from imds_guard.policy.decide import Destination
from imds_guard.policy.model import Endpoint, Lock, Protocol, make_policy

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making a network namespace needs root")

FAMILIES = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
STRANGER = 46_001


def in_namespace(fn: Callable[[], object]) -> None:
    """Runs a test in a new network namespace, which has no other sockets."""

    def inside() -> None:
        netns.unshare_network([])
        fn()

    run_in_child(inside)


def connected(family: socket.AddressFamily, kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    """The sockets of a server and of its client."""
    server = socket.socket(family, kind)
    server.bind((FAMILIES[family], 0))
    if kind == socket.SOCK_STREAM:
        server.listen(8)
    client = socket.socket(family, kind)
    client.connect(server.getsockname())
    return server, client


def ends(one: Socket) -> tuple[str, int, str, int]:
    local, remote = (str(ipaddress.ip_address(packed)) for packed in (one.local, one.remote))
    return local, one.local_port, remote, one.remote_port


KINDS = [(socket.SOCK_STREAM, socket.IPPROTO_TCP, CONNECTED), (socket.SOCK_DGRAM, socket.IPPROTO_UDP, (ESTABLISHED,))]


@needs_root
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("kind", "protocol", "states"), KINDS)
def test_a_socket_is_described_correctly(
    family: socket.AddressFamily, kind: socket.SocketKind, protocol: int, states: tuple[int, ...]
) -> None:
    """Both addresses, the inode, the maker, and the state."""

    def work() -> None:
        server, client = connected(family, kind)
        with server, client, SockDiag() as diag:
            found = [one for one in diag.sockets(family, protocol, states) if one.inode]
            (one,) = found
            assert ends(one) == (*client.getsockname()[:2], *client.getpeername()[:2])
            assert (one.inode, one.uid, one.state) == (os.fstat(client.fileno()).st_ino, 0, ESTABLISHED)
            assert (one.family, one.protocol) == (family, protocol)
            assert one.cgroup_id is not None
            assert one.cgroup_id > 0

    in_namespace(work)


@needs_root
def test_a_listener_is_no_connection() -> None:
    """The kernel answers with it where there is none."""
    with socket.socket() as server, SockDiag() as diag:
        server.bind(("127.0.0.1", 0))
        server.listen()
        here = server.getsockname()
        with socket.create_connection(here) as client:
            found = diag.find_tcp(client.getsockname(), here)
            assert found is not None
            assert (found.state, found.local_port) == (ESTABLISHED, client.getsockname()[1])
        assert diag.find_tcp(here, ("127.0.0.9", 9)) is None


def test_the_maker_has_a_user_id() -> None:
    def work() -> None:
        become((STRANGER,) * 3)
        server, client = connected(socket.AF_INET, socket.SOCK_STREAM)
        with server, client, SockDiag() as diag:
            found = diag.sockets(socket.AF_INET, socket.IPPROTO_TCP, (LISTEN,))
            assert [one.uid for one in found] == [STRANGER]

    in_namespace(work)


@needs_root
def test_only_wanted_sockets_are_returned() -> None:
    """The function gets the packed remote address and port; listeners are returned only when their state is given."""

    def work() -> None:
        server, client = connected(socket.AF_INET, socket.SOCK_STREAM)
        seen: list[tuple[bytes, int]] = []

        def wanted(address: bytes, port: int) -> bool:
            seen.append((address, port))
            return bool(port == client.getpeername()[1])

        with server, client, SockDiag() as diag:
            (one,) = diag.sockets(socket.AF_INET, socket.IPPROTO_TCP, CONNECTED, wanted)
            assert one.remote_port == server.getsockname()[1]
            assert (b"\x7f\x00\x00\x01", client.getsockname()[1]) in seen
            (listener,) = diag.sockets(socket.AF_INET, socket.IPPROTO_TCP, (LISTEN,))
            assert (listener.state, listener.local_port) == (LISTEN, server.getsockname()[1])

    in_namespace(work)


@needs_root
def test_more_sockets_than_one_message_holds() -> None:
    def work() -> None:
        opened = []
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.1", 0))
        for _ in range(1500):
            one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            one.connect(server.getsockname())
            opened.append(one)
        with SockDiag() as diag:
            found = diag.sockets(socket.AF_INET, socket.IPPROTO_UDP, (ESTABLISHED,))
            assert {one.inode for one in found} == {os.fstat(one.fileno()).st_ino for one in opened}

    def inside() -> None:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        work()

    in_namespace(inside)


@needs_root
def test_destroy_ends_a_connection_for_both_sides_once() -> None:
    def work() -> None:
        server, client = connected(socket.AF_INET, socket.SOCK_STREAM)
        taken = server.accept()[0]
        with server, client, taken, SockDiag() as diag:
            (one,) = (
                found
                for found in diag.sockets(socket.AF_INET, socket.IPPROTO_TCP, CONNECTED)
                if found.inode == os.fstat(client.fileno()).st_ino
            )
            assert diag.destroy(one)
            assert not diag.destroy(one)
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED
            with pytest.raises(ConnectionResetError):
                taken.recv(1)

    in_namespace(work)


@needs_root
def test_destroy_spares_a_later_socket_with_the_same_addresses() -> None:
    """Its cookie is another one."""

    def work() -> None:
        server, client = connected(socket.AF_INET, socket.SOCK_DGRAM)
        with server, SockDiag() as diag:
            (one,) = diag.sockets(socket.AF_INET, socket.IPPROTO_UDP, (ESTABLISHED,))
            own, peer = client.getsockname(), client.getpeername()
            client.close()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.bind(own)
                other.connect(peer)
                assert not diag.destroy(one)
                assert other.send(b"x") == 1

    in_namespace(work)


@needs_root
def test_destroy_needs_cap_net_admin() -> None:
    def work() -> None:
        server, client = connected(socket.AF_INET, socket.SOCK_STREAM)
        with server, client, SockDiag() as diag:
            one = diag.sockets(socket.AF_INET, socket.IPPROTO_TCP, CONNECTED)[0]
            become((STRANGER,) * 3)
            with pytest.raises(PermissionError):
                diag.destroy(one)
            assert client.send(b"x") == 1

    in_namespace(work)


@needs_root
def test_a_protocol_without_sock_diag_is_an_error() -> None:
    def work() -> None:
        with SockDiag() as diag, pytest.raises(FileNotFoundError):
            diag.sockets(socket.AF_INET, 253, CONNECTED)  # reserved for experiments (RFC 3692)

    in_namespace(work)


@needs_root
def test_another_namespace_can_be_read() -> None:
    """The calling thread stays in its namespace."""

    def work() -> None:
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        server, client = connected(socket.AF_INET, socket.SOCK_DGRAM)
        netns.unshare_network([])
        here = os.stat("/proc/thread-self/ns/net").st_ino
        with server, client, SockDiag(fd) as diag, SockDiag() as own:
            assert len(diag.sockets(socket.AF_INET, socket.IPPROTO_UDP, (ESTABLISHED,))) == 1
            assert own.sockets(socket.AF_INET, socket.IPPROTO_UDP, (ESTABLISHED,)) == []
        assert os.stat("/proc/thread-self/ns/net").st_ino == here

    in_namespace(work)


def test_a_descriptor_that_is_no_namespace_is_an_error() -> None:
    with open("/proc/self/status", "rb") as file, pytest.raises(OSError, match="setns"):
        SockDiag(file.fileno())


# --- holders --------------------------------------------------------------------------------------------------------


def test_every_process_with_a_descriptor_is_a_holder() -> None:
    one, other = socket.socketpair()
    with one, other:
        inode = os.fstat(one.fileno()).st_ino
        assert holders_of(frozenset([inode])).pids == {inode: (os.getpid(),)}
        inherited = holders_of_in_child(inode)
        assert len(inherited) == 2
        assert os.getpid() in inherited
    assert holders_of(frozenset([inode])).pids == {}


def holders_of_in_child(inode: int) -> tuple[int, ...]:
    return run_in_child(lambda: holders_of(frozenset([inode])).pids[inode])


def _hang() -> None:
    os.read(os.pipe()[0], 1)


def _first_thread_ends() -> None:
    """exit(2) ends one thread. exit() of C and of Python ends all of them."""
    threading.Thread(target=_hang).start()
    ctypes.CDLL(None).syscall(syscall_number("exit"), 0)


@contextmanager
def _processes(*programs: Callable[[], object]) -> Iterator[list[int]]:
    """Children that are reaped only at the end."""
    pids = []
    for program in programs:
        pid = os.fork()
        if pid == 0:
            program()
            os._exit(0)
        pids.append(pid)
    try:
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _is_zombie(pid: int) -> bool:
    return b"State:\tZ" in Path(f"/proc/{pid}/status").read_bytes()


@needs_root
@pytest.mark.parametrize("hides", [lambda: network_namespaces().hidden, lambda: holders_of(frozenset([1])).hidden])
def test_a_zombie_is_not_counted_as_hidden(hides: Callable[[], int]) -> None:
    """A zombie holds no sockets. A process of which only the first thread has ended may hold some."""
    with _processes(lambda: None, _hang, _first_thread_ends) as (ended, lives, lives_on):
        deadline = time.monotonic() + 10
        while not (_is_zombie(ended) and _is_zombie(lives_on)):
            assert time.monotonic() < deadline
        for pid, expected in ((ended, 0), (lives, 1), (lives_on, 1)):

            def seen(pid: int = pid) -> int:
                vars(processes)["process_ids"] = lambda: [pid]  # in this child alone
                become((STRANGER,) * 3, (STRANGER,) * 3, ())
                return hides()

            assert run_in_child(seen) == expected


def test_without_inodes_no_process_is_read() -> None:
    found = holders_of(frozenset())
    assert (found.pids, found.hidden) == ({}, 0)


def test_the_name_of_a_process_is_empty_once_it_is_gone() -> None:
    assert name_of(os.getpid())
    assert name_of(2**22 + 1) == ""  # beyond PID_MAX_LIMIT in include/linux/threads.h


@needs_root
def test_the_own_namespace_comes_first_and_once() -> None:
    def work() -> None:
        found = network_namespaces().found
        own = os.stat("/proc/thread-self/ns/net").st_ino
        assert found[0] == Namespace(own, "/proc/thread-self/ns/net", os.getpid())
        assert len({one.inode for one in found}) == len(found)

    in_namespace(work)


# --- locked addresses -----------------------------------------------------------------------------------------------


def addresses() -> Iterator[tuple[str, bool]]:
    """An address, and whether 10.1.0.0/16, 192.0.2.1 and 2001:db8::/32 cover it."""
    yield from (("10.1.2.3", True), ("10.2.0.0", False), ("192.0.2.1", True), ("192.0.2.2", False))
    yield from (("2001:db8:1::1", True), ("2001:db9::1", False), ("::ffff:10.1.2.3", True), ("::ffff:10.2.2.3", False))
    yield from (("::10.1.2.3", False), ("::", False), ("0.0.0.0", False))


@pytest.mark.parametrize(("address", "expected"), list(addresses()))
def test_the_quick_test_agrees_with_the_locks(address: str, expected: bool) -> None:
    networks = ("10.1.0.0/16", "192.0.2.1", "2001:db8::/32")
    endpoints = tuple(Endpoint(ipaddress.ip_network(network), ((80, 81),)) for network in networks)
    policy = make_policy([Lock("x", endpoints)])
    wanted, unwanted = (_locked_endpoints(policy, protocol) for protocol in (Protocol.TCP, Protocol.UDP))
    packed = ipaddress.ip_address(address).packed
    assert [wanted(packed, port) for port in (79, 80, 81, 82)] == [False, expected, expected, False]
    assert not unwanted(packed, 80)


def test_sockets_are_ended_in_turns_of_their_makers() -> None:
    """So that nobody's, however many hang, come before the first one of another user."""
    here = Namespace(1, "", None)
    where = Destination(ipaddress.ip_address("192.0.2.1"), 80)
    several = []
    for number, uid in enumerate((7, 7, 7, 3, 100_000)):
        one = Socket(socket.AF_INET, socket.IPPROTO_TCP, ESTABLISHED, b"", 1, b"", 80, uid, number, None, b"")
        connection = Connection(Protocol.TCP, (where.address, 1), (where.address, 80), (), "", 1, "")
        several.append(Denied(FoundSocket(one, here, where, False), connection))
    assert [one.found.socket.inode for one in _in_turns(several)] == [3, 0, 4, 1, 2]
