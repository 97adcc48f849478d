# SPDX-License-Identifier: Apache-2.0
"""The processes of the machine, as /proc shows them."""

from __future__ import annotations

import os


def process_ids() -> list[int]:
    """Every process that /proc shows, in ascending order."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def process_name(pid: int) -> str:
    """The name that the process gave itself (proc_pid_comm(5)), unsafe to print; "" when the process is gone."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """False for a process that is gone or a zombie, which has no descriptors and no namespaces.

    A process whose first thread has ended, while others run, is shown as a zombie, too. It has more than one thread.
    """
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return False
    return fields["State"].split()[0] not in ("Z", "X") or int(fields["Threads"]) > 1
