# SPDX-License-Identifier: Apache-2.0
"""The eBPF backend: programs at the cgroup hooks, links and maps, all pinned. No process of ours stays.

abi: the maps and their records. render, parse: a policy as records, and back. program: the compiled hooks.
pins, folder: where everything is pinned. hooks: links. reader, store: the maps. state: what the kernel holds now.
changes: start, change and upgrade.
"""

from __future__ import annotations

from imds_guard.backends.ebpf.backend import EbpfBackend
from imds_guard.backends.ebpf.state import State

__all__ = ["EbpfBackend", "State"]
