# SPDX-License-Identifier: Apache-2.0
"""The head of an HTTP/1 request, read strictly: what another server could read in a second way is refused. Pure.

Nothing of these bytes is sent on. The request to the metadata service is made anew from the parts (upstream.py).
Rules by number are of RFC 9112.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from imds_guard.policy.header_rules import Headers, values_of
from imds_guard.policy.request_target import BadRequest, parse_target
from imds_guard.policy.requests import Request

MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024
MAX_HEADERS = 100
END = b"\r\n\r\n"

_METHOD = re.compile(rb"[A-Z]{1,16}")
_VERSION = re.compile(rb"HTTP/1\.[01]")
_NAME = re.compile(rb"[A-Za-z0-9!#$%&'*+.^`|~-]{1,64}")
"""A token without the underscore, which CGI and others take for a hyphen."""
_VALUE = re.compile(rb"[\t\x20-\x7e]*")
_LENGTH = re.compile(r"[0-9]{1,10}")

_HOP_BY_HOP = frozenset(("connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade", "expect"))
"""About this connection alone (RFC 9110 section 7.6.1)."""
_OURS = frozenset(("host", "content-length"))
"""Made anew for the metadata service."""
_OVERRIDES = frozenset(
    (
        *("x-http-method", "x-http-method-override", "x-method-override"),
        *("x-original-url", "x-rewrite-url", "x-original-uri", "x-rewrite-uri"),
    )
)
"""Frameworks and reverse proxies take the method or the path from these in place of the request line's: the rules would
judge another request. Source: https://portswigger.net/web-security/access-control."""


class Head(NamedTuple):
    """The head of a well-formed request."""

    request: Request
    length: int
    """Of the body, in bytes."""
    keeps_alive: bool
    expects_continue: bool
    is_http_1_0: bool

    @property
    def is_bodiless(self) -> bool:
        """True when the response ends with its head, whatever its Content-Length says (RFC 9110 section 9.3.2)."""
        return self.request.method == "HEAD"

    def headers_to_send(self) -> Headers:
        """The headers that are passed on. None of them is named by Connection: parse_head() refuses that."""
        return [(name, value) for name, value in self.request.headers if name not in _HOP_BY_HOP | _OURS]


def find_end(received: bytes | bytearray) -> int:
    """The length of the head in what was received, or 0 when it has no end yet. Raises BadRequest.

    A line that ends with LF alone is refused at once: another server could see the end of the head there (2.2).
    """
    end = received.find(END)
    head = received if end < 0 else received[: end + len(END)]
    if head.count(b"\n") != head.count(b"\r\n"):
        raise BadRequest("a line does not end with CR LF")
    if end < 0 and len(received) > MAX_HEAD_BYTES - len(END):
        raise BadRequest(f"the head is larger than {MAX_HEAD_BYTES} bytes")
    if end + len(END) > MAX_HEAD_BYTES:
        raise BadRequest(f"the head is larger than {MAX_HEAD_BYTES} bytes")
    return 0 if end < 0 else end + len(END)


def parse_head(head: bytes, hosts: Collection[str]) -> Head:
    """A head that ends with an empty line, for a service with these names. Raises BadRequest."""
    first, *lines = head[: -len(END)].split(b"\r\n")
    method, target, version = _request_line(first)
    headers = tuple(_header(line) for line in lines)
    if len(headers) > MAX_HEADERS:
        raise BadRequest(f"the request has more than {MAX_HEADERS} headers")
    _check_host(headers, hosts)
    if any(name in _OVERRIDES for name, _ in headers):
        raise BadRequest("a header that replaces the method or the path is not accepted")
    length = _length(headers)
    tokens = _connection_tokens(headers)
    is_old = version == b"HTTP/1.0"
    return Head(
        Request(method, parse_target(_with_one_slash(target)), headers),
        length,
        not is_old and "close" not in tokens,
        _expects_continue(headers),
        is_old,
    )


def _request_line(line: bytes) -> tuple[str, bytes, bytes]:
    """Section 3: one space each. HTTP/0.9 has no version, HTTP/2 begins with a line of its own."""
    parts = line.split(b" ")
    if len(parts) != 3 or not _METHOD.fullmatch(parts[0]) or not _VERSION.fullmatch(parts[2]):
        raise BadRequest("the request line is not METHOD PATH HTTP/1.1")
    return parts[0].decode(), parts[1], parts[2]


def _with_one_slash(target: bytes) -> bytes:
    """A second slash at the very beginning is dropped, before rules are looked at. It is not passed on.

    EC2 ignores it, and the SDK for JavaScript sends it: @aws-sdk/ec2-metadata-service puts the endpoint's path, ``/``,
    in front of the path that it is asked for (MetadataService.request).
    """
    return target[1:] if target.startswith(b"//") else target


def _header(line: bytes) -> tuple[str, str]:
    """Section 5: no white space before the colon, and no line that continues the one before."""
    name, colon, value = line.partition(b":")
    if not colon or not _NAME.fullmatch(name):
        raise BadRequest("a header is malformed")
    if not _VALUE.fullmatch(value):
        raise BadRequest("a header has a control character, or a byte outside ASCII")
    return name.decode().lower(), value.decode().strip(" \t")


def _check_host(headers: Headers, hosts: Collection[str]) -> None:
    """Section 3.2. Another name means that somebody was led here, by DNS rebinding for example."""
    found = values_of(headers, "host")
    if len(found) != 1:
        raise BadRequest("the request has no Host, or more than one")
    if found[0].lower() not in hosts:
        raise BadRequest("the Host is not one of the service's names")


def _length(headers: Headers) -> int:
    """Section 6: without Transfer-Encoding, the body is as long as the one Content-Length says."""
    if values_of(headers, "transfer-encoding"):
        raise BadRequest("Transfer-Encoding is not accepted")
    found = values_of(headers, "content-length")
    if not found:
        return 0
    if len(found) > 1 or not _LENGTH.fullmatch(found[0]):
        raise BadRequest("Content-Length is not one number")
    if int(found[0]) > MAX_BODY_BYTES:
        raise BadRequest(f"the body is larger than {MAX_BODY_BYTES} bytes")
    return int(found[0])


def _connection_tokens(headers: Headers) -> set[str]:
    tokens = {token.strip().lower() for value in values_of(headers, "connection") for token in value.split(",")}
    if "upgrade" in tokens or values_of(headers, "upgrade"):
        raise BadRequest("Upgrade is not accepted")
    # A header that Connection names is dropped on the way: rules must not be about a header that nobody receives.
    kept = {name for name, _ in headers} - _HOP_BY_HOP
    if tokens & kept:
        raise BadRequest("Connection names a header of the request")
    return tokens


def _expects_continue(headers: Headers) -> bool:
    found = values_of(headers, "expect")
    if found and [value.lower() for value in found] != ["100-continue"]:
        raise BadRequest("Expect is not 100-continue")
    return bool(found)
