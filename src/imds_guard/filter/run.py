# SPDX-License-Identifier: Apache-2.0
"""Runs the service: takes the listeners and the socket for commands, gives up root, serves until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Sequence

from imds_guard.errors import trying
from imds_guard.filter import control
from imds_guard.filter.limits import Limits, limits_for
from imds_guard.filter.place import Place
from imds_guard.filter.service import Service
from imds_guard.kernel import notify, privileges
from imds_guard.kernel.name_service import User

Listeners = Sequence[tuple[Place, socket.socket]]
"""Each place with a marked socket that listens there."""

_WATCHDOG = "WATCHDOG_USEC"


def run(listeners: Listeners, account: User) -> None:
    """Serves until SIGTERM or SIGINT. Call it as root; from then on this process is ``account``. Raises GuardError."""
    with trying("making the socket of the filter for commands", "repair /run/imds-guard"):
        commands = control.listen()
    limits = limits_for(privileges.lift_open_files_limit())
    with trying(f"becoming user {account.name}", "start the filter as root"):
        privileges.drop_to(account.uid, account.gid)
    asyncio.run(_serve(listeners, commands, limits))


async def _serve(listeners: Listeners, commands: socket.socket, limits: Limits) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    service = Service(limits)
    for place, listener in listeners:
        service.serve(place, listener)
    control.Control(commands, service).start()
    notify.ready(f"serving {len(service.places)} addresses")
    watchdog = loop.create_task(_keep_watchdog_quiet())
    await stopped.wait()
    watchdog.cancel()
    await service.close()


async def _keep_watchdog_quiet() -> None:
    """Tells the service manager twice in each period that the event loop turns (sd_watchdog_enabled(3))."""
    microseconds = os.environ.get(_WATCHDOG, "")
    if not microseconds.isdigit() or int(microseconds) == 0:
        return
    while True:
        notify.notify("WATCHDOG=1")
        await asyncio.sleep(int(microseconds) / 2e6)
