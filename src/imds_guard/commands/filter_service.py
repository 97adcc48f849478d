# SPDX-License-Identifier: Apache-2.0
"""``imds-guard filter``: the service, and new listeners for the one that runs.

The service gives up root, so it can neither take port 169 nor mark a socket. A command that changes the policy does
that for it, as root, and hands the sockets over.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Callable

from imds_guard.backends.ebpf.filter_listeners import ListenerMarks
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.commands.filter_places import SERVICE, WantedPlaces, faults, wanted_places
from imds_guard.errors import BadPolicy, GuardError, Unsupported
from imds_guard.filter.client import FilterClient
from imds_guard.filter.place import Mark, Place, listen_at
from imds_guard.kernel import accounts, lockfile, notify, privileges, systemd
from imds_guard.policy.filters import FILTER_USER

_RUNNING, _RELOADING = "filter", "filter-reload"
"""Names of locks: of the service as long as it runs, and of the one command that hands listeners over."""

NOT_RUNNING = (
    f"the filter is not running, so the callers of filters are denied: systemctl start {SERVICE} (imds-guard "
    "install-service --filter installs it)"
)


def serve(cgroup: str | None, warn: Callable[[list[str]], object]) -> None:
    """Runs the service until SIGTERM; ``warn`` gets what it can't serve. Raises GuardError; Unsupported without h11."""
    try:
        from imds_guard.filter import run  # noqa: PLC0415 -- no other command needs h11
    except ImportError as error:
        raise Unsupported(
            "starting the filter: the Python library h11 is missing; install the package python3-h11"
        ) from error
    account = accounts.user_in_files(FILTER_USER)
    if account is None:
        raise BadPolicy(
            f"starting the filter: there is no account {FILTER_USER}; run imds-guard install-service --filter"
        )
    if lockfile.attempt(_RUNNING) is None:
        raise GuardError("starting the filter: another imds-guard filter is running")
    privileges.lift_memory_lock_limit()
    with lockfile.exclusive(_RELOADING):
        wanted = wanted_places(cgroup)
        _allow_addresses(wanted, is_service=notify.VARIABLE in os.environ)
        listeners, failures = _listen(cgroup, wanted, wanted.places)
    if failures and not listeners:
        raise GuardError(failures[0])
    warn(failures)
    run.run(listeners, account)


def reload(cgroup: str | None) -> list[str]:
    """Brings the running service in line with the policy in force. Warnings. Raises GuardError."""
    with lockfile.exclusive(_RELOADING):
        wanted = wanted_places(cgroup)
        client = FilterClient.open()
        if client is None:
            return [NOT_RUNNING] if wanted.places and not _is_about_to_start() else []
        with client:
            return _hand_over(client, cgroup, wanted)


def _is_about_to_start() -> bool:
    """True at boot, where the unit of the filter waits for the one that runs this."""
    return systemd.is_booted() and systemd.job_of(SERVICE) in ("start", "restart")


def after_change(cgroup: str | None) -> list[str]:
    """reload() after a change of the policy. A failure is a warning: the policy is in force, and callers are denied."""
    try:
        return reload(cgroup)
    except GuardError as error:
        return [f"{error}; until the filter serves the policy in force, the callers of filters are denied"]


def repair(cgroup: str | None) -> list[str]:
    """Serves again what is not served. Returns what was done, one line for each fault that is gone."""
    before = faults(cgroup)
    if not before:
        return []
    with suppress(GuardError):
        reload(cgroup)
    if faults(cgroup) and systemd.is_booted() and systemd.is_enabled(SERVICE):
        with suppress(GuardError):
            systemd.systemctl("restart", SERVICE)
    after = faults(cgroup)
    return [f"{fault}: it serves them again" for fault in before if fault not in after]


def _hand_over(client: FilterClient, cgroup: str | None, wanted: WantedPlaces) -> list[str]:
    """Old places are closed first: one of them may have the address of a new one."""
    left = client.keep(wanted.keys)
    new = [place for place in wanted.places if (place.address, place.digest) not in left]
    if not new:
        return []
    _allow_addresses(wanted, is_service=systemd.is_booted() and systemd.is_active(SERVICE))
    listeners, failures = _listen(cgroup, wanted, new)
    for place, listener in listeners:
        with listener:
            client.serve(place, listener)
    return failures


_Listeners = list[tuple[Place, socket.socket]]


def _listen(cgroup: str | None, wanted: WantedPlaces, places: Iterable[Place]) -> tuple[_Listeners, list[str]]:
    """A listener for each place, and why there is none for some. Under eBPF it has the mark of what it serves."""
    in_order = list(places)
    if not in_order:
        return [], []
    if wanted.marked:
        with ListenerMarks(PinLocation.of(cgroup)) as marks:
            return _listen_at_each(in_order, marks.mark)
    found, failures = _listen_at_each(in_order, None)
    return _still_wanted(cgroup, found), failures


def _listen_at_each(places: Iterable[Place], mark: Mark | None) -> tuple[_Listeners, list[str]]:
    found: _Listeners = []
    failures: list[str] = []
    for place in places:
        try:
            found.append((place, listen_at(place, mark)))
        except GuardError as error:
            failures.append(str(error))
    return found, failures


def _still_wanted(cgroup: str | None, found: _Listeners) -> _Listeners:
    """Without those whose place has been given up since: its number may get another meaning.

    The numbers are given out with a look at who listens, so a listener that is there before this look keeps its number
    (backends/iptables/filter_listeners.py).
    """
    keys = wanted_places(cgroup).keys
    for place, listener in found:
        if (place.address, place.digest) not in keys:
            listener.close()
    return [(place, listener) for place, listener in found if (place.address, place.digest) in keys]


def _allow_addresses(wanted: WantedPlaces, is_service: bool) -> None:
    """Lets the unit exchange packets with what is served, and with nobody else (systemd.resource-control(5)).

    The hooks of eBPF lead a caller to 127.0.0.0/8 before it has an address of its own. DNAT leads packets, which have
    one already, and it can be any address of this machine: then the unit may refuse none.

    An empty assignment first: it removes what was allowed before.
    """
    if not is_service or not systemd.is_booted():
        return
    targets = sorted({str(place.target.address) for place in wanted.places})
    allowed = " ".join(("127.0.0.0/8", "::1/128", *targets)) if wanted.marked else "any"
    systemd.systemctl("set-property", "--runtime", SERVICE, "IPAddressAllow=", f"IPAddressAllow={allowed}")
