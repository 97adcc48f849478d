# SPDX-License-Identifier: Apache-2.0
"""The places where the filter has to listen, and whether it does."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from imds_guard.backends.ebpf import filter_listeners
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.errors import GuardError, Unsupported, system_text
from imds_guard.filter.client import FilterClient
from imds_guard.filter.place import PORT, Place
from imds_guard.kernel.sock_diag import LISTEN, SockDiag
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.filters import FILTER_USER, Filter
from imds_guard.policy.model import Policy

SERVICE = "imds-guard-filter.service"


_WITHOUT_MARK = 1
"""In a digest: a listener of one backend is none of the other, which may want one with the same address and rules."""


class WantedPlaces(NamedTuple):
    """The filters in force, and the places that they need."""

    filters: tuple[Filter, ...] = ()
    uid: int | None = None
    """The user that may serve them: Policy.filter_uid."""
    places: tuple[Place, ...] = ()
    marked: bool = True
    """Under eBPF the hooks ask for a mark of each listening socket."""

    @property
    def keys(self) -> set[tuple[str, int]]:
        """Address and digest of each place."""
        return {(place.address, place.digest) for place in self.places}


def wanted_places(cgroup: str | None) -> WantedPlaces:
    """What the policy in force needs; nothing where none is. Raises GuardError when it can't be read."""
    found = _in_force(cgroup)
    if found is None:
        return WantedPlaces()
    policy, listeners, marked = found
    rules = {one.name: one.rules for one in policy.filters}
    kind = 0 if marked else _WITHOUT_MARK
    places = (
        Place(str(one.address), one.filter, one.target, one.digest ^ kind, rules[one.filter]) for one in listeners
    )
    return WantedPlaces(policy.filters, policy.filter_uid, tuple(places), marked)


def _in_force(cgroup: str | None) -> tuple[Policy, Sequence[Listener], bool] | None:
    """The policy in force, what has to listen for it, and whether it needs a mark. Iptables guards no single cgroup."""
    unsupported: Unsupported | None = None
    try:
        wanted = filter_listeners.wanted_listeners(PinLocation.of(cgroup))
        if wanted is not None:
            return wanted.policy, wanted.listeners, True
    except Unsupported as error:
        unsupported = error
    held = None
    if cgroup is None:
        from imds_guard.backends.iptables import IptablesBackend  # noqa: PLC0415 -- start-up time

        held = IptablesBackend().wanted()
    if held is None and unsupported is not None:
        raise unsupported
    return None if held is None else (*held, False)


def faults(cgroup: str | None) -> list[str]:
    """What keeps the filters of the policy in force from their callers, a sentence each."""
    try:
        wanted = wanted_places(cgroup)
        if not wanted.places:
            return []
        if wanted.uid is None:
            return [
                f"there is no account {FILTER_USER}, so the callers of filters are denied: run imds-guard "
                "install-service --filter, then imds-guard start"
            ]
        return _faults(wanted)
    except GuardError as error:
        return [str(error)]


def _faults(wanted: WantedPlaces) -> list[str]:
    silent = _not_listened_at(wanted.places)
    if silent:
        return [_sentence(silent, len(wanted.places))]
    client = FilterClient.open()
    if client is None:
        return ["the filter's listeners are there, but the filter does not answer: systemctl restart imds-guard-filter"]
    with client:
        served = client.places()
    other = [place for place in wanted.places if (place.address, place.digest) not in served]
    return [f"{_sentence(other, len(wanted.places))}; imds-guard filter --reload serves them"] if other else []


def _sentence(missing: list[Place], total: int) -> str:
    names = ", ".join(repr(name) for name in Counter(place.filter for place in missing))
    some = "" if len(missing) == total else f" at {len(missing)} of {total} places"
    return f"the filter does not serve {names}{some}, so its callers are denied: see systemctl status {SERVICE}"


def _not_listened_at(places: Iterable[Place]) -> list[Place]:
    """Where no socket listens that root has made. Raises GuardError."""
    try:
        with SockDiag() as diag:
            listening = {
                socket.inet_ntoa(one.local)
                for one in diag.each_socket(socket.AF_INET, socket.IPPROTO_TCP, (LISTEN,))
                if one.local_port == PORT and one.uid == 0
            }
    except OSError as error:
        raise GuardError(f"looking whether the filter listens: {system_text(error)}") from error
    return [place for place in places if place.address not in listening]
