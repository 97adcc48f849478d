# SPDX-License-Identifier: Apache-2.0
"""Waiting until no running program still uses what it read before."""

from __future__ import annotations

import os
import struct

from imds_guard.kernel import bpf, privileges, syscalls


def wait_for_running_programs() -> None:
    """Returns after an RCU grace period; cgroup programs run inside RCU read-side critical sections.

    MEMBARRIER_CMD_GLOBAL is synchronize_rcu() (kernel/sched/membarrier.c), but EINVAL where CPUs run without a tick,
    and nothing at all where one CPU alone is online: there the kernel may have taken it from a hook in the middle
    (CONFIG_PREEMPTION), which goes on after us.
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
