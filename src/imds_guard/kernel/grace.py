# SPDX-License-Identifier: Apache-2.0
"""Waiting until no running program still uses what it read before."""

from __future__ import annotations

import os
import struct

from imds_guard.kernel import bpf, syscalls


def wait_for_running_programs() -> None:
    """Returns after an RCU grace period; cgroup programs run inside RCU read-side critical sections.

    MEMBARRIER_CMD_GLOBAL is synchronize_rcu() (kernel/sched/membarrier.c), and EINVAL where CPUs run without a tick.
    There an update of an array of maps serves: the kernel waits for running programs before it returns
    (maybe_wait_bpf_programs() in kernel/bpf/syscall.c).
    """
    try:
        syscalls.membarrier(syscalls.MEMBARRIER_GLOBAL)
    except OSError:
        _update_array_of_maps()


def _update_array_of_maps() -> None:
    inner = bpf.map_create(bpf.MapShape(bpf.MAP_TYPE_ARRAY, 4, 4, 1), "ig_grace")
    try:
        outer = bpf.map_create(bpf.MapShape(bpf.MAP_TYPE_ARRAY_OF_MAPS, 4, 4, 1), "ig_grace_outer", inner)
        try:
            bpf.map_update(outer, struct.pack("=I", 0), struct.pack("=I", inner))
        finally:
            os.close(outer)
    finally:
        os.close(inner)
