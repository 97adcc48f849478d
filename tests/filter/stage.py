# SPDX-License-Identifier: Apache-2.0
"""A service and a metadata service that records what it receives, in one event loop, on 127.0.0.1."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Callable, TypeVar

from imds_guard.filter.limits import Limits
from imds_guard.filter.place import place_of
from imds_guard.filter.service import Service
from imds_guard.kernel.arrival import report_arrivals
from imds_guard.policy.filter_text import rules_text
from imds_guard.policy.filters import FilterRules

T = TypeVar("T")
Answer = Callable[[bytes], bytes]
"""The response to the head and the body of a request. Without b"keep" the connection is closed afterwards."""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Metadata:
    """A server that is not strict: a request ends with an empty line and as many bytes as Content-Length says."""

    def __init__(self, answer: Answer = lambda request: OK) -> None:
        self.answer = answer
        self.requests: list[bytes] = []
        self.connections = 0

    async def start(self) -> int:
        """Returns its port."""
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self.server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(lengths[0].partition(b":")[2]) if lengths else 0)
                self.requests.append(head + body)
                answer = self.answer(head + body)
                writer.write(answer)
                await writer.drain()
                if b"Connection: close" in answer:
                    return
        except (OSError, asyncio.IncompleteReadError):
            self.requests += [] if reader.at_eof() else [b"?"]
        finally:
            writer.close()


class Stage:
    """A context manager."""

    def __init__(
        self,
        rules: FilterRules,
        answer: Answer = lambda request: OK,
        limits: Limits | None = None,
        listener: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self.rules = rules
        self.listener = listener
        self.metadata = Metadata(answer)
        self.limits = limits
        self.loop = asyncio.new_event_loop()

    def __enter__(self) -> Stage:
        self.run(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run(self._stop())
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T], within_s: float = 20.0) -> T:
        """Runs ``work`` in the event loop in which the servers run."""
        return self.loop.run_until_complete(asyncio.wait_for(work, within_s))

    async def _start(self) -> None:
        port = await self.metadata.start()
        self.host = f"127.0.0.1:{port}"
        self.service = Service(self.limits)
        self.address = self.serve(self.rules, port)

    def serve(self, rules: FilterRules, port: int, digest: int = 1) -> tuple[str, int]:
        """One more listener; its address."""
        listener = socket.socket()
        report_arrivals(listener)
        listener.bind(self.listener)
        listener.listen(1024)
        place = place_of(
            {
                "address": "127.169.1.1",
                "filter": "test",
                "target": ["127.0.0.1", port],
                "digest": digest,
                "rules": rules_text(rules),
            }
        )
        self.service.serve(place, listener)
        address, number = listener.getsockname()
        return address, number

    def serve_in_loop(self, rules: FilterRules, port: int, digest: int) -> tuple[str, int]:
        """serve(), from outside of the loop."""

        async def serve() -> tuple[str, int]:
            return self.serve(rules, port, digest)

        return self.run(serve())

    async def _stop(self) -> None:
        await self.service.close()
        self.metadata.server.close()
        await asyncio.sleep(0)

    async def exchange(self, sent: bytes, half_close: bool = True) -> bytes:
        """Everything that comes back for ``sent`` until the connection ends."""
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            writer.write(sent)
            if half_close:
                writer.write_eof()
            return await reader.read()
        except OSError as error:
            return f"<{type(error).__name__}>".encode()
        finally:
            writer.close()

    def ask(self, sent: bytes, half_close: bool = True) -> bytes:
        """exchange(), from outside of the loop."""
        return self.run(self.exchange(sent, half_close))

    def request(self, line: str, *headers: str, body: bytes = b"") -> bytes:
        """The bytes of a well-formed request that closes the connection."""
        lines = [f"{line} HTTP/1.1", f"Host: {self.host}", *headers, "Connection: close", "", ""]
        return "\r\n".join(lines).encode() + body


def status_of(response: bytes) -> int:
    """The status of the first response; 0 where there is none."""
    return int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/1.1 ") else 0


def statuses_of(responses: bytes) -> list[int]:
    """Of all responses on a connection."""
    return [int(part.split(b" ", 1)[0]) for part in responses.split(b"HTTP/1.1 ")[1:]]
