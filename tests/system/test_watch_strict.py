# SPDX-License-Identifier: Apache-2.0
"""Events about packets that ``--strict`` drops. The kernel knows no process for a packet."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from tests import command
from tests.command import ONE, SERVICE
from tests.watched import watch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")


def send_raw() -> bool:
    """Root sends a UDP packet to the service through a raw socket. True when that was refused."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        try:
            raw.sendto(struct.pack("!HHHH", 4000, 80, 8, 0), (SERVICE, 0))
        except PermissionError:
            return True
    return False


def test_an_unapproved_packet_is_an_event_without_a_process() -> None:
    with command.guard() as guard:
        guard.start("--user", str(ONE), "--ip", f"{SERVICE}:80,udp", "--strict")
        with watch(guard) as one:
            one.event("began")
            assert guard.sandbox.call(send_raw)
            event = one.event("denied")
        row = guard("report", "--json").values["rows"][0]
        assert guard("metrics").answer.count('imds_guard_hook_attached{hook="egress"} 1.0') == 1
    expected = {
        "hook": "egress",
        "reason": "unapproved-socket",
        "address": SERVICE,
        "port": 80,
        "protocol": "udp",
        "lock": "default",
        "uid": 0,
        "user": "root",
        "count": 1,
        "would_allow": "connect as an allowed user: under --strict nothing else approves a socket",
        **dict.fromkeys(("pid", "gid", "groups", "comm", "exe", "cmdline", "unit", "container", "cgroup")),
    }
    assert {key: event[key] for key in expected} == expected
    assert (row["reason"], row["uid"], row["count"]) == ("unapproved-socket", 0, 1)
