# SPDX-License-Identifier: Apache-2.0
"""The eBPF backend of the conformance table at the root of cgroup2, where the installed command has attached it.

This is a module of the guests, not an option of the tests: nothing may lock the root of a machine in use.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.reader import MapReader
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from tests.conformance import enforcers
from tests.conformance.families import ADDRESSES


class AtRoot(enforcers.Ebpf):
    """The eBPF enforcer for every process of the guest, not only for those of a cgroup of its own."""

    def __init__(self, folder: Path) -> None:
        self._backend = EbpfBackend()
        self._before: dict[Reason, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> AtRoot:
        pins = self._backend.state().pins
        assert pins is not None, "nothing is attached: imds-guard start has not run"
        self._maps = self._stack.enter_context(MapReader.open(pins, (Map.COUNTERS,)))
        return self

    def sandbox(self) -> Sandbox:
        """Enforcer.sandbox(): the cgroup may be anywhere, since all are below the root."""
        return Sandbox(ADDRESSES)

    def _counts(self) -> dict[Reason, int]:
        """Reads the map alone: state() takes a fifth of a second on an emulated processor."""
        return {Reason(number): sum(pair) for number, pair in enumerate(self._maps.counters()[: len(Reason)])}
