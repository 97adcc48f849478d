# SPDX-License-Identifier: Apache-2.0
"""Denials as they happen: one watch reads the kernel's ring buffer, others follow it, and one of them takes over.

The reader looks ten times a second while records come, more often in a flood, and once a second at the guard itself;
otherwise it sleeps in poll(2).
"""

from __future__ import annotations

import os
import select
import time
from typing import Callable

from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.errors import GuardError
from imds_guard.kernel import lockfile
from imds_guard.watch.event import as_json
from imds_guard.watch.leader import FINISH_S, Ended, Reader, Wish, require_ebpf
from imds_guard.watch.output import FULL, Followers, Lead, Outlet

_AGAIN_S = 0.2


def watch(wish: Wish, outlet: Outlet, started: Callable[[], object]) -> None:
    """Tells ``outlet`` of denials until SIGTERM or SIGINT, or until nobody reads it.

    ``started`` is called when it reads, or follows. Raises Unsupported under iptables, which tells nobody of denials.
    """
    require_ebpf(wish.cgroup)
    place = PinLocation.of(wish.cgroup)
    with Ended() as ended:
        if wish.once:
            _read_once(place, wish, outlet)
            return
        while not ended.now:
            held = lockfile.attempt(_lock_name(place))
            if held is not None:
                try:
                    _lead(place, wish, outlet, ended, started)
                finally:
                    _let_go(place, held)
                return
            lead = Lead.find(_socket_path(place), wish.allowed)
            if lead is not None:
                started()
                _follow(lead, outlet, ended)
            elif not ended.now:
                select.select([ended], [], [], _AGAIN_S)  # the other one is about to listen, or to end


def _lock_name(place: PinLocation) -> str:
    return f"watch-{place.name}"


def _socket_path(place: PinLocation) -> str:
    return os.path.join(lockfile.FOLDER, f"watch-{place.name}.sock")


def _let_go(place: PinLocation, held: int) -> None:
    if not place.is_root:
        lockfile.forget(_lock_name(place))
    os.close(held)


# --- following ------------------------------------------------------------------------------------------------------


def _follow(lead: Lead, outlet: Outlet, ended: Ended) -> None:
    """Prints what another watch reads; returns when that one is gone, or it is time to end."""
    import json  # noqa: PLC0415 -- only followers read JSON

    try:
        while not ended.now:
            waiting = select.poll()
            waiting.register(ended, select.POLLIN)
            waiting.register(outlet.fd, select.POLLOUT if outlet.pending else 0)
            if not outlet.pending:
                waiting.register(lead, select.POLLIN)
            ready = dict(waiting.poll())
            lines = lead.read() if lead.fileno() in ready else []
            if lines is None:
                return
            for line in lines:
                values = json.loads(line)
                if values["event"] == FULL:
                    raise GuardError(
                        "following the watch that runs already: it has too many followers; end one of them"
                    )
                outlet.put(values)
            if not outlet.push() or ready.get(outlet.fd, 0) & (select.POLLERR | select.POLLHUP):
                ended.now = True
    finally:
        lead.close()
        outlet.finish(FINISH_S if ended.now else 0)


# --- leading --------------------------------------------------------------------------------------------------------


def _lead(place: PinLocation, wish: Wish, outlet: Outlet, ended: Ended, started: Callable[[], object]) -> None:
    followers = Followers(_socket_path(place), as_json)
    reader = Reader(place, wish, outlet, followers)
    try:
        reader.look(time.monotonic())
        started()
        while not ended.now:
            if not reader.turn(ended):
                break
        reader.drain(time.monotonic())
    finally:
        reader.close()
        followers.close()


def _read_once(place: PinLocation, wish: Wish, outlet: Outlet) -> None:
    held = lockfile.attempt(_lock_name(place))
    if held is None:
        raise GuardError(
            "reading what is in the ring buffer: another imds-guard watch runs and takes it out; leave --once away to "
            "follow it"
        )
    try:
        reader = Reader(place, wish, outlet, None)
        try:
            reader.look(time.monotonic())
            if reader.source is None:
                raise GuardError("reading what is in the ring buffer: imds-guard is not active; run imds-guard start")
            while reader.drain(time.monotonic()):
                pass
        finally:
            reader.close()
    finally:
        _let_go(place, held)
