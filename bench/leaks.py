# SPDX-License-Identifier: Apache-2.0
"""Starts and stops the guard thousands of times and counts what is left. No number may grow.

Run as root from the top of the tree: /usr/bin/python3 -m bench.leaks [--times 10000] [--backend ebpf|iptables|both].
eBPF runs in a child cgroup, iptables in its own network namespace. The programs are compiled once.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "src")]

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.backends.iptables import IptablesBackend
from imds_guard.kernel import bpf, bpffs
from imds_guard.kernel.bpf import syscall
from imds_guard.kernel.bpf.attr import GetId
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.lockfile import FOLDER
from imds_guard.kernel.run import run
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
from imds_guard.policy.ports import ALL_PORTS

FAST = (("IG_MAX_WALKED_GROUPS", 16), ("IG_MAX_SEARCHED_GROUPS", 2))
"""Small loop bounds, so that the verifier is fast: thousands of programs are loaded."""

_MEMORY_V1 = "/sys/fs/cgroup/memory"
_SETTLE_S = 10.0


def _policy(number: int) -> Policy:
    """A policy that changes with the number."""
    where = tuple(
        Endpoint(ipaddress.ip_network(one), ALL_PORTS, ALL_PORTS) for one in ("169.254.169.254", "fd00:ec2::254")
    )
    return make_policy([Lock("leaks", where, Identities(frozenset({61_001 + number % 100}), frozenset({62_001})))])


# --- what is counted ------------------------------------------------------------------------------------------------


def descriptors() -> int:
    """Number of open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd")) - 1  # without the one of the listing


def kernel_memory_kib() -> int:
    """Memory of the kernel on the whole machine, including what it uses for other processes."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        values = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return values["SUnreclaim"] + values["Percpu"] + values["VmallocUsed"]


class Charged:
    """A memory cgroup (v1) for this process, which counts the kernel's memory for its maps and programs."""

    def __init__(self) -> None:
        self._home = _memory_cgroup()
        self._path = os.path.join(_MEMORY_V1, f"imds-guard-leaks-{os.getpid()}") if self._home else ""
        if self._path:
            os.mkdir(self._path)
            self._join(self._path)

    def kib(self) -> int:
        """Kernel memory in KiB; -1 without such a cgroup."""
        if not self._path:
            return -1
        with open(os.path.join(self._path, "memory.kmem.usage_in_bytes"), encoding="ascii") as file:
            return int(file.read()) // 1024

    def close(self) -> None:
        """Moves the process back to its own cgroup."""
        if self._path:
            self._join(self._home)
            os.rmdir(self._path)

    def _join(self, path: str) -> None:
        with open(os.path.join(path, "cgroup.procs"), "w", encoding="ascii") as procs:
            procs.write(str(os.getpid()))


def _memory_cgroup() -> str:
    """The path of this process's v1 memory cgroup; "" where there is none."""
    with open("/proc/self/cgroup", encoding="ascii") as lines:
        for line in lines:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if "memory" in controllers.split(",") and os.path.isdir(_MEMORY_V1 + path):
                return _MEMORY_V1 + path
    return ""


@dataclass
class Seen:
    """The IDs of all maps, programs and links that were made. The kernel never reuses an ID."""

    maps: set[int] = field(default_factory=set)
    programs: set[int] = field(default_factory=set)
    links: set[int] = field(default_factory=set)

    def note(self, backend: EbpfBackend, cgroup: str) -> None:
        """Adds the IDs of a running guard."""
        for hook in backend.state().hooks:
            for one in hook.attached:
                self.programs.add(one.id)
                self.maps.update(one.map_ids)
        with open_cgroup(cgroup) as opened:
            for fd, link in bpf.links_of_cgroup(opened.id):
                os.close(fd)
                self.links.add(link.id)

    def alive(self) -> dict[str, int]:
        """How many still exist. The kernel frees them some time after the last reference is gone."""
        kinds = (
            ("maps", bpf.Command.MAP_GET_FD_BY_ID, self.maps),
            ("programs", bpf.Command.PROG_GET_FD_BY_ID, self.programs),
            ("links", bpf.Command.LINK_GET_FD_BY_ID, self.links),
        )
        deadline = time.monotonic() + _SETTLE_S
        while True:
            found = {name: sum(_is_there(command, one) for one in ids) for name, command, ids in kinds}
            if not any(found.values()) or time.monotonic() > deadline:
                return found
            os.sched_yield()


