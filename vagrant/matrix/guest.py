# SPDX-License-Identifier: Apache-2.0
"""Boots a guest in QEMU and collects its results. A lost guest is reported as lost, not as a failed test."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from vagrant.matrix.disk import blank, format_blank
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.kernel import KernelFiles
from vagrant.matrix.process import dies_with_us, find

RESULTS_MIB = 64
STATE_MIB = 2048
MAX_BOOTS = 5
_CONTROL = re.compile(r"\x1b[\[(][0-9;?]*[a-zA-Z]|[\r\x00-\x08\x0e-\x1f]")


@dataclass(frozen=True)
class Guest:
    """The files that a guest boots, which it only reads: one image serves many guests at the same time."""

    kernel: KernelFiles
    userland: Path
    cmdline: str = ""
    memory_mib: int = 1024
    accel: str = "tcg"
    systemd: bool = False
    """systemd is PID 1, and files that the job writes survive a call of /job/reboot."""

    cpus: int = 1
    cpu: str = ""
    """The emulated processor, if not that of the architecture."""

    @property
    def kernel_arguments(self) -> str:
        """The kernel's command line."""
        # oops=panic: a kernel with an oops must not go on and pass. panic=-1 with -no-reboot ends QEMU at once.
        # no_timer_check: on a busy host an emulated timer fails the test at boot, and the kernel gives up.
        # noautogroup: otherwise a storm of connects gets half of the processor, whatever its nice value (sched(7)).
        # nohz=off highres=off: a periodic timer. Each timer that the kernel sets itself would wake up QEMU's thread.
        # norandmaps: with QEMU 7.2 and two guests at once processes run a seventh faster when each program is always at
        # the same address; with QEMU 10 it makes no difference.
        # imds.output: run-job writes there.
        lines = f"console={self.kernel.architecture.console} imds.output={self.kernel.architecture.output}"
        always = (
            f"{lines} panic=-1 oops=panic no_timer_check noautogroup nohz=off highres=off norandmaps "
            "random.trust_cpu=on net.ifnames=0"
        )
        return " ".join(filter(None, (always, "imds.state imds.init=systemd" if self.systemd else "", self.cmdline)))


@dataclass(frozen=True)
class Outcome:
    """How a boot ended: ``status`` is the exit status of the job, or ``lost`` says why there is none."""

    seconds: float
    status: int | None = None
    lost: str = ""


def boot(
    guest: Guest, job: Path, folder: Path, deadline_s: float, progress: Callable[[bytes], None] = lambda _: None
) -> Outcome:
    """Runs ``job`` (a tar with job.sh) and writes console.log, output.log and results/ to ``folder``.

    ``progress`` is called with the output of the job while it runs. QEMU has ended when this returns.
    """
    results, state = folder / "results.tar", folder / "state.img"
    for name in ("console.log", "output.log"):
        (folder / name).write_bytes(b"")
    if guest.systemd:
        format_blank(state, STATE_MIB)
    began = time.monotonic()
    reason, status = "", None
    for _ in range(MAX_BOOTS):
        blank(results, RESULTS_MIB)
        reason = _run(_argv(guest, job, folder, results), folder, began + deadline_s, progress)
        status = _collect(results, folder / "results")
        if status is not None or not (folder / "results" / "reboot").exists():
            break
        (folder / "results" / "reboot").unlink()
    for disk in (results, state):
        disk.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    if status is None:
        return Outcome(seconds, lost=reason or _last_sign(folder / "console.log"))
    return Outcome(seconds, status=status)


def console_tail(folder: Path, lines: int = 25) -> str:
    """The last lines of a guest's console, without control characters."""
    text = _CONTROL.sub("", (folder / "console.log").read_text(encoding="utf-8", errors="replace"))
    return "\n".join(text.splitlines()[-lines:])


def _argv(guest: Guest, job: Path, folder: Path, results: Path) -> list[str]:
    architecture = guest.kernel.architecture
    emulated = ["tcg,thread=multi", "-cpu", guest.cpu or architecture.cpu]
    accel = ["kvm", "-cpu", "host"] if guest.accel == "kvm" else emulated
    state = ["-drive", f"file={folder / 'state.img'},if=virtio,format=raw,cache=unsafe"] if guest.systemd else []
    return [
        find(architecture.qemu), "-accel", *accel, "-machine", architecture.machine, "-smp", str(guest.cpus),
        "-m", str(guest.memory_mib), "-nodefaults", "-display", "none", "-nic", "none", "-no-reboot",
        "-device", "virtio-rng-pci",
        "-chardev", f"file,id=console,path={folder / 'console.log'},append=on", "-serial", "chardev:console",
        "-chardev", f"file,id=output,path={folder / 'output.log'},append=on", *architecture.second_line,
        "-kernel", str(guest.kernel.vmlinuz), "-initrd", str(guest.kernel.initrd), "-append", guest.kernel_arguments,
        "-drive", f"file={guest.userland},if=virtio,format=raw,readonly=on",
        "-drive", f"file={guest.kernel.modules},if=virtio,format=raw,readonly=on",
        "-drive", f"file={job},if=virtio,format=raw,readonly=on",
        "-drive", f"file={results},if=virtio,format=raw,cache=unsafe", *state,
    ]  # fmt: skip


def _run(argv: list[str], folder: Path, deadline: float, progress: Callable[[bytes], None]) -> str:
    """Waits for QEMU to end. Returns why it was killed, or ""."""
    with open(folder / "qemu.log", "wb") as said, open(folder / "output.log", "rb") as output:
        output.seek(0, os.SEEK_END)
        process = subprocess.Popen(dies_with_us(argv), stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
                progress(output.read())
                if process.returncode is not None:
                    break
                if time.monotonic() > deadline:
                    return "deadline passed, QEMU was killed"
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise MatrixError(
            f"QEMU exited with {process.returncode}: {(folder / 'qemu.log').read_text(errors='replace').strip()}"
        )
    return ""


def _last_sign(console: Path) -> str:
    text = console.read_text(encoding="utf-8", errors="replace")
    for sign in (r"Kernel panic[^\r\n]*", r"imds-guard-matrix: [^\r\n]*", r"Out of memory: [^\r\n]*"):
        found = re.search(sign, text)
        if found:
            return found[0]
    return "it ended before it wrote results" if text else "it never wrote to its console"


def _collect(results: Path, folder: Path) -> int | None:
    """Unpacks the results of a guest. Returns the exit status of the job, or None when the results are incomplete."""
    folder.mkdir(exist_ok=True)
    try:
        with tarfile.open(results, "r:") as archive:
            for member in archive:
                target = folder / member.name
                if not member.isfile() or folder.resolve() not in target.resolve().parents:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
        return int((folder / "status").read_text(encoding="ascii"))
    except (tarfile.TarError, OSError, ValueError):
        return None
