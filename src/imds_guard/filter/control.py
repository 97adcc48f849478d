# SPDX-License-Identifier: Apache-2.0
"""The service's end of its socket for commands: which places it serves, what it has refused, and new listeners."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any

from imds_guard.errors import GuardError
from imds_guard.filter.messages import ROWS_OF_A_PACKET, packed, receive, socket_path
from imds_guard.filter.place import place_of
from imds_guard.filter.service import Service

MAX_CONNECTIONS = 32


def listen() -> socket.socket:
    """The socket, to which root alone can connect: others can't enter its folder. Raises OSError."""
    path = socket_path()
    with suppress(FileNotFoundError):
        os.unlink(path)
    one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        one.bind(path)
    finally:
        os.umask(before)
    one.listen(MAX_CONNECTIONS)
    return one


class Control:
    """Answers the commands from start() on."""

    def __init__(self, listener: socket.socket, service: Service) -> None:
        self._listener = listener
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Call it in a running event loop."""
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if len(self._tasks) >= MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._converse(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _converse(self, connection: socket.socket) -> None:
        try:
            while True:
                await _readable(connection)
                values, fds = receive(connection)
                if values is None:
                    return
                await self._answer(connection, values, fds)
        except (OSError, GuardError, KeyError, TypeError, ValueError):
            return  # the command sees the end of the connection
        finally:
            connection.close()

    async def _answer(self, connection: socket.socket, values: dict[str, Any], fds: list[int]) -> None:
        what = values.get("ask")
        if what == "serve" and len(fds) == 1:
            self._service.serve(place_of(values), socket.socket(fileno=fds.pop()))
            await _send(connection, {})
        elif what == "keep":
            self._service.keep_only((str(address), int(digest)) for address, digest in values["places"])
            await _send(connection, self._places())
        elif what == "places":
            await _send(connection, self._places())
        elif what == "report":
            await self._report(connection)
        elif what == "follow":
            await self._follow(connection)
        for fd in fds:
            os.close(fd)

    def _places(self) -> dict[str, Any]:
        return {"places": [[place.address, place.digest] for place in self._service.places]}

    async def _report(self, connection: socket.socket) -> None:
        report = self._service.records.report()
        rows = report.pop("rows")
        report["connections"] = sum(self._service.connections.values())
        await _send(connection, {**report, "rows": len(rows)})
        for at in range(0, len(rows), ROWS_OF_A_PACKET):
            await _send(connection, {"rows": rows[at : at + ROWS_OF_A_PACKET]})

    async def _follow(self, connection: socket.socket) -> None:
        """Sends each refusal from now on. What does not fit into the socket's buffer is counted."""
        left_out = 0

        def tell(values: dict[str, Any]) -> None:
            nonlocal left_out
            try:
                connection.send(packed({**values, "left_out": left_out}))
                left_out = 0
            except OSError:
                left_out += 1

        self._service.records.listeners.append(tell)
        try:
            await _readable(connection)  # the command says nothing more: it has closed
        finally:
            self._service.records.listeners.remove(tell)


async def _send(connection: socket.socket, values: dict[str, Any]) -> None:
    await asyncio.get_running_loop().sock_sendall(connection, packed(values))


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def now() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection.fileno(), now)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())