def _is_there(command: bpf.Command, identity: int) -> bool:
    fd = syscall.call(command, GetId(id=identity), expected=(errno.ENOENT,))
    if fd >= 0:
        os.close(fd)
    return fd >= 0


# --- the rounds -----------------------------------------------------------------------------------------------------


@contextmanager
def ebpf_rounds() -> Iterator[Callable[[int, bool], dict[str, int]]]:
    """Yields a function that starts and stops the eBPF guard once, and on request counts what is left."""
    with Sandbox() as sandbox:
        backend, seen, charged = EbpfBackend(sandbox.cgroup, FAST), Seen(), Charged()

        def once(number: int, count: bool) -> dict[str, int]:
            backend.apply(_policy(number))
            if count or number % 50 == 0:
                seen.note(backend, sandbox.cgroup)
            backend.remove()
            if not count:
                return {}
            with open_cgroup(sandbox.cgroup) as opened:
                identity = str(opened.id)
            pins = [name for name in os.listdir(bpffs.require_bpffs()) if identity in name]
            locks = [name for name in os.listdir(FOLDER) if identity in name]
            counted = {**seen.alive(), "pins": len(pins), "lock files": len(locks), "descriptors": descriptors()}
            return {**counted, "charged KiB": charged.kib(), "kernel KiB": kernel_memory_kib()}

        try:
            yield once
        finally:
            backend.remove()
            charged.close()


@contextmanager
def iptables_rounds() -> Iterator[Callable[[int, bool], dict[str, int]]]:
    """Yields a function that starts and stops the iptables guard once, and on request counts what is left.

    This process is in the sandbox until the block ends.
    """
    with Sandbox() as sandbox, tempfile.TemporaryDirectory() as folder:
        backend, charged = IptablesBackend(state_folder=folder), Charged()
        sandbox.join()

        def once(number: int, count: bool) -> dict[str, int]:
            backend.apply(_policy(number))
            backend.remove()
            if not count:
                return {}
            saved = [run([f"{one}-save"]).stdout for one in ("iptables", "ip6tables")]
            lines = [line for text in saved for line in text.splitlines() if "IMDS" in line]
            counted = {"rules": len(lines), "records": len(os.listdir(folder)), "descriptors": descriptors()}
            return {**counted, "charged KiB": charged.kib(), "kernel KiB": kernel_memory_kib()}

        try:
            yield once
        finally:
            backend.remove()
            charged.close()
            with open(os.path.join(os.path.dirname(sandbox.cgroup), "cgroup.procs"), "w", encoding="ascii") as procs:
                procs.write(str(os.getpid()))


BACKENDS = {"ebpf": ebpf_rounds, "iptables": iptables_rounds}


def measure(name: str, milestones: list[int]) -> list[dict[str, int]]:
    """The counts of what is left after each number of starts and stops in ``milestones``."""
    found = []
    with BACKENDS[name]() as once:
        for number in range(1, milestones[-1] + 1):
            counted = once(number, number in milestones)
            if counted:
                found.append({"rounds": number, **counted})
    return found


def main() -> None:
    """Prints a line for each milestone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the sandbox is removed
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10_000)
    parser.add_argument("--backend", choices=[*BACKENDS, "both"], default="both")
    chosen = parser.parse_args()
    milestones = [at for at in (10, 100, 1_000, 2_000, 5_000) if at < chosen.times] + [chosen.times]
    for name in BACKENDS if chosen.backend == "both" else [chosen.backend]:
        begun = time.monotonic()
        with BACKENDS[name]() as once:
            for number in range(1, chosen.times + 1):
                counted = once(number, number in milestones)
                if counted:
                    text = ", ".join(f"{value} {what}" for what, value in counted.items())
                    print(f"{name}: {number} starts and stops in {time.monotonic() - begun:.0f} s: {text}", flush=True)


if __name__ == "__main__":
    main()
