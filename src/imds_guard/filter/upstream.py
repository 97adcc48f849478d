# SPDX-License-Identifier: Apache-2.0
"""Connections to metadata services. A request is made anew here from its parts; h11 reads the response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import NamedTuple

import h11

from imds_guard.filter.hosts import host_header
from imds_guard.filter.request_head import Head
from imds_guard.policy.filters import Target

CONNECT_S = 5.0
ANSWER_S = 30.0
LONG_ANSWER_S = 3600.0
"""For a request that may wait for a change."""
IDLE_S = 20.0
MAX_IDLE = 8
"""Connections to one target that are kept for the next request."""
MAX_RESPONSE_HEAD_BYTES = 64 * 1024
_READ_BYTES = 64 * 1024

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"te", b"trailer", b"upgrade")
)


class NoAnswer(Exception):
    """The metadata service gave no response that can be passed on. The text says why."""


class Response(NamedTuple):
    """The head of a response, without the headers that are about the connection to the service."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    has_body: bool
    length: int | None
    """Of the body; None where only its end tells."""


class Link:
    """One connection. ``reused`` is true from its second request on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.reused = False
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_RESPONSE_HEAD_BYTES)
        self._method = ""
        self._within_s = ANSWER_S
        self.is_late = False

    @property
    def is_open(self) -> bool:
        """False when the service has closed it, or has sent something that nobody asked for."""
        return not (self.writer.transport.is_closing() or self.reader.at_eof() or self._http.trailing_data[0])

    def close(self) -> None:
        """Ends the connection without waiting."""
        self.writer.transport.abort()

    async def ask(self, target: Target, head: Head, body: bytes, within_s: float) -> Response:
        """Sends a request and reads the head of its response. Raises NoAnswer, OSError."""
        self._within_s = within_s
        request = head.request
        headers = [("Host", host_header(target))]
        headers += [(name.title(), value) for name, value in head.headers_to_send()]
        if body or request.method in ("PUT", "POST", "PATCH"):
            headers.append(("Content-Length", str(len(body))))
        self._method = request.method
        try:
            sent = self._http.send(h11.Request(method=request.method, target=str(request.target), headers=headers))
            sent = (sent or b"") + (self._http.send(h11.Data(data=body)) or b"" if body else b"")
            sent += self._http.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError as error:
            raise NoAnswer(f"the request can't be sent: {error}") from None
        self.writer.write(sent)
        timer = asyncio.get_running_loop().call_later(within_s, self._expire)  # for the whole head, however it drips
        try:
            return await self._answer()
        finally:
            timer.cancel()

    async def _answer(self) -> Response:
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                return self._response(event)
            if not isinstance(event, h11.InformationalResponse) or event.status_code == 101:
                raise NoAnswer("it closed the connection")

    async def body(self, within_s: float) -> AsyncIterator[bytes]:
        """The parts of the response's body, each in this time. Raises NoAnswer, OSError."""
        self._within_s = within_s
        while True:
            event = await self._event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise NoAnswer("the response has no end")

    def is_reusable(self) -> bool:
        """True when the next request can be sent. Call it when the body has been read."""
        with suppress(h11.LocalProtocolError):
            self._http.start_next_cycle()
            self.reused = True
            return self.is_open
        return False

    async def _event(self) -> object:
        while True:
            try:
                event = self._http.next_event()
                if event is not h11.NEED_DATA:
                    return event
                self._http.receive_data(await self._read())
            except h11.RemoteProtocolError as error:
                if self.is_late:
                    raise NoAnswer(f"no answer in {self._within_s:.0f} s") from None
                raise NoAnswer(f"its response is malformed: {error}") from None

    async def _read(self) -> bytes:
        timer = asyncio.get_running_loop().call_later(self._within_s, self._expire)
        try:
            return await self.reader.read(_READ_BYTES)
        finally:
            timer.cancel()

    def _expire(self) -> None:
        self.is_late = True
        self.close()  # the reader sees the end

    def _response(self, event: h11.Response) -> Response:
        named = {
            token.strip().lower()
            for name, value in event.headers
            if name == b"connection"
            for token in bytes(value).split(b",")
        }
        dropped = _HOP_BY_HOP | named
        if any(name == b"transfer-encoding" for name, _ in event.headers):
            dropped |= {b"content-length"}  # it does not count (RFC 9112 section 6.3), and the body is sent anew
        headers = [
            (bytes(name), bytes(value)) for name, value in event.headers.raw_items() if name.lower() not in dropped
        ]
        has_body = self._method != "HEAD" and event.status_code not in (204, 304)
        length = next((int(value) for name, value in headers if name.lower() == b"content-length"), None)
        return Response(event.status_code, bytes(event.reason), headers, has_body, length)


Asked = tuple[Link, Response]


class Upstream:
    """The connections to one target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._idle: list[tuple[Link, asyncio.TimerHandle]] = []

    async def ask(self, head: Head, body: bytes, within_s: float = ANSWER_S) -> Asked:
        """A connection that has answered with the head of a response. Give it back or close it. Raises NoAnswer.

        A kept connection may be closed by the service at any time. Then the request is sent once more on a new one,
        unless it may have had an effect.
        """
        link = self._kept()
        if link is not None:
            try:
                return link, await link.ask(self.target, head, body, within_s)
            except (NoAnswer, OSError):
                link.close()
                if link.is_late:
                    raise
                if head.request.method not in ("GET", "HEAD", "PUT"):
                    raise NoAnswer("it closed the connection") from None
            except BaseException:
                link.close()
                raise
        link = await self._connect()
        try:
            return link, await link.ask(self.target, head, body, within_s)
        except OSError as error:
            link.close()
            raise NoAnswer(error.strerror or str(error)) from None
        except BaseException:
            link.close()
            raise

    def give_back(self, link: Link) -> None:
        """Keeps a connection whose response was read to its end for the next request, or closes it."""
        if not link.is_reusable() or len(self._idle) >= MAX_IDLE:
            link.close()
            return
        timer = asyncio.get_running_loop().call_later(IDLE_S, self._expire, link)
        self._idle.append((link, timer))

    def close(self) -> None:
        """Closes the kept connections."""
        for link, timer in self._idle:
            timer.cancel()
            link.close()
        self._idle.clear()

    def _kept(self) -> Link | None:
        while self._idle:
            link, timer = self._idle.pop()
            timer.cancel()
            if link.is_open:
                return link
            link.close()
        return None

    def _expire(self, link: Link) -> None:
        self._idle = [(one, timer) for one, timer in self._idle if one is not link]
        link.close()

    async def _connect(self) -> Link:
        address, port = str(self.target.address), self.target.port
        try:
            opened = await asyncio.wait_for(asyncio.open_connection(address, port), CONNECT_S)
        except asyncio.TimeoutError:
            raise NoAnswer(f"no connection in {CONNECT_S:.0f} s") from None
        except OSError as error:
            raise NoAnswer(error.strerror or str(error)) from None
        return Link(*opened)
