# SPDX-License-Identifier: Apache-2.0
"""vagrant/up-here: brings a row up by Vagrant and libvirt, runs its suite and destroys it; nothing stays behind.

Everything runs in new namespaces (mount, network, PID): libvirt's bridge has no way to a real network, and the end of
one process ends all the others.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from vagrant.box import build, machines
from vagrant.box import job as packed
from vagrant.matrix import cache, guest, job, kernel, table, verdict
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.process import find
from vagrant.matrix.table import Matrix, Row
from vagrant.matrix.verdict import Verdict

INSIDE = Path(__file__).resolve().parent / "inside"
NAMESPACES = ("--mount", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
PROGRAMS = {
    "vagrant": "vagrant vagrant-libvirt",
    "libvirtd": "libvirt-daemon libvirt-daemon-driver-qemu",
    "virtlogd": "libvirt-daemon",
    "virsh": "libvirt-clients",
    "dnsmasq": "dnsmasq-base",
    "qemu-system-x86_64": "qemu-system-x86",
    "iptables": "iptables",
    "ip": "iproute2",
    "setpriv": "util-linux",
}
"""Program -> the Debian packages that contain it and what it needs."""


def up(matrix: Matrix, row: Row, results: Path, deadline_s: float, driver: str) -> Verdict:
    """Brings a row up and returns the verdict on it. Logs and reports stay in ``results``."""
    if not machines.has_suite(row):
        raise MatrixError(f"the tests of {row.name} need a machine without a network card: ./run matrix {row.name}")
    build.fetch(matrix, row)
    release = kernel.fetch(matrix.archive, row.kernel).release
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="imds-guard-vagrant-") as scratch:
        # Packed out here: pip fetches what it needs to build a wheel, and the namespaces have no network.
        folder = packed.pack(matrix, row, Path(scratch) / "job").parent
        began = time.monotonic()
        env = {"IMDS_GUARD_DRIVER": driver, "IMDS_GUARD_JOB": str(folder), "IMDS_GUARD_CACHE": str(cache.root())}
        status = run(_argv(row, Path(scratch)), env, deadline_s)
        seconds = time.monotonic() - began
        shutil.copytree(Path(scratch) / "logs", results, dirs_exist_ok=True)
    if status is None:
        return verdict.lost(row, seconds, f"deadline of {deadline_s:g} s passed in {_last_step(results)}")
    if not (results / "results" / "status").exists():
        return verdict.lost(row, seconds, f"no results: status {status} in {_last_step(results)}")
    return verdict.judge(row, status, results / "results", release, seconds)


def steps(results: Path) -> list[tuple[str, int, int]]:
    """The steps that have ended: name, seconds, status."""
    path = results / "steps"
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return [(name, int(seconds), int(status)) for name, seconds, status in (line.split() for line in lines)]


def _last_step(results: Path) -> str:
    ended = [f"{name} (status {status})" for name, _, status in steps(results)]
    return f"the step after {ended[-1]}" if ended else "the first step"


def _argv(row: Row, scratch: Path) -> list[str]:
    # setpriv: when this process is killed, so is unshare, and with it (--kill-child) PID 1 of the namespace.
    inside = ["sh", str(INSIDE), row.name, str(scratch), str(job.TREE)]
    return [find("setpriv"), "--pdeathsig", "KILL", "--", find("unshare"), *NAMESPACES, "--", *inside]


def run(argv: Sequence[str], env: dict[str, str], deadline_s: float) -> int | None:
    """The exit status, or None when the deadline passed. Every process that was started has ended afterwards."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, env={**os.environ, **env, "PATH": path, "LC_ALL": "C.UTF-8"}
    )
    try:
        # Not Popen.wait(): an exception of a signal handler just after it took its lock would leave it locked.
        ended = os.pidfd_open(process.pid)
        try:
            in_time = select.select([ended], [], [], deadline_s)[0]
        finally:
            os.close(ended)
        return process.wait() if in_time else None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills PID 1 of the namespace, and waits for unshare, which waits for PID 1.

    The kernel kills all other processes of the namespace with PID 1 (pid_namespaces(7)), which ends after them
    (zap_pid_ns_processes() in Linux).
    """
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
        for child in children.split():
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        if children:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
    process.kill()
    process.wait()


def _require_programs() -> None:
    if os.geteuid() != 0:
        raise MatrixError("up-here makes namespaces and runs libvirtd: run it as root")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        packages = sorted({package for name in missing for package in PROGRAMS[name].split()})
        raise MatrixError(
            f"{', '.join(missing)} not installed: apt-get install --no-install-recommends {' '.join(packages)}"
        )


def _stopped(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 passed, 1 failed, 2 usage, 3 lost or could not be prepared, 130 stopped."""
    parser = argparse.ArgumentParser(prog="vagrant/up-here", description=__doc__.splitlines()[0])
    parser.add_argument("row", help="a row of kernels.toml")
    parser.add_argument(
        "--deadline", type=float, default=1800, metavar="SECONDS", help="for everything after the box is built"
    )
    parser.add_argument(
        "--driver", choices=("qemu", "kvm"), default="qemu", help="qemu: emulate the processor (default)"
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder for logs and reports")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stopped)
    try:
        _require_programs()
        matrix = table.load()
        row = matrix.row(options.row)
        results = (options.results or cache.root() / "vagrant" / row.name).absolute()
        return _print(up(matrix, row, results, options.deadline, options.driver), results)
    except MatrixError as error:
        sys.stderr.write(f"up-here: {error}\n")
        return 3
    except KeyboardInterrupt:
        return 130


def _print(found: Verdict, results: Path) -> int:
    for name, seconds, status in steps(results):
        print(f"{name:10} {seconds:5} s  status {status}")
    print(found.line)
    for complaint in found.complaints:
        print(f"    {complaint}")
    if found.state == verdict.LOST and (results / "console.log").exists():
        print(guest.console_tail(results))
    print(f"logs and reports: {results}")
    return {verdict.PASSED: 0, verdict.FAILED: 1}.get(found.state, 3)
