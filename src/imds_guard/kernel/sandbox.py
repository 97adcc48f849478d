# SPDX-License-Identifier: Apache-2.0
"""A temporary network namespace and child cgroup, for tests and for the demonstration.

Nothing in it reaches the machine's network, and nothing of it remains after the ``with`` block.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Callable, TypeVar

from imds_guard.errors import Unsupported, system_text
from imds_guard.kernel import children, listeners, netns, syscalls
from imds_guard.kernel.children import ChildFailed
from imds_guard.kernel.mounts import mounts

T = TypeVar("T")

_EMPTY_WITHIN_S = 10.0


class Sandbox:
    """A context manager. The lo of the namespace has ``addresses``, beside 127.0.0.1 and ::1.

    ``cgroup`` is the path of the child cgroup, ``netns_fd`` a descriptor of the network namespace. The cgroup is made
    below the cgroup at ``below``, by default at the top of the cgroup2 mount.
    """

    def __init__(self, addresses: Iterable[str] = (), *, below: str | None = None) -> None:
        self.addresses = tuple(addresses)
        self._below = below
        self.cgroup = ""
        self.netns_fd = -1
        self._spawned: list[int] = []

    def __enter__(self) -> Sandbox:
        self.cgroup = _new_cgroup(self._below or _cgroup2_mount())
        try:
            self.netns_fd = _new_namespace(self.addresses)
        except BaseException:
            _remove_cgroup(self.cgroup)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.netns_fd)
        for pid in self._spawned:
            children.end(pid)
        self._spawned.clear()
        _remove_cgroup(self.cgroup)

    def join(self) -> None:
        """Moves the calling process into the cgroup, then its thread into the namespace.

        Call it before any socket is made: a socket belongs to the cgroup of the task that made it.
        """
        with open(os.path.join(self.cgroup, "cgroup.procs"), "w", encoding="ascii") as procs:
            procs.write(str(os.getpid()))
        netns.enter(self.netns_fd)

    def call(self, fn: Callable[[], T], *, timeout_s: float = 20.0) -> T:
        """Calls ``fn`` in a forked child in this cgroup and namespace; returns its result, which must be picklable.

        Raises the GuardError that ``fn`` raised; ChildFailed with the text of any other error, or when there is no
        result after ``timeout_s``.
        """

        def inside() -> T:
            self.join()
            return fn()

        return children.run_in_child(inside, timeout_s=timeout_s)

    def spawn(self, fn: Callable[[], object]) -> int:
        """Forks a child that runs ``fn`` in this cgroup and namespace; returns its process ID. The sandbox kills it.

        The child has joined both when this returns.
        """
        return self.serve_with(lambda: None, lambda _: fn())

    def end(self, pid: int) -> None:
        """Kills and reaps a child of spawn() or serve()."""
        children.end(pid)
        self._spawned.remove(pid)

    def serve(self, addresses: Sequence[str], ports: Sequence[int]) -> int:
        """Forks a child that accepts TCP connections and echoes UDP; returns its process ID once it listens."""
        return self.serve_with(lambda: listeners.listen(addresses, ports), listeners.answer_forever)

    def serve_with(self, listen: Callable[[], T], answer: Callable[[T], object]) -> int:
        """Forks a child that runs ``answer(listen())``; ``listen`` has returned when this returns the process ID."""
        ours, theirs = socket.socketpair()
        with ours, theirs:

            def serve() -> None:
                ours.close()
                self.join()
                listening = listen()
                theirs.send(b".")
                theirs.close()
                answer(listening)

            pid = children.fork(serve)
            self._spawned.append(pid)
            theirs.close()
            ours.settimeout(_EMPTY_WITHIN_S)
            if not ours.recv(1):
                raise ChildFailed("a child of the sandbox could not start; its error is on stderr")
        return pid


# --- the namespace --------------------------------------------------------------------------------------------------


def _new_namespace(addresses: Sequence[str]) -> int:
    """A descriptor of a new network namespace. The child that made it has ended; the descriptor keeps it alive."""
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def make() -> None:
            netns.unshare_network(addresses)
            with open("/proc/self/ns/net", "rb") as namespace:
                socket.send_fds(theirs, [b"."], [namespace.fileno()])

        children.run_in_child(make)
        (fd,) = socket.recv_fds(ours, 1, 1)[1]
    os.set_inheritable(fd, False)
    return fd


# --- the cgroup -----------------------------------------------------------------------------------------------------


def _cgroup2_mount() -> str:
    """The path where cgroup2 is mounted, or one through a descriptor of a new mount, which stays open."""
    found = mounts("cgroup2")
    if found:
        return found[0].path
    try:
        fd = syscalls.detached_mount("cgroup2")
    except OSError as error:
        raise Unsupported(f"mounting cgroup2 for a sandbox: {system_text(error)}; run it as root") from error
    return f"/proc/{os.getpid()}/fd/{fd}"


def _new_cgroup(below: str) -> str:
    path = os.path.join(below, f"imds-guard-sandbox-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        os.mkdir(path, 0o755)
    except OSError as error:
        raise Unsupported(f"making the cgroup {path}: {system_text(error)}; run it as root") from error
    return path


def _remove_cgroup(path: str) -> None:
    """Kills every process of the cgroup, waits until it is empty and removes it."""
    deadline = time.monotonic() + _EMPTY_WITHIN_S
    with open(os.path.join(path, "cgroup.events"), "rb", buffering=0) as events:
        changes = select.poll()
        changes.register(events, select.POLLPRI)
        _kill_all(path)
        while b"populated 1" in os.pread(events.fileno(), 4096, 0):
            if not changes.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise ChildFailed(f"the cgroup {path} still has processes after {_EMPTY_WITHIN_S:g} s")
            _kill_all(path)
    os.rmdir(path)


def _kill_all(path: str) -> None:
    """Kills every process of the cgroup. Only processes of the sandbox can be in it.

    cgroup.kill: since Linux 661ee6281892 ("cgroup: introduce cgroup.kill") (in v5.14).
    """
    kill = os.path.join(path, "cgroup.kill")
    if os.path.exists(kill):
        with open(kill, "w", encoding="ascii") as switch:
            switch.write("1")
        return
    with open(os.path.join(path, "cgroup.procs"), encoding="ascii") as procs:
        for pid in procs:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
