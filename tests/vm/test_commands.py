# SPDX-License-Identifier: Apache-2.0
"""Whole commands, hooks included: at every moment of them a hook sees the old policy or the new one.

pytest tests/vm/test_commands.py --vm-cases 3000000
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Callable
from unittest import mock

import pytest

from imds_guard.backends.ebpf import abi, hooks
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.folder import Folder
from imds_guard.backends.ebpf.store import MapStore
from imds_guard.policy.model import Policy
from tests.vm.commands import commands
from tests.vm.machine import Machine

FIXED_SEED = 17
_WITHIN = 30
"""A control must fail within so many sequences of commands."""


@pytest.mark.parametrize("which", ["fixed", "fresh"])
def test_commands(machine: Machine, which: str, pytestconfig: pytest.Config) -> None:
    """start, a change, a change that replaces the maps, and stop; or one of them is killed, and start follows."""
    _need_root()
    given, cases = pytestconfig.getoption("vm_seed"), pytestconfig.getoption("vm_cases")
    if given and which == "fixed":
        pytest.skip("--vm-seed names the one seed to try")
    fresh = random.SystemRandom().getrandbits(32)
    seed, first = given or (FIXED_SEED if which == "fixed" else fresh, 0)
    with Machine() as later, Machine() as last, commands([machine, later, last]) as one:
        for number in itertools.count(first):
            one.commands(f"{seed}:{number}")
            if one.report.wrong:
                pytest.fail(one.report.wrong[0], pytrace=False)
            if one.report.hooks >= cases / 20:
                break


def _need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only a folder of root can hold pins")


# --- controls: each must fail ---------------------------------------------------------------------------------------


def _fills_maps_late() -> ExitStack:
    """The hooks move to the new maps before these are filled."""
    late: list[Callable[[], None]] = []
    change, swap = MapStore.change, Folder.swap

    def later(store: MapStore, wanted: Policy, serial: int = 0) -> None:
        if serial:
            late.append(lambda: change(store, wanted, serial))
        else:
            change(store, wanted)

    def swap_after(folder: Folder) -> None:
        late.pop()()
        swap(folder)

    return _patched((MapStore, "change", later), (Folder, "swap", swap_after))


def _detaches_egress_early() -> ExitStack:
    """The hook of strict mode is detached while the strict policy is still in force."""
    change, detach = MapStore.change, hooks.detach_unneeded
    folders: list[str] = []

    def open_pins(cls: type[MapStore], pins: str, maps: Iterable[Map] = Map) -> MapStore:
        folders.append(pins)
        return real_open(pins, maps)

    def early(store: MapStore, wanted: Policy, serial: int = 0) -> None:
        if folders:
            detach(folders[-1], abi.needed_hooks(wanted))
        change(store, wanted, serial)

    real_open = MapStore.open
    return _patched((MapStore, "change", early), (MapStore, "open", classmethod(open_pins)))


def _patched(*changes: tuple[object, str, object]) -> ExitStack:
    stack = ExitStack()
    for owner, name, other in changes:
        stack.enter_context(mock.patch.object(owner, name, other))
    return stack


@pytest.mark.parametrize("wrong", [_fills_maps_late, _detaches_egress_early])
def test_commands_in_the_wrong_order_are_found(machine: Machine, wrong: Callable[[], ExitStack]) -> None:
    _need_root()
    with wrong(), Machine() as later, Machine() as last, commands([machine, later, last]) as one:
        for number in range(_WITHIN):
            one.commands(f"{FIXED_SEED}:{number}")
            if one.report.wrong:
                break
    assert one.report.wrong != []
