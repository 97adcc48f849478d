# SPDX-License-Identifier: Apache-2.0
"""The commands' end of the service's socket."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from imds_guard.errors import GuardError, system_text
from imds_guard.filter.messages import packed, receive, socket_path
from imds_guard.filter.place import Place
from imds_guard.filter.records import MAX_ROWS

ANSWERS_WITHIN_S = 3.0
_DOING = "asking the filter"


class FilterClient:
    """A connection to the running service. Close it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @staticmethod
    def open() -> FilterClient | None:
        """None where no service runs. Raises GuardError."""
        one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        one.settimeout(ANSWERS_WITHIN_S)
        try:
            one.connect(socket_path())
        except (FileNotFoundError, ConnectionRefusedError):
            one.close()
            return None
        except OSError as error:
            one.close()
            raise GuardError(f"{_DOING} at {socket_path()}: {system_text(error)}") from error
        return FilterClient(one)

    def __enter__(self) -> FilterClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def fileno(self) -> int:
        """The descriptor, for poll(2)."""
        return self._connection.fileno()

    def places(self) -> set[tuple[str, int]]:
        """The address and the digest of each place that it serves. Raises GuardError."""
        return _pairs(self._ask({"ask": "places"}))

    def keep(self, wanted: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
        """Has it close all places but these, and returns those that are left. Raises GuardError."""
        return _pairs(self._ask({"ask": "keep", "places": sorted(wanted)}))

    def serve(self, place: Place, listener: socket.socket) -> None:
        """Has it serve one place more, by a socket that listens there. Raises GuardError."""
        try:
            socket.send_fds(self._connection, [packed({"ask": "serve", **place.values()})], [listener.fileno()])
        except OSError as error:
            raise GuardError(f"{_DOING} to listen at {place.address}: {system_text(error)}") from error
        self._next()

    def report(self) -> dict[str, Any]:
        """Counters and rows: filter/records.py. Raises GuardError."""
        found = self._ask({"ask": "report"})
        expected = min(int(found.get("rows", 0)), MAX_ROWS)
        rows: list[dict[str, Any]] = []
        while len(rows) < expected:
            more = self._next().get("rows")
            if not isinstance(more, list) or not more:
                raise GuardError(f"{_DOING} for its report: it is malformed; start the filter again")
            rows += more
        return {**found, "rows": rows}

    def follow(self) -> None:
        """Has it send each refusal from now on: read() gives them."""
        self._send({"ask": "follow"})
        self._connection.setblocking(False)

    def read(self) -> Iterator[dict[str, Any]]:
        """The refusals that are there. Raises GuardError when the service has ended."""
        while True:
            try:
                values, _ = receive(self._connection)
            except BlockingIOError:
                return
            except OSError as error:
                raise GuardError(f"following the filter: {system_text(error)}") from error
            if values is None:
                raise GuardError("following the filter: it has ended")
            yield values

    def _ask(self, values: dict[str, Any]) -> dict[str, Any]:
        self._send(values)
        return self._next()

    def _send(self, values: dict[str, Any]) -> None:
        try:
            self._connection.sendall(packed(values))
        except OSError as error:
            raise GuardError(f"{_DOING}: {system_text(error)}; systemctl restart imds-guard-filter") from error

    def _next(self) -> dict[str, Any]:
        try:
            values, _ = receive(self._connection)
        except socket.timeout:
            raise GuardError(
                f"{_DOING}: no answer in {ANSWERS_WITHIN_S:.0f} s; systemctl restart imds-guard-filter"
            ) from None
        except OSError as error:
            raise GuardError(f"{_DOING}: {system_text(error)}; systemctl restart imds-guard-filter") from error
        if values is None:
            raise GuardError(f"{_DOING}: it has ended; systemctl status imds-guard-filter")
        return values


def _pairs(values: dict[str, Any]) -> set[tuple[str, int]]:
    try:
        return {(str(address), int(digest)) for address, digest in values["places"]}
    except (KeyError, TypeError, ValueError):
        raise GuardError(f"{_DOING} which places it serves: the answer is malformed") from None
