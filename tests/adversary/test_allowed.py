# SPDX-License-Identifier: Apache-2.0
"""What a strict guard must not break: whole conversations of an allowed user, to the last packet."""

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
from tests.adversary.talk import make_socket, patient, there

Closing = Callable[[socket.socket, socket.socket], None]


def _client_first(client: socket.socket, peer: socket.socket) -> None:
    """The last packet of all is sent by no socket any more, but by what is left of one (TIME-WAIT, RFC 9293)."""
    client.close()
    assert peer.recv(1) == b""
    peer.close()


def _server_first(client: socket.socket, peer: socket.socket) -> None:
    peer.close()
    assert client.recv(1) == b""
    client.close()


def _half_closed(client: socket.socket, peer: socket.socket) -> None:
    """The request is over, the answer goes on."""
    client.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    peer.send(b"!" * 1000)
    peer.close()
    assert client.recv(1000, socket.MSG_WAITALL) == b"!" * 1000
    client.close()


CLOSINGS: dict[str, Closing] = {"client": _client_first, "server": _server_first, "half": _half_closed}


def _converse(address: str, closing: Closing) -> bool:
    """In a network namespace made for it, both ends in one process, whose user is allowed when it connects."""
    netns.unshare_network([address])
    with make_socket(address) as listening, make_socket(address) as client:
        listening.bind(sockaddr(address, PORT))
        listening.listen(1)
        become_user(ALLOWED, ALLOWED_GID)
        client.connect(there(address))
        peer = listening.accept()[0]
        patient(peer)
        client.sendall(b"?")
        assert peer.recv(1) == b"?"
        closing(client, peer)
    return True


@pytest.fixture(scope="module")
def fresh(stages: Stages) -> Stages:
    """What an attack leaves behind tries for minutes to send what it could not (FIN-WAIT-1), and would be counted."""
    stages.close()
    return stages


@pytest.mark.parametrize("address", [IPV4, IPV6])
@pytest.mark.parametrize("closing", sorted(CLOSINGS))
def test_a_conversation_ends_without_a_denial(fresh: Stages, closing: str, address: str) -> None:
    """No packet of it is dropped: the hooks count why they let through, and what they drop."""
    stage = fresh.enter(Guard.STRICT)
    scene = fresh.scene
    stage.apply(scene.sandbox, USUAL)
    assert scene.inside(lambda: _converse(address, CLOSINGS[closing]))
    assert stage.reasons() == {Reason.ALLOWED_USER}
