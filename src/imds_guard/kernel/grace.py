# SPDX-License-Identifier: Apache-2.0
"""Waits until no running program uses what it read from a map before."""

from __future__ import annotations

import os
import struct

from imds_guard.kernel import bpf, privileges, syscalls


def wait_for_running_programs() -> None:
    """Returns after an RCU grace period. Cgroup programs run inside RCU read-side critical sections.

    MEMBARRIER_CMD_GLOBAL is synchronize_rcu() (kernel/sched/membarrier.c), with two exceptions. It is EINVAL where CPUs
    run without a tick. It does nothing where one CPU alone is online: there a task may have been preempted in the
    middle of a program (CONFIG_PREEMPTION), and continues it later.
    """
    if os.sysconf("SC_NPROCESSORS_ONLN") > 1:
        try:
            syscalls.membarrier(syscalls.MEMBARRIER_GLOBAL)
        except OSError:
            _update_array_of_maps()
    else:
        _update_array_of_maps()


def _update_array_of_maps() -> None:
    """The kernel waits for running programs before it returns: maybe_wait_bpf_programs() in kernel/bpf/syscall.c."""
    privileges.lift_memory_lock_limit()
    inner = bpf.map_create(bpf.MapShape(bpf.MapType.ARRAY, 4, 4, 1), "ig_grace")
    try:
        outer = bpf.map_create(bpf.MapShape(bpf.MapType.ARRAY_OF_MAPS, 4, 4, 1), "ig_grace_outer", inner)
        try:
            bpf.map_update(outer, struct.pack("=I", 0), struct.pack("=I", inner))
        finally:
            os.close(outer)
    finally:
        os.close(inner)
