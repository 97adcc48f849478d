# SPDX-License-Identifier: Apache-2.0
"""Connections that NAT leads to a filter: their sockets look like direct ones.

The service of the filters has the other end: a socket at 127.169.T.F, with the caller's address and port as its peer. A
direct connection with these is a second one from the same port to the same address, which TCP does not have. And
nobody but root can take the other end's port.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from imds_guard.connections.find import FoundSocket, address_of
from imds_guard.kernel.abandonable import Limits, Worker
from imds_guard.kernel.sock_diag import SockDiag
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.filters import FILTER_PORT, Target
from imds_guard.policy.model import Protocol


class _Question(NamedTuple):
    local: tuple[str, int]
    places: tuple[str, ...]


def filters_of(sockets: Sequence[FoundSocket], listeners: Iterable[Listener], limits: Limits) -> Mapping[bytes, str]:
    """Identity of a socket -> the name of the filter at its other end. Call it in the sockets' network namespace."""
    by_target: dict[Target, dict[str, str]] = {}
    for one in listeners:
        by_target.setdefault(one.target, {})[str(one.address)] = one.filter
    asked: dict[_Question, tuple[bytes, dict[str, str]]] = {}
    for found in sockets:
        places = by_target.get(Target(found.destination.address, found.destination.port))
        if places and found.destination.protocol is Protocol.TCP:
            local = (str(address_of(found.socket.local)), found.socket.local_port)
            asked[_Question(local, tuple(places))] = found.socket.identity, places
    if not asked:
        return {}
    with Worker(_place_of) as worker:
        answers = list(worker.ask_each(list(asked), limits))
    return {
        asked[question][0]: asked[question][1][answer]
        for question, answer in answers
        if isinstance(answer, str) and answer
    }


def _place_of(question: _Question) -> str:
    """The place that has accepted the connection; "" for none. In a child: sock_diag may not answer."""
    with SockDiag() as diag:
        found = (place for place in question.places if diag.find_tcp((place, FILTER_PORT), question.local) is not None)
        return next(found, "")
