# SPDX-License-Identifier: Apache-2.0
"""Constant connects by allowed and denied callers while everything changes. The wrong verdicts are counted.

``python3 -m tests.adversary.storm 1000000`` makes a million connects and prints the counts. It needs root.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from typing import Callable

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.kernel import children
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Policy
from tests.kernel.guards import BOTH, FAST, IPV4, IPV6, MAPPED, NEW_POLICY, OLD_POLICY, PORT, STRANGER

_GROUP = 62_001
_COUNTS = struct.Struct("=QQQQQ")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER 0: close without TIME_WAIT, which would use up the ports
_SLICE = 64
"""Connects that a forked child makes before it exits."""
_FLIPS_TO_AN_UPDATE = 10
_NICE = 10  # of the workers: without it the changes would starve on few processors
_BACKLOG = 4096  # net.core.somaxconn
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Tally:
    """Numbers of connects: the first two are of denied callers, the next two of allowed ones."""

    denied: int = 0
    slipped_through: int = 0
    connected: int = 0
    failed: int = 0
    error: int = 0
    """The errno of one connect that failed or slipped through; 0 if there is none, or if it connected."""

    @property
    def connects(self) -> int:
        """The number of all connects."""
        return self.denied + self.slipped_through + self.connected + self.failed

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.denied + other.denied,
            self.slipped_through + other.slipped_through,
            self.connected + other.connected,
            self.failed + other.failed,
            other.error or self.error,
        )


@dataclass(frozen=True)
class Outcome:
    """The result of a storm."""

    tally: Tally
    kinds: dict[str, Tally]
    flips: int
    updates: int


class _Counter:
    """A tally in shared memory, which a worker writes and its parent reads."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def add(self, more: Tally) -> None:
        """Adds to the tally. Only one process at a time may call this."""
        self._memory[: _COUNTS.size] = _COUNTS.pack(*_numbers(self.tally() + more))

    def tally(self) -> Tally:
        """The current tally."""
        return Tally(*_COUNTS.unpack(self._memory[: _COUNTS.size]))


def _numbers(tally: Tally) -> tuple[int, int, int, int, int]:
    return (tally.denied, tally.slipped_through, tally.connected, tally.failed, tally.error)


def _become(uid: int) -> None:
    become(uids=(uid,) * 3, gids=(_GROUP,) * 3, groups=())


def _connect(address: str, allowed: bool) -> Tally:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        try:
            one.connect((address, PORT))
        except PermissionError as refusal:
            return Tally(failed=1, error=refusal.errno or 0) if allowed else Tally(denied=1)
        except OSError as error:  # any error but a denial: the connect got past the guard
            number = error.errno or 0
            return Tally(failed=1, error=number) if allowed else Tally(slipped_through=1, error=number)
    return Tally(connected=1) if allowed else Tally(slipped_through=1)


def _listen(address: str) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listening.bind((address, PORT))
    listening.listen(_BACKLOG)
    return listening


def _accept_forever(listening: socket.socket) -> None:
    """Does nothing else, because with a full queue a connect waits a second for its next try."""
    while True:
        listening.accept()[0].close()


# --- workers --------------------------------------------------------------------------------------------------------


def _steady(uid: int, address: str) -> Callable[[_Counter], None]:
    """One process that keeps connecting."""

    def work(counter: _Counter) -> None:
        _become(uid)
        while True:
            counter.add(_connect(address, uid == BOTH))

    return work


def _forking(uid: int, address: str) -> Callable[[_Counter], None]:
    """One process after another, each of which connects a few times and exits."""

    def some(counter: _Counter) -> None:
        _become(uid)
        for _ in range(_SLICE):
            counter.add(_connect(address, uid == BOTH))

    def work(counter: _Counter) -> None:
        while True:
            status = os.waitpid(children.fork(lambda: some(counter)), 0)[1]
            if status:
                raise AssertionError(f"a child ended with status {status}")

    return work


def _changing(counter: _Counter) -> None:
    """Two threads that change their user between connects, and a third thread that stays a denied user."""
    lock = threading.Lock()

    def count(more: Tally) -> None:
        with lock:
            counter.add(more)

    def turn(uids: tuple[int, int]) -> None:
        become(gids=(_GROUP,) * 3, groups=())
        while True:
            for uid in uids:
                become(uids=(uids[0], uid, uids[1]))
                count(_connect(IPV4, uid == BOTH))

    def stay() -> None:
        become(gids=(_GROUP,) * 3, groups=(), uids=(STRANGER,) * 3)
        while True:
            count(_connect(MAPPED, allowed=False))

    threads = [threading.Thread(target=turn, args=(order,)) for order in ((BOTH, STRANGER), (STRANGER, BOTH))]
    threads.append(threading.Thread(target=stay))
    for thread in threads:
        thread.start()
    threads[0].join()


