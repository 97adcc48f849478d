# SPDX-License-Identifier: Apache-2.0
"""Ends sockets, in a child that can be abandoned: one thread for each, so that a socket that hangs delays no other.

Before v6.9 ("sock_diag: remove sock_diag_mutex") one mutex serialises all requests of sock_diag, of whomever. There, a
request that waits for a socket stops all others on the machine, those of ss(8), too. So each socket is locked once by a
copy of a holder's descriptor before sock_diag is asked to end it, and those for which that takes long come last, as do
those without a descriptor (in an io_uring, in the queue of a Unix socket). That is no guarantee: a socket may be locked
again meanwhile.

A thread that hangs stays until its socket is let go, and ends it then. Commands come again and again (a timer runs
verify --repair), so no other thread waits for that socket: pending.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Callable, NamedTuple

from imds_guard.kernel import children, pending, syscalls, untrusted
from imds_guard.kernel.namespaces import Namespace
from imds_guard.kernel.sock_diag import Socket, open_sock_diag
from imds_guard.kernel.tcp_birth import was_accepted

MAX_THREADS = 512
"""That hang. Each takes two descriptors and a few pages."""
_MAX_LOCKERS = 2048
"""Threads that wait for a locked socket by a copy of its descriptor, or for a file that was put in its place."""
_STACK = 256 << 10
_CHECK_S = 0.1
_TURN_S = 0.5
"""After so long a socket is ended although somebody may have locked it."""
_STUCK_S = 0.8
"""When as many threads as there may be hang for so long, the sockets behind them are left for the next call."""
_RESULT = struct.Struct("=III")
_LOCKING = {
    socket.IPPROTO_TCP: (socket.IPPROTO_TCP, socket.TCP_INFO),
    socket.IPPROTO_UDP: (socket.IPPROTO_IP, socket.IP_TOS),
}
"""Options for which the kernel locks the socket: tcp_get_info(), and do_ip_getsockopt() up to v6.6."""


class Ending(IntEnum):
    """What became of a socket."""

    CUT = 0
    GONE = 1
    """It was closed meanwhile."""
    ACCEPTED = 2
    """It stays: its peer has made the connection."""
    NOT_CUT = 3
    """It would have been cut, but nothing was to be cut."""
    REFUSED = 4
    """The kernel returned an error."""
    HELD = 5
    """No answer in time, to this command or to one before: a system call that does not end has locked the socket."""
    NOT_TRIED = 6
    """The time was over before its turn."""
    NOT_WANTED = 7
    """Another command has changed the policy meanwhile."""


class Target(NamedTuple):
    """A socket to end."""

    namespace: Namespace
    socket: Socket
    unless_accepted: bool
    """Leave it where its peer made the connection for certain."""
    pids: tuple[int, ...] = ()
    """Of processes that hold it."""


class Ended(NamedTuple):
    """``errno`` is that of REFUSED. HELD with EALREADY: a thread of another command waits for the socket."""

    ending: Ending
    errno: int = 0


_WAITING = Ended(Ending.HELD)
_WAITED_FOR = Ended(Ending.HELD, errno.EALREADY)


def end_each(
    targets: Sequence[Target], within_s: float, is_wanted: Callable[[], bool] = lambda: True, cut: bool = True
) -> list[Ended]:
    """Ends the sockets and says of each what became of it.

    ``is_wanted`` is asked before each one is cut, in the child, and by this process while it waits. Without ``cut``
    only those that have to be examined (``unless_accepted``) are, and none is cut.
    """
    results = [Ended(Ending.NOT_CUT)] * len(targets)
    asked = [number for number, one in enumerate(targets) if cut or one.unless_accepted]
    if not asked:
        return results
    for number in asked:
        results[number] = Ended(Ending.NOT_TRIED)
    reader, writer = os.pipe()
    try:
        work = _Work(targets, writer, is_wanted, cut)
        pid = children.fork_detached(lambda: work.run(asked), keep=(writer,))
    except OSError as error:
        for number in asked:
            results[number] = Ended(Ending.REFUSED, error.errno or 0)
        os.close(reader)
        return results
    finally:
        os.close(writer)
    try:
        _collect(reader, results, len(asked), time.monotonic() + within_s, is_wanted)
    finally:
        os.close(reader)
        children.abandon(pid)
    return results


def _collect(reader: int, results: list[Ended], expected: int, deadline: float, is_wanted: Callable[[], bool]) -> None:
    """Stops at the deadline, and when nothing is wanted any more: what has no answer then keeps its result.

    It stops earlier when all threads hang.
    """
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    rest = b""
    answered = time.monotonic()
    while expected and time.monotonic() < deadline:
        if not poll.poll(min(_CHECK_S, max(0.0, deadline - time.monotonic())) * 1000):
            if results.count(_WAITING) >= MAX_THREADS and time.monotonic() - answered > _STUCK_S:
                return
            if not is_wanted():
                unanswered = (Ending.HELD, Ending.NOT_TRIED)
                results[:] = [Ended(Ending.NOT_WANTED) if one.ending in unanswered else one for one in results]
                return
            continue
        more = os.read(reader, 65536)
        if not more:
            return
        answered = time.monotonic()
        rest += more
        whole = len(rest) - len(rest) % _RESULT.size
        for number, ending, code in _RESULT.iter_unpack(rest[:whole]):
            results[number] = Ended(Ending(ending), code)
            expected -= results[number] != _WAITING
        rest = rest[whole:]


class _Work:
    """In the child: a thread for each socket."""

    def __init__(self, targets: Sequence[Target], writer: int, is_wanted: Callable[[], bool], cut: bool) -> None:
        self._targets = targets
        self._writer = writer
        self._is_wanted = is_wanted
        self._cut = cut
        self._places = threading.BoundedSemaphore(MAX_THREADS)
        self._lockers = threading.BoundedSemaphore(_MAX_LOCKERS)
        self._inodes = frozenset(one.socket.inode for one in targets)
        self._descriptors: dict[int, dict[int, int]] = {}
        self._reading = threading.Lock()

    def run(self, numbers: Sequence[int]) -> None:
        """Does not return before its parent kills the process."""
        children.require_detached()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        threading.stack_size(_STACK)
        for number in numbers:
            self._places.acquire()
            try:
                threading.Thread(target=self._end, args=(number,), daemon=True).start()
            except RuntimeError:  # no more threads (pids.max)
                self._places.release()
                self._answer(number, Ended(Ending.REFUSED, errno.EAGAIN))
        threading.Event().wait()

    def _end(self, number: int) -> None:
        self._answer(number, _WAITING)  # until there is another answer
        one = self._targets[number]
        try:
            with pending.claimed(b"%d %d " % (one.namespace.inode, self._cut) + one.socket.identity) as is_ours:
                ended = self._ended(one) if is_ours else _WAITED_FOR
        except FileNotFoundError:
            ended = Ended(Ending.GONE)  # its namespace is gone
        except OSError as error:
            ended = Ended(Ending.REFUSED, error.errno or 0)
        self._places.release()
        self._answer(number, ended)

    def _ended(self, one: Target) -> Ended:
        self._wait_for_lock(one)
        with open_sock_diag(one.namespace) as diag:
            if one.unless_accepted:
                info = diag.tcp_info(one.socket)
                if info is None:
                    return Ended(Ending.GONE)
                if was_accepted(info):
                    return Ended(Ending.ACCEPTED)
            if not self._cut:
                return Ended(Ending.NOT_CUT)
            if not self._is_wanted():
                return Ended(Ending.NOT_WANTED)
            return Ended(Ending.CUT if diag.destroy(one.socket) else Ending.GONE)

    def _wait_for_lock(self, one: Target) -> None:
        """Returns when nobody has locked the socket, or when those that nobody has locked have had their turn."""
        is_free = threading.Event()
        if one.pids and self._lockers.acquire(blocking=False):
            try:
                threading.Thread(target=self._lock, args=(one, is_free), daemon=True).start()
            except RuntimeError:  # no more threads (pids.max): it is ended all the same
                self._lockers.release()
        is_free.wait(_TURN_S)

    def _lock(self, one: Target, is_free: threading.Event) -> None:
        try:
            self._lock_once(one, is_free)
        finally:
            self._lockers.release()

    def _lock_once(self, one: Target, is_free: threading.Event) -> None:
        for pid in one.pids:
            with contextlib.suppress(OSError, KeyError):
                copy = untrusted.copy_of_socket(pid, self._descriptors_of(pid)[one.socket.inode], one.socket.inode)
                try:
                    syscalls.getsockopt(copy, *_LOCKING[one.socket.protocol])
                finally:
                    os.close(copy)
                is_free.set()
                return

    def _descriptors_of(self, pid: int) -> dict[int, int]:
        """Reads them once for all targets, of which a process may hold thousands. Raises OSError."""
        with self._reading:
            if pid not in self._descriptors:
                self._descriptors[pid] = untrusted.sockets_of(pid, self._inodes).descriptors
            return self._descriptors[pid]

    def _answer(self, number: int, ended: Ended) -> None:
        """A write of so few bytes is whole (PIPE_BUF in pipe(7))."""
        os.write(self._writer, _RESULT.pack(number, ended.ending, ended.errno))
