# SPDX-License-Identifier: Apache-2.0
"""A strict guard does not break connections of an allowed user, up to their last packet."""

from __future__ import annotations

import socket
from typing import Callable

import pytest

from imds_guard.kernel import netns
from imds_guard.kernel.listeners import sockaddr
from imds_guard.policy.decide import Reason
from tests.adversary.conftest import Stages
from tests.adversary.model import Guard
from tests.adversary.privileges import become_user
from tests.adversary.scene import ALLOWED, ALLOWED_GID, IPV4, IPV6, PORT, USUAL
from tests.adversary.talk import make_socket, set_timeouts, there

Closing = Callable[[socket.socket, socket.socket], None]


def _client_first(client: socket.socket, peer: socket.socket) -> None:
    """The client closes first. The last packet then comes from a TIME-WAIT socket (RFC 9293)."""
    client.close()
    assert peer.recv(1) == b""
    peer.close()


def _server_first(client: socket.socket, peer: socket.socket) -> None:
    peer.close()
    assert client.recv(1) == b""
    client.close()


def _half_closed(client: socket.socket, peer: socket.socket) -> None:
    """The client ends its direction; the server still sends."""
    client.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    peer.send(b"!" * 1000)
    peer.close()
    assert client.recv(1000, socket.MSG_WAITALL) == b"!" * 1000
    client.close()


CLOSINGS: dict[str, Closing] = {"client": _client_first, "server": _server_first, "half": _half_closed}


def _converse(address: str, closing: Closing) -> bool:
    """Runs both ends of a connection in one process, as an allowed user, in a new network namespace."""
    netns.unshare_network([address])
    with make_socket(address) as listening, make_socket(address) as client:
        listening.bind(sockaddr(address, PORT))
        listening.listen(1)
        become_user(ALLOWED, ALLOWED_GID)
        client.connect(there(address))
        peer = listening.accept()[0]
        set_timeouts(peer)
        client.sendall(b"?")
        assert peer.recv(1) == b"?"
        closing(client, peer)
    return True


@pytest.fixture(scope="module")
def fresh(stages: Stages) -> Stages:
    """New stages: sockets of earlier attacks (FIN-WAIT-1) retransmit for minutes, and would be counted."""
    stages.close()
    return stages


@pytest.mark.parametrize("address", [IPV4, IPV6])
@pytest.mark.parametrize("closing", sorted(CLOSINGS))
def test_a_conversation_ends_without_a_denial(fresh: Stages, closing: str, address: str) -> None:
    """No packet of the connection is dropped: the hooks count no reason but ALLOWED_USER."""
    stage = fresh.enter(Guard.STRICT)
    scene = fresh.scene
    stage.apply(scene.sandbox, USUAL)
    assert scene.inside(lambda: _converse(address, CLOSINGS[closing]))
    assert stage.reasons() == {Reason.ALLOWED_USER}
