# SPDX-License-Identifier: Apache-2.0
"""Single cases that random ones meet too seldom."""

from __future__ import annotations

import ipaddress

from imds_guard.policy.model import Endpoint, Lock, make_policy
from tests.vm.machine import Machine
from tests.vm.values import Packet, Socket, packed


def empty_entry_passes(machine: Machine) -> bool:
    """Whether a packet without a transport header passes where only an entry without ranges covers its address."""
    prefixes = {"six": "::/0", "four": "192.0.2.128/25"}  # ::/0 makes an entry for all of IPv4 that locks nothing
    web = ((80, 80),)
    locks = [Lock(name, (Endpoint(ipaddress.ip_network(prefix), tcp=web),)) for name, prefix in prefixes.items()]
    machine.load(make_policy(locks, strict=True))
    machine.set_sockets([Socket()])
    bare = bytes([0x45, *bytes(8), 6, 0, 0]) + packed("10.0.0.1")
    locked, other = (
        [machine.packet(form, Packet(bare + packed(to), socket=0)) for form in machine.forms]
        for to in ("192.0.2.129", "192.0.2.7")
    )
    assert not any(outcome.traps for outcome in locked + other)
    assert not any(outcome.allowed for outcome in locked)
    return all(outcome.allowed for outcome in other)


def test_an_entry_without_ranges_locks_nothing(machine: Machine) -> None:
    assert empty_entry_passes(machine)
