# SPDX-License-Identifier: Apache-2.0
"""A sandbox has no way to the machine's network, and leaves nothing."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import struct
import threading
from contextlib import suppress

import pytest

from imds_guard.errors import Unsupported
from imds_guard.kernel import netns, syscalls
from imds_guard.kernel.children import ChildFailed, end, fork, run_in_child
from imds_guard.kernel.credentials import become
from imds_guard.kernel.listeners import family, sockaddr
from imds_guard.kernel.sandbox import Sandbox

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces and cgroups needs root")

_PID = struct.Struct("=i")
ADDRESSES = ("192.0.2.1", "192.0.2.2", "2001:db8::1", "fe80::a9fe:a9fe")
TIMEOUT_S = 10.0


def _peer(address: str, *, device: bool = False) -> str:
    with socket.socket(family(address)) as one:
        one.settimeout(5)
        if device:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        one.connect(sockaddr(address, 80))
        return str(one.getpeername()[0])


def _echo(address: str) -> bytes:
    with socket.socket(family(address), socket.SOCK_DGRAM) as one:
        one.settimeout(5)
        one.sendto(b"word", sockaddr(address, 80))
        return one.recv(16)


@pytest.mark.parametrize("address", [*ADDRESSES, "127.0.0.1", "::1", "::ffff:192.0.2.1"])
def test_addresses_answer_inside(address: str) -> None:
    """When serve() returns, every address answers by TCP and UDP, link-local and loopback ones included."""
    with Sandbox(ADDRESSES) as sandbox:
        sandbox.serve([*ADDRESSES, "127.0.0.1", "::1"], [80])
        assert sandbox.call(lambda: _peer(address)) == address
        if not address.startswith("::ffff:"):
            assert sandbox.call(lambda: _echo(address)) == b"word"


def test_the_first_ipv4_address_is_the_primary_one() -> None:
    """On a socket that is bound to lo, 0.0.0.0 leads to it; on any other socket to 127.0.0.1."""
    with Sandbox(ADDRESSES) as sandbox:
        sandbox.serve(["192.0.2.1", "127.0.0.1"], [80])
        assert sandbox.call(lambda: _peer("0.0.0.0", device=True)) == "192.0.2.1"
        assert sandbox.call(lambda: _peer("0.0.0.0")) == "127.0.0.1"


def test_lo_is_the_only_interface() -> None:
    """It has no other interface, and it is not the machine's own namespace."""
    with Sandbox(ADDRESSES) as sandbox:
        assert sandbox.call(lambda: [name for _, name in socket.if_nameindex()]) == ["lo"]
        assert sandbox.call(lambda: os.stat("/proc/self/ns/net").st_ino) == os.fstat(sandbox.netns_fd).st_ino
        assert os.fstat(sandbox.netns_fd).st_ino != os.stat("/proc/self/ns/net").st_ino


def test_a_child_is_in_the_cgroup() -> None:
    """The calling process stays in its own cgroup."""
    with Sandbox() as sandbox:
        name = os.path.basename(sandbox.cgroup)
        assert f"/{name}\n" in sandbox.call(_own_cgroups)
        assert name not in _own_cgroups()


def _own_cgroups() -> str:
    with open("/proc/self/cgroup", encoding="ascii") as lines:
        return lines.read()


def test_a_sandbox_below_another() -> None:
    """``below`` makes the cgroup inside another one, which can be removed after it."""
    with Sandbox() as outer, Sandbox(below=outer.cgroup) as inner:
        assert os.path.dirname(inner.cgroup) == outer.cgroup
    assert not os.path.exists(outer.cgroup)


def test_a_cgroup_that_can_not_be_made_is_an_error() -> None:
    """The sentence has the path and the errno, and no namespace is left open."""
    open_before = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(Unsupported, match=r"making the cgroup /proc/imds-guard.*ENOENT"),
        Sandbox(below="/proc"),
    ):
        pass
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_an_invalid_address_leaves_no_cgroup() -> None:
    """The cgroup that was made before the failure is removed."""
    sandbox = Sandbox(["no address"])
    with pytest.raises(ChildFailed, match="does not appear to be an IPv4 or IPv6 address"):
        sandbox.__enter__()
    assert sandbox.cgroup
    assert not os.path.exists(sandbox.cgroup)


