# SPDX-License-Identifier: Apache-2.0
"""One connection of a caller: requests are read, judged, and passed on or refused, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, NamedTuple

from imds_guard.filter.hosts import host_names
from imds_guard.filter.limits import Limits, Slots
from imds_guard.filter.records import Records, Refusal, path_of
from imds_guard.filter.request_head import MAX_HEAD_BYTES, Head, find_end, parse_head
from imds_guard.filter.upstream import ANSWER_S, LONG_ANSWER_S, Asked, Link, NoAnswer, Response, Upstream
from imds_guard.policy.filters import FilterRules, Target
from imds_guard.policy.request_target import BadRequest
from imds_guard.policy.requests import MALFORMED, Judge, Outcome, may_wait

_READ_BYTES = 16 * 1024
_HIGH_WATER_BYTES = 64 * 1024
_LINGER_S = 2.0


class Rules:
    """What a listener serves: one target, by the rules of one filter."""

    def __init__(self, name: str, target: Target, rules: FilterRules) -> None:
        self.name = name
        self.target = target
        self.is_audit = rules.audit
        self.judge = Judge(rules)
        self.hosts = host_names(target)
        self.upstream = Upstream(target)
        self.is_closed = False
        """True when the listener is closed: then each connection ends after its response."""


class Services(NamedTuple):
    """What all connections share."""

    limits: Limits
    records: Records
    slots: Slots


class _Ended(Exception):
    """The connection is over: nothing more is to be read or written."""


class Connection:
    """A connection of user ``uid``. The rules are those of its listener when it was accepted."""

    __slots__ = (
        *("uid", "rules", "is_idle", "is_aborted", "_reader", "_writer", "_services", "_timer", "_buffer", "_is_last"),
    )

    def __init__(
        self,
        uid: int,
        rules: Rules,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        services: Services,
    ) -> None:
        self.uid = uid
        self.rules = rules
        self.is_idle = True
        """True between two requests."""
        self.is_aborted = False
        self._reader, self._writer = streams
        self._services = services
        self._timer: asyncio.TimerHandle | None = None
        self._buffer = bytearray()
        self._is_last = False

    def abort(self) -> None:
        """Ends the connection now."""
        self.is_aborted = True
        self._writer.transport.abort()

    @property
    def _is_over(self) -> bool:
        return self._is_last or self.rules.is_closed

    def finish(self) -> None:
        """Ends the connection when the request that is under way has its response."""
        self._is_last = True
        if self.is_idle:
            self.abort()

    async def serve(self) -> None:
        """Until either side closes. Raises nothing: what a caller sends is no fault of the service."""
        try:
            self._writer.transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
            while not self._is_over and await self._request():
                pass
            await self._close()
        except (OSError, _Ended, EOFError):
            pass
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self.abort()

    # --- time ---

    def _within(self, seconds: float) -> None:
        """From now on the connection has this long for the next step."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self.abort)

    def _no_limit(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- reading ---

    async def _request(self) -> bool:
        """One request and its response. False when it was the last."""
        limits = self._services.limits
        self.is_idle = not self._buffer
        self._within(limits.idle_s if self.is_idle else limits.head_s)
        try:
            head = await self._read_head()
            body = await self._read_body(head)
        except BadRequest as error:
            self._record("-", "-", Outcome(MALFORMED, f"malformed: {error}"), audited=False)
            await self._refuse(Outcome(MALFORMED, f"malformed: {error}"), keeps_alive=False)
            return False
        outcome = self.rules.judge.judge(head.request)
        audited = not outcome.allowed and self.rules.is_audit
        if not outcome.allowed:
            self._record(head.request.method, path_of(head.request.target), outcome, audited)
            if not audited:
                await self._refuse(outcome, head.keeps_alive, head.is_bodiless)
                return head.keeps_alive
        return await self._pass_on(head, body)

    async def _read_head(self) -> Head:
        while True:
            end = find_end(self._buffer)
            if end:
                head = bytes(self._buffer[:end])
                del self._buffer[:end]
                return parse_head(head, self.rules.hosts)
            received = await self._reader.read(_READ_BYTES)
            if not received:
                raise _Ended
            if self.is_idle:
                self.is_idle = False
                self._within(self._services.limits.head_s)
            self._buffer += received

    async def _read_body(self, head: Head) -> bytes:
        if not head.length:
            return b""
        self._within(self._services.limits.body_s)
        if head.expects_continue and len(self._buffer) < head.length:
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        missing = head.length - len(self._buffer)
        if missing > 0:
            self._buffer += await self._reader.readexactly(missing)
        body = bytes(self._buffer[: head.length])
        del self._buffer[: head.length]
        return body

    # --- answering ---

    async def _pass_on(self, head: Head, body: bytes) -> bool:
        self._no_limit()  # from here on the connection to the service has one
        if not await self._services.slots.take(self.uid):
            await self._refuse(Outcome(503, "too many requests at the same time"), head.keeps_alive, head.is_bodiless)
            return head.keeps_alive
        try:
            return await self._exchange(head, body)
        finally:
            self._services.slots.give(self.uid)

    async def _exchange(self, head: Head, body: bytes) -> bool:
        upstream = self.rules.upstream
        try:
            if may_wait(head.request.target):
                link, response = await self._unless_gone(upstream.ask(head, body, LONG_ANSWER_S))
            else:
                link, response = await upstream.ask(head, body)
        except NoAnswer as error:
            self._services.records.count(self.rules.name, "unanswered")
            outcome = Outcome(502, f"the metadata service did not answer: {error}")
            await self._refuse(outcome, head.keeps_alive, head.is_bodiless)
            return head.keeps_alive
        is_whole = False
        try:
            keeps_alive = head.keeps_alive and not self._is_over
            await self._relay(link, response, head, keeps_alive)
            is_whole = True
        finally:
            if is_whole:
                upstream.give_back(link)
            else:
                link.close()
        self._services.records.count(self.rules.name, "passed")
        return keeps_alive

    async def _unless_gone(self, asking: Coroutine[Any, Any, Asked]) -> Asked:
        """Waits for the answer as long as the caller does. A caller that closes frees its slot at once."""
        asked = asyncio.ensure_future(asking)
        gone = asyncio.ensure_future(self._until_gone())
        try:
            await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not asked.done():
                raise _Ended
            return await asked
        finally:
            await _cancelled(asked)
            await _cancelled(gone)

    async def _until_gone(self) -> None:
        """Keeps what the caller sends meanwhile. One that sends more than a head is taken for gone."""
        while len(self._buffer) <= MAX_HEAD_BYTES:
            received = await self._reader.read(_READ_BYTES)
            if not received:
                return
            self._buffer += received

    async def _relay(self, link: Link, response: Response, head: Head, keeps_alive: bool) -> None:
        chunked = response.has_body and response.length is None and not head.is_http_1_0
        lines = [b"HTTP/1.1 %d %s" % (response.status, response.reason)]
        lines += [name + b": " + value for name, value in response.headers]
        lines += [b"Transfer-Encoding: chunked"] if chunked else []
        lines += [] if keeps_alive else [b"Connection: close"]
        unsent = b"\r\n".join((*lines, b"", b""))
        try:
            async for part in link.body(ANSWER_S):
                await self._write(unsent + (b"%x\r\n%s\r\n" % (len(part), part) if chunked else part))
                unsent = b""
        except NoAnswer:
            raise _Ended from None  # half a response was sent: only the end of the connection says so
        unsent += b"0\r\n\r\n" if chunked else b""
        if unsent:
            await self._write(unsent)

    async def _refuse(self, outcome: Outcome, keeps_alive: bool, is_bodiless: bool = False) -> None:
        text = f"imds-guard: filter {self.rules.name!r} refuses this request ({outcome.rule})\n"
        if outcome.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            text = f"imds-guard: filter {self.rules.name!r}: {outcome.rule}\n"
        body = text.encode("ascii", "backslashreplace")
        lines = [
            f"HTTP/1.1 {outcome.status} {HTTPStatus(outcome.status).phrase}",
            "Content-Type: text/plain; charset=us-ascii",
            f"Content-Length: {len(body)}",
            *([] if keeps_alive else ["Connection: close"]),
        ]
        await self._write("\r\n".join((*lines, "", "")).encode() + (b"" if is_bodiless else body))

    async def _write(self, sent: bytes) -> None:
        self._within(self._services.limits.stalled_s)
        self._writer.write(sent)
        await self._writer.drain()

    async def _close(self) -> None:
        """Closes when the other side has read the response: what it has sent in excess would reset the connection."""
        if self._writer.can_write_eof():
            self._writer.write_eof()
        self._within(_LINGER_S)
        excess = 0
        while excess < 4 * MAX_HEAD_BYTES:
            received = await self._reader.read(_READ_BYTES)
            if not received:
                return
            excess += len(received)

    def _record(self, method: str, path: str, outcome: Outcome, audited: bool) -> None:
        records = self._services.records
        records.count(self.rules.name, "audited" if audited else "refused")
        records.add(Refusal(self.rules.name, self.uid, method, path, outcome.rule, outcome.status, audited))


async def _cancelled(task: asyncio.Future[Any]) -> bool:
    """True when the task was under way, and was ended."""
    if task.done():
        return task.cancelled() or task.exception() is not None
    task.cancel()
    with suppress(asyncio.CancelledError, NoAnswer, OSError):
        await task
    return True


def finish_all(connections: Iterable[Connection], rules: Rules) -> None:
    """Ends the connections with these rules, each after its response."""
    for one in list(connections):
        if one.rules is rules:
            one.finish()
