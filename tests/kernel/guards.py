# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the eBPF backend: policies for one fake service, and callers that connect to it."""

from __future__ import annotations

import ipaddress
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from imds_guard.backends.ebpf import EbpfBackend, abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.folder import Folder
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.program import Defines
from imds_guard.kernel import bpf, bpffs
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
from imds_guard.policy.ports import normal_ports

IPV4, IPV6, MAPPED = "169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254"
PORT = 80

OLD, NEW, BOTH, STRANGER = 61_001, 61_002, 61_003, 61_004
"""User IDs: only on the old allowlist, only on the new one, on both, on neither."""

_GROUP = 62_001


def policy(*users: int, addresses: Sequence[str] = (IPV4, IPV6)) -> Policy:
    """The fake service, locked for everyone but these users."""
    web = normal_ports([(PORT, PORT)])
    endpoints = tuple(Endpoint(ipaddress.ip_network(address), tcp=web) for address in addresses)
    return make_policy([Lock("default", endpoints, Identities(frozenset(users)))])


OLD_POLICY = policy(OLD, BOTH)
NEW_POLICY = policy(NEW, BOTH)


FAST = (("IG_MAX_WALKED_GROUPS", 16), ("IG_MAX_SEARCHED_GROUPS", 2))
"""Settings for programs that the verifier checks quickly, for tests that load hundreds."""


@contextmanager
def guarded_sandbox(defines: Defines = ()) -> Iterator[tuple[Sandbox, EbpfBackend]]:
    """A namespace with the fake service, and a backend for its cgroup. The guard is removed at the end."""
    with Sandbox((IPV4, IPV6)) as sandbox:
        sandbox.serve((IPV4, IPV6), (PORT,))
        backend = EbpfBackend(sandbox.cgroup, defines)
        try:
            yield sandbox, backend
        finally:
            backend.remove()


def _connect(address: str) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as one:
        one.settimeout(5)
        try:
            one.connect((address, PORT))
        except PermissionError:
            return "denied"
        return "connected"


def passing(sandbox: Sandbox, users: Sequence[int] = (OLD, NEW, BOTH, STRANGER)) -> frozenset[int]:
    """The users who can connect. The outcome must be the same for IPv4, IPv6 and a mapped address."""
    outcomes = sandbox.call(lambda: {user: _fork_and_try(user) for user in users})
    assert all(len(set(seen)) == 1 for seen in outcomes.values()), outcomes
    return frozenset(user for user, seen in outcomes.items() if seen[0] == "connected")


def _fork_and_try(user: int) -> list[str]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become(uids=(user,) * 3, gids=(_GROUP,) * 3, groups=())
            os.write(writer, ",".join(_connect(address) for address in (IPV4, IPV6, MAPPED)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        outcomes = pipe.read()
    os.waitpid(pid, 0)
    return outcomes.split(",")


# --- a caller that connects all the time ------------------------------------------------------------------------------


class Storm:
    """A process that connects in a loop as one user, and counts the outcomes in shared memory."""

    _COUNTS = struct.Struct("=QQQ")  # connected, denied, other

    def __init__(self, sandbox: Sandbox, user: int, address: str = IPV4, port: int = PORT) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._begun, theirs = os.pipe()
        memory = self._memory

        def loop() -> None:
            become(uids=(user,) * 3, gids=(_GROUP,) * 3, groups=())
            counts = [0, 0, 0]
            target = (address, port)
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            reset = struct.pack("ii", 1, 0)  # SO_LINGER 0: no TIME_WAIT, so ports never run out
            while True:
                with socket.socket(family) as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                    one.settimeout(5)
                    try:
                        one.connect(target)
                        counts[0] += 1
                    except PermissionError:
                        counts[1] += 1
                    except OSError:
                        counts[2] += 1
                memory[:24] = self._COUNTS.pack(*counts)
                if sum(counts) == 1:
                    os.write(theirs, b".")

        sandbox.spawn(loop)
        os.close(theirs)
        assert select.select([self._begun], [], [], 20)[0], "the storm did not begin"
        os.close(self._begun)

    def counts(self) -> tuple[int, int, int]:
        """(connected, denied, other) so far."""
        connected, denied, other = self._COUNTS.unpack(self._memory[:24])
        return connected, denied, other

    def wait_for(self, more: int, within_s: float = 30.0) -> None:
        """Waits for this number of further tries, or fails."""
        goal = sum(self.counts()) + more
        deadline = time.monotonic() + within_s
        while sum(self.counts()) < goal:
            assert time.monotonic() < deadline, f"the storm stands still at {self.counts()}"
            os.sched_yield()


# --- what is in the kernel --------------------------------------------------------------------------------------------


def traces(cgroup: str) -> dict[str, int]:
    """The number of programs attached to a cgroup, and of pins for it; both are 0 when nothing is left."""
    with open_cgroup(cgroup) as opened:
        path = bpffs.find_bpffs()
        attached = sum(len(bpf.attached_programs(opened.fd, shape.attach_type)) for shape in abi.HOOKS.values())
        pins = [name for name in os.listdir(path) if str(opened.id) in name] if path else []
        return {"attached": attached, "pins": len(pins)}


def folder_of(cgroup: str) -> Folder:
    """The folder of pins of a cgroup's guard."""
    with open_cgroup(cgroup) as opened:
        return Folder(bpffs.require_bpffs(), PinLocation(opened).name)


@contextmanager
def other_layout(number: Map = Map.LOCKS, **fields: int) -> Iterator[None]:
    """A guard that is made inside the block has a map of another shape, as in another version."""
    shape = abi.SHAPES[number]
    abi.SHAPES[number] = shape._replace(**(fields or {"max_entries": 64}))
    try:
        yield
    finally:
        abi.SHAPES[number] = shape


def load_stranger(attach_type: int) -> int:
    """The fd of a program that is not ours and allows everything."""
    allow = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = 1; exit
    return bpf.prog_load(allow, "somebody_else", attach_type)
