# SPDX-License-Identifier: Apache-2.0
"""The target of an HTTP request, taken apart so that it has one meaning only; anything else is refused.

Two servers must not read the same bytes as two paths. So a path is decoded once, compared by segments, and sent on as
the segments were understood. Refused is what servers are known to read differently: encoded slashes and percent signs,
backslashes, parameters after a semicolon, empty and dot segments, bytes outside ASCII.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_SEGMENTS = 64
_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()*+,=:@-]+")
"""pchar of RFC 3986 section 3.3, without the semicolon and without percent-encoding."""
_QUERY = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,=:@/?-]|%(?!7[Ff])[2-9A-Fa-f][0-9A-Fa-f])*")
"""query of RFC 3986 section 3.4, without encoded control characters, and without the semicolon, which separates
parameters for some servers (HTML 4.01 appendix B.2.2)."""
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")


class BadRequest(Exception):
    """The request is malformed, or could be understood in two ways. The text says why; status 400."""


class RequestTarget(NamedTuple):
    """A path as segments, decoded, and a query."""

    segments: tuple[str, ...]
    """Empty for ``/``."""
    is_folder: bool
    """True when the path ends with a slash."""
    query: str = ""
    """As it was sent, without the question mark."""
    has_query: bool = False

    @property
    def path(self) -> str:
        """The path in its only spelling: what was decoded stays decoded, since no character needs encoding."""
        slash = "/" if self.is_folder and self.segments else ""
        return "/" + "/".join(self.segments) + slash

    def __str__(self) -> str:
        return self.path + (f"?{self.query}" if self.has_query else "")

    @property
    def parameters(self) -> tuple[tuple[str, str], ...]:
        """Names and values of the query, decoded, names in lower case."""
        pairs = (text.partition("=") for text in self.query.split("&") if text)
        return tuple((_decoded(name).lower(), _decoded(value)) for name, _, value in pairs)


def parse_target(raw: bytes) -> RequestTarget:
    """The target of a request line in origin form (RFC 9112 section 3.2.1). Raises BadRequest."""
    if not raw.startswith(b"/"):
        raise BadRequest("the request target is not a path")
    path, mark, query = raw.partition(b"?")
    if not _QUERY.fullmatch(query):
        raise BadRequest("the query has a character that is not allowed there")
    try:
        text = path.decode("ascii")
    except UnicodeDecodeError:
        raise BadRequest("the path has a byte outside ASCII") from None
    parts = text[1:].split("/")
    is_folder = parts[-1] == ""
    segments = tuple(_segment(part) for part in (parts[:-1] if is_folder else parts))
    if len(segments) > MAX_SEGMENTS:
        raise BadRequest(f"the path has more than {MAX_SEGMENTS} segments")
    return RequestTarget(segments, is_folder, query.decode("ascii"), bool(mark))


def _segment(raw: str) -> str:
    if not raw:
        raise BadRequest("the path has an empty segment")
    if len(_ENCODED.findall(raw)) != raw.count("%"):
        raise BadRequest("the path has a percent sign without two hexadecimal digits")
    segment = _ENCODED.sub(lambda match: chr(int(match[1], 16)), raw)
    if not _SEGMENT.fullmatch(segment):
        raise BadRequest("the path has a character, or an encoded one, that is not allowed there")
    if segment in (".", ".."):
        raise BadRequest("the path has a dot segment")
    return segment


def _decoded(text: str) -> str:
    return _ENCODED.sub(lambda match: chr(int(match[1], 16)), text.replace("+", " "))
