# SPDX-License-Identifier: Apache-2.0
"""Only callers on this machine are served: with route_localnet=1 a neighbour reaches addresses of 127.0.0.0/8, too."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from imds_guard.kernel import children, netns
from imds_guard.policy.filters import FilterRules
from tests.adversary.privileges import command
from tests.filter.stage import OK, Stage, status_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

NEAR, FAR, LISTENER, PORT = "10.88.0.1", "10.88.0.2", "127.169.1.1", 169
CABLE = "cable"


def test_a_neighbour_is_closed_at_once_and_a_caller_here_is_served() -> None:
    """Both reach the listener; the interface on which they come tells them apart."""
    here, neighbour = children.run_in_child(_near, timeout_s=60)
    assert status_of(here) == 200
    assert neighbour == b"connected, closed"


def _near() -> tuple[bytes, bytes]:
    ours, theirs = socket.socketpair()
    pid = children.fork(lambda: _far(ours, theirs))
    try:
        theirs.close()
        ours.recv(1)
        netns.unshare_network([])
        command("ip", "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(pid))
        command("ip", "address", "add", f"{NEAR}/24", "dev", CABLE)
        command("ip", "link", "set", CABLE, "up")
        with open(f"/proc/sys/net/ipv4/conf/{CABLE}/route_localnet", "w", encoding="ascii") as switch:
            switch.write("1")
        with Stage(FilterRules(("GET /**",)), lambda request: OK, listener=(LISTENER, PORT)) as stage:
            here = stage.ask(stage.request("GET /a"))
            ours.setblocking(False)

            async def exchange() -> bytes:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(ours, b".")
                return await loop.sock_recv(ours, 100)

            return here, stage.run(exchange())
    finally:
        children.end(pid)


def _far(ours: socket.socket, theirs: socket.socket) -> None:
    """A neighbour that routes the address of the listener to the machine."""
    ours.close()
    netns.unshare_network([])
    theirs.send(b".")
    theirs.recv(1)
    command("ip", "address", "add", f"{FAR}/24", "dev", CABLE)
    command("ip", "link", "set", CABLE, "up")
    with open(f"/proc/sys/net/ipv4/conf/{CABLE}/route_localnet", "w", encoding="ascii") as switch:
        switch.write("1")
    # Its own lo has 127.0.0.0/8: a rule and a table lead this address out.
    command("ip", "rule", "add", "pref", "1", "lookup", "local")
    command("ip", "rule", "add", "pref", "0", "to", LISTENER, "lookup", "100")
    command("ip", "rule", "del", "pref", "0", "lookup", "local")
    command("ip", "route", "add", LISTENER, "via", NEAR, "src", FAR, "table", "100")
    with socket.socket() as one:
        one.settimeout(10)
        one.bind((FAR, 0))
        one.connect((LISTENER, PORT))
        said = b"connected, "
        try:
            one.sendall(b"GET /a HTTP/1.1\r\nHost: metadata\r\n\r\n")
            said += one.recv(100) or b"closed"
        except ConnectionError:
            said += b"closed"
    theirs.send(said)
