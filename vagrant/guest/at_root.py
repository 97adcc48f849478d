# SPDX-License-Identifier: Apache-2.0
"""The conformance table's eBPF backend at the root of cgroup2, where the installed command has attached it.

A module of the guests' and no environment variable: on a machine that somebody works on, nothing must lead there.
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
    """As its parent, above every process of the guest and not above a cgroup of its own."""

    def __init__(self, folder: Path) -> None:
        self._backend = EbpfBackend()
        self._before: dict[Reason, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> AtRoot:
        pins = self._backend.state().pins
        assert pins is not None, "nothing is attached: the command has not started it"
        self._maps = self._stack.enter_context(MapReader.open(pins, (Map.COUNTERS,)))
        return self

    def sandbox(self) -> Sandbox:
        """Enforcer.sandbox(): anywhere, for everything is below the root."""
        return Sandbox(ADDRESSES)

    def _counts(self) -> dict[Reason, int]:
        """From the map alone: all of the backend's state takes an emulated processor a fifth of a second."""
        return {Reason(number): sum(pair) for number, pair in enumerate(self._maps.counters()[: len(Reason)])}
