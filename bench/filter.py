# SPDX-License-Identifier: Apache-2.0
"""Measures what the filter adds to a request on loopback, and its memory, in a network namespace of its own.

Run as root from the top of the tree: /usr/bin/python3 -m bench.filter.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path[:0] = [str(SOURCE)]

from imds_guard.filter import run
from imds_guard.filter.place import PORT, Place, listen_at
from imds_guard.kernel import lockfile
from imds_guard.kernel.name_service import User
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.filters import FilterRules, Target

METADATA, FILTER = "169.254.169.254", "127.169.1.1"
REQUESTS = 3000
ROUNDS = 5
MAX_ADDED_S, MAX_MEBIBYTES = 0.0005, 30.0

_REQUEST = f"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: {METADATA}\r\nUser-Agent: bench/1\r\n\r\n".encode()
_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 19\r\n\r\ni-0123456789abcdef0"


def _serve_metadata() -> None:
    """Answers every request; a connection is served by a process of its own, so that it delays no other."""
    server = socket.socket()
    server.bind((METADATA, 80))
    server.listen(64)
    while True:
        one, _ = server.accept()
        if os.fork() == 0:
            server.close()
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while one.recv(65536):
                one.sendall(_RESPONSE)
            os._exit(0)
        one.close()


def _serve_filter() -> None:
    target = Target(ipaddress.ip_address(METADATA), 80)
    rules = FilterRules(("GET /*/meta-data/**",), ("/*/meta-data/iam/**",))
    place = Place(FILTER, "bench", target, 1, rules)
    run.run([(place, listen_at(place, lambda fd, digest: None))], User("bench", 41_990, 51_990))


def _latencies(address: tuple[str, int]) -> list[float]:
    """Seconds of each request of one connection."""
    found = []
    with socket.create_connection(address, 10) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(REQUESTS):
            begun = time.perf_counter()
            one.sendall(_REQUEST)
            received = b""
            while not received.endswith(b"abcdef0"):
                received += one.recv(65536)
            found.append(time.perf_counter() - begun)
    return found


def _resident_mebibytes(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


def main() -> int:
    """Prints the medians and the memory. Returns 1 when one is above its budget."""
    if os.geteuid() != 0:
        print("bench: run this as root", file=sys.stderr)
        return 77
    with tempfile.TemporaryDirectory() as folder, Sandbox((METADATA,)) as sandbox:
        lockfile.FOLDER = folder
        sandbox.spawn(_serve_metadata)
        filter_pid = sandbox.spawn(_serve_filter)
        time.sleep(2)
        places = {"direct": (METADATA, 80), "through the filter": (FILTER, PORT)}
        medians: dict[str, list[float]] = {name: [] for name in places}
        for _ in range(ROUNDS):
            for name, address in places.items():
                found = sandbox.call(lambda address=address: _latencies(address), timeout_s=120)  # type: ignore[misc]
                medians[name].append(statistics.median(found))
        mebibytes = _resident_mebibytes(filter_pid)
    direct, filtered = (statistics.median(medians[name]) for name in places)
    for name, value in (("direct", direct), ("through the filter", filtered)):
        print(f"{name:20} {value * 1e6:6.0f} us a request, median of {ROUNDS} x {REQUESTS}")
    print(f"{'added':20} {(filtered - direct) * 1e6:6.0f} us   ({MAX_ADDED_S * 1e6:.0f} us)")
    print(f"{'resident':20} {mebibytes:6.1f} MiB  ({MAX_MEBIBYTES:.0f} MiB)")
    return 0 if filtered - direct <= MAX_ADDED_S and mebibytes <= MAX_MEBIBYTES else 1


if __name__ == "__main__":
    sys.exit(main())