def test_a_listener_that_can_not_bind_is_an_error() -> None:
    """serve() returns only when the listener listens."""
    with Sandbox() as sandbox, pytest.raises(ChildFailed, match="a child of the sandbox could not start"):
        sandbox.serve(["192.0.2.7"], [80])


# --- results of a child ---------------------------------------------------------------------------------------------


def test_a_large_result_is_complete() -> None:
    """It is larger than the buffer of a pipe."""
    assert run_in_child(lambda: b"x" * 3_000_000) == b"x" * 3_000_000


def test_a_process_with_many_descriptors_gets_its_result() -> None:
    """select(2) can't wait for a descriptor above 1023."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limits[1]))
    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        assert run_in_child(lambda: "result") == "result"
    finally:
        for fd in many:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_an_error_in_a_child_is_raised_as_text() -> None:
    """The text has the kind of the error and the traceback."""
    with pytest.raises(ChildFailed, match=r"(?s)in _fails.*LookupError: no such thing"):
        run_in_child(_fails)


def _fails() -> None:
    raise LookupError("no such thing")


def test_a_guard_error_in_a_child_keeps_its_class() -> None:
    """Its exit status is kept with it."""
    with pytest.raises(Unsupported, match=r"^not here$"):
        run_in_child(_refuses)


def _refuses() -> None:
    raise Unsupported("not here")


def test_a_child_that_hangs_is_killed_at_its_deadline() -> None:
    """It has been reaped afterwards."""
    reader, writer = os.pipe()
    try:
        with pytest.raises(ChildFailed, match="no result before its deadline"):
            run_in_child(lambda: _write_pid_and_hang(writer), timeout_s=0.5)
        with pytest.raises(ChildProcessError):
            os.waitpid(_read_pid(reader), os.WNOHANG)
    finally:
        os.close(reader)
        os.close(writer)


def _read_pid(reader: int) -> int:
    pid: int = _PID.unpack(os.read(reader, _PID.size))[0]
    return pid


def _write_pid_and_hang(writer: int) -> None:
    os.write(writer, _PID.pack(os.getpid()))
    select.select([], [], [])


def test_a_child_dies_with_its_parent() -> None:
    """Its parent ends by SIGKILL, so nobody could end the child."""
    reader, writer = os.pipe()

    def say_and_wait() -> None:
        os.write(writer, _PID.pack(os.getpid()))
        signal.pause()

    def parent() -> None:
        fork(say_and_wait)
        signal.pause()

    middle = fork(parent)
    child = os.pidfd_open(*_PID.unpack(os.read(reader, _PID.size)))
    try:
        assert not select.select([child], [], [], 0)[0]
        end(middle)
        assert select.select([child], [], [], TIMEOUT_S)[0]
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(child, signal.SIGKILL)
        for fd in (child, reader, writer):
            os.close(fd)


def test_a_child_that_ends_early_is_an_error_at_once() -> None:
    """The parent does not wait for the deadline."""
    with pytest.raises(ChildFailed, match="ended before it had a result"):
        run_in_child(lambda: os._exit(0), timeout_s=60)


# --- nothing is left ------------------------------------------------------------------------------------------------


def _spawn_family(sandbox: Sandbox) -> list[int]:
    """A child that hangs, and a grandchild whose parent has ended. Only the sandbox ends them."""
    reader, writer = os.pipe()
    sandbox.spawn(lambda: _write_pid_and_hang(writer))
    sandbox.call(lambda: _orphan(writer))
    pids = [os.pidfd_open(_read_pid(reader)) for _ in range(2)]
    os.close(reader)
    os.close(writer)
    return pids


def _orphan(writer: int) -> None:
    """By os.fork(): a child of children.fork() would die with its parent."""
    if os.fork() == 0:
        _write_pid_and_hang(writer)


def _ended(pidfds: list[int]) -> bool:
    """True when each process behind a descriptor has ended.

    Their cgroup may be empty a moment earlier: do_exit() calls cgroup_exit() before exit_notify().
    """
    ready = [one for one in pidfds if select.select([one], [], [], TIMEOUT_S)[0]]
    for one in pidfds:
        os.close(one)
    return ready == pidfds


def test_nothing_is_left() -> None:
    """No process, no cgroup, no descriptor."""
    open_before = len(os.listdir("/proc/self/fd"))
    with Sandbox(ADDRESSES) as sandbox:
        sandbox.serve(ADDRESSES, [80])
        processes = _spawn_family(sandbox)
    assert _ended(processes)
    assert not os.path.exists(sandbox.cgroup)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_nothing_is_left_after_a_failure() -> None:
    """Nothing is left when the block raises an error."""
    sandbox = Sandbox(ADDRESSES)
    processes: list[int] = []

    def fail() -> None:
        with sandbox:
            processes.extend(_spawn_family(sandbox))
            raise LookupError("of the block")

    with pytest.raises(LookupError, match="of the block"):
        fail()
    assert _ended(processes)
    assert not os.path.exists(sandbox.cgroup)


# --- identities -----------------------------------------------------------------------------------------------------


def _ids() -> tuple[list[int], list[int], int]:
    """The four user IDs, the four group IDs and the number of groups of the calling thread, as proc(5) shows them."""
    fields = {}
    with open("/proc/thread-self/status", encoding="ascii") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            fields[key] = value.split()
    return [int(word) for word in fields["Uid"]], [int(word) for word in fields["Gid"]], len(fields["Groups"])


def _become_and_show(**ids: object) -> tuple[list[int], list[int], int]:
    become(**ids)  # type: ignore[arg-type]
    return _ids()


def test_become_sets_every_id() -> None:
    """Real, effective, saved and filesystem IDs can all differ."""
    shown = run_in_child(
        lambda: _become_and_show(uids=(7001, 0, 7003), gids=(8001, 8002, 8003), groups=(), fsuid=7004, fsgid=8004)
    )
    assert shown == ([7001, 0, 7003, 7004], [8001, 8002, 8003, 8004], 0)


def test_fs_ids_follow_the_effective_ones() -> None:
    """setresuid(2) and setresgid(2) do so."""
    shown = run_in_child(lambda: _become_and_show(uids=(7001, 7002, 7003), gids=(8001, 8002, 8003), groups=(8005,)))
    assert shown == ([7001, 7002, 7003, 7002], [8001, 8002, 8003, 8002], 1)


def test_become_sets_as_many_groups_as_the_kernel_allows() -> None:
    """NGROUPS_MAX is 65,536."""
    assert run_in_child(lambda: _become_and_show(groups=range(9000, 9000 + 65536)))[2] == 65536


def test_become_changes_one_thread() -> None:
    """The C library would change all threads."""

    def in_thread() -> tuple[list[int], list[int]]:
        seen: list[list[int]] = []
        thread = threading.Thread(target=lambda: seen.append(_become_and_show(uids=(7001,) * 3, gids=(8001,) * 3)[0]))
        thread.start()
        thread.join()
        return seen[0], _ids()[0]

    assert run_in_child(in_thread) == ([7001] * 4, [0] * 4)


def test_a_filesystem_id_that_is_not_set_is_an_error() -> None:
    """setfsuid(2) itself reports no failure."""
    with pytest.raises(ChildFailed, match=r"PermissionError: setfsuid\(7009\) did not change the ID"):
        run_in_child(lambda: become(uids=(7001, 7001, 7001), fsuid=7009))


def test_an_id_without_the_privilege_is_an_error() -> None:
    """The error has the errno of the call."""

    def twice() -> None:
        become(uids=(7001, 7001, 7001))
        become(uids=(0, 0, 0))

    with pytest.raises(ChildFailed, match=r"Operation not permitted: 'setresuid\(0, 0, 0\)'"):
        run_in_child(twice)


def test_unshare_and_enter() -> None:
    """enter() returns to a namespace that unshare() has left."""

    def there_and_back() -> tuple[bool, bool]:
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        before = os.fstat(own).st_ino
        syscalls.unshare(syscalls.CLONE_NEWNET)
        away = os.stat("/proc/thread-self/ns/net").st_ino
        netns.enter(own)
        return away != before, os.stat("/proc/thread-self/ns/net").st_ino == before

    assert run_in_child(there_and_back) == (True, True)
