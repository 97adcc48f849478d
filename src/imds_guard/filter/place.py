# SPDX-License-Identifier: Apache-2.0
"""A place where the service listens, and the socket there."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, Callable, NamedTuple

from imds_guard.errors import GuardError, system_text
from imds_guard.kernel.arrival import report_arrivals
from imds_guard.policy.filter_text import parse_rules, rules_text
from imds_guard.policy.filters import FilterRules, Target

PORT = 169
BACKLOG = 1024

Mark = Callable[[int, int], object]
"""Puts the digest (second) on a socket (its descriptor): backends/ebpf/filter_listeners.py."""


class Place(NamedTuple):
    """An address, and what is served there."""

    address: str
    filter: str
    """Its name."""
    target: Target
    digest: int
    rules: FilterRules

    def values(self) -> dict[str, Any]:
        """As plain values, for the way to another process."""
        return {
            "address": self.address,
            "filter": self.filter,
            "target": [str(self.target.address), self.target.port],
            "digest": self.digest,
            "rules": rules_text(self.rules),
        }


def place_of(values: dict[str, Any]) -> Place:
    """The way back from Place.values()."""
    address, port = values["target"]
    target = Target(ipaddress.ip_address(address), int(port))
    return Place(values["address"], values["filter"], target, int(values["digest"]), parse_rules(values["rules"]))


def listen_at(place: Place, mark: Mark | None) -> socket.socket:
    """A socket that listens there. It takes CAP_NET_BIND_SERVICE, and what ``mark`` takes. Raises GuardError."""
    one = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        report_arrivals(one)
        one.bind((place.address, PORT))
        if mark is not None:
            mark(one.fileno(), place.digest)
        one.listen(BACKLOG)
    except OSError as error:
        one.close()
        raise GuardError(
            f"listening at {place.address}:{PORT} for filter {place.filter!r}: {system_text(error)}; whoever listens "
            f"there is shown by ss -ltnp sport = :{PORT}"
        ) from error
    except BaseException:
        one.close()
        raise
    return one