WORKERS: dict[str, Callable[[_Counter], None]] = {
    "denied, IPv4": _steady(STRANGER, IPV4),
    "denied, mapped": _steady(STRANGER, MAPPED),
    "allowed, IPv4": _steady(BOTH, IPV4),
    "allowed, IPv6": _steady(BOTH, IPV6),
    "denied, fork and exit": _forking(STRANGER, IPV6),
    "allowed, fork and exit": _forking(BOTH, MAPPED),
    "threads that change their IDs": _changing,
}


# --- the storm ------------------------------------------------------------------------------------------------------


def storm(connects: int, *, flips: int = 0, strict: bool = False) -> Outcome:
    """Makes at least so many connects, during at least so many changes of the policy or the programs."""
    versions = [(*FAST, ("IG_ANOTHER_VERSION", number)) for number in (1, 2)]
    policies = [policy._replace(strict=True) if strict else policy for policy in (OLD_POLICY, NEW_POLICY)]
    with Sandbox((IPV4, IPV6)) as sandbox:
        for address in (IPV4, IPV6):
            sandbox.serve_with(lambda address=address: _listen(address), _accept_forever)  # type: ignore[misc]
        backends = [EbpfBackend(sandbox.cgroup, defines) for defines in versions]
        try:
            backends[0].apply(policies[0])
            return _run_storm(sandbox, backends, policies, connects, flips)
        finally:
            backends[0].remove()


def _run_storm(
    sandbox: Sandbox, backends: list[EbpfBackend], policies: list[Policy], connects: int, at_least: int
) -> Outcome:
    counters = {name: _Counter() for name in WORKERS}

    def work(name: str) -> None:
        os.nice(_NICE)
        WORKERS[name](counters[name])

    pids = {name: sandbox.spawn(lambda name=name: work(name)) for name in WORKERS}  # type: ignore[misc]
    _until(lambda: all(counter.tally().connects for counter in counters.values()), counters, pids)
    flips = updates = 0
    while _total(counters).connects < connects or flips < at_least:
        if flips % _FLIPS_TO_AN_UPDATE == _FLIPS_TO_AN_UPDATE - 1:
            updates += 1
            backends[updates % 2].apply(policies[flips % 2])
        else:
            backends[updates % 2].change(policies[flips % 2])
        flips += 1
        before = _total(counters).connects
        _until(lambda before=before: _total(counters).connects > before, counters, pids)  # type: ignore[misc]
    kinds = {name: counter.tally() for name, counter in counters.items()}
    return Outcome(sum(kinds.values(), Tally()), kinds, flips, updates)


def _total(counters: dict[str, _Counter]) -> Tally:
    return sum((counter.tally() for counter in counters.values()), Tally())


def _until(reached: Callable[[], bool], counters: dict[str, _Counter], pids: dict[str, int]) -> None:
    """Returns when the condition holds. Fails when a worker has ended, or after a timeout."""
    watched = {name: os.pidfd_open(pid) for name, pid in pids.items()}
    try:
        deadline = time.monotonic() + _TIMEOUT_S
        while not reached():
            ended = select.select(list(watched.values()), [], [], 0.001)[0]
            if ended:
                raise AssertionError(f"a worker ended: {[name for name, fd in watched.items() if fd in ended]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"the storm made no progress at {_total(counters)}")
    finally:
        for fd in watched.values():
            os.close(fd)


def main(arguments: list[str]) -> int:
    """The command line. Returns 1 when any connect got the wrong verdict."""
    if not arguments or not arguments[0].isdigit():
        sys.stderr.write("usage: python3 -m tests.adversary.storm CONNECTS [--strict]\n")
        return 2
    begun = time.monotonic()
    outcome = storm(int(arguments[0]), strict="--strict" in arguments)
    for name, tally in outcome.kinds.items():
        sys.stdout.write(f"{name}: {tally.connects} connects, {tally}\n")
    sys.stdout.write(
        f"{outcome.tally.connects} connects in {time.monotonic() - begun:.0f} s, {outcome.flips} changes of policy, "
        f"{outcome.updates} with other programs: {outcome.tally}\n"
    )
    return 1 if outcome.tally.slipped_through or outcome.tally.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
