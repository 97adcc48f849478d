# SPDX-License-Identifier: Apache-2.0
"""A second judge of what a metadata service has received. It knows no segments: it reads text as a lax server might."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from urllib.parse import unquote

ALLOW = (
    "GET /latest/meta-data/instance-id",
    "GET /latest/meta-data/placement/**",
    "PUT /latest/api/token",
    "POST /echo",
)
DENY = ("/*/meta-data/iam/**",)
"""Of the corpus, and of the property."""

_REQUEST = re.compile(
    rb"(GET|HEAD|PUT|POST) (/[!-~]*) HTTP/1\.1\r\nHost: 127\.0\.0\.1:[0-9]+\r\n"
    rb"((?:[A-Za-z0-9!#$%&'*+.^`|~-]+: ?[\t -~]*\r\n)*)\r\n"
)
_ALLOWED = {
    "GET": re.compile(r"/latest/meta-data/(instance-id|placement(/.*)?)"),
    "PUT": re.compile(r"/latest/api/token"),
    "POST": re.compile(r"/echo"),
}


def faults(received: Iterable[bytes]) -> list[str]:
    """What is wrong with requests that the service has received: it must be a list of nothing."""
    return [f"{fault}: {one!r}" for one in received for fault in _faults(one)]


def _faults(one: bytes) -> list[str]:
    match = _REQUEST.match(one)
    if match is None:
        return ["it is not a strict request"]
    found = []
    method, target, headers = match[1].decode(), match[2].decode(), match[3].decode().lower()
    names = [line.partition(":")[0] for line in headers.splitlines()]
    if names.count("content-length") > 1 or {"transfer-encoding", "host", "connection", "upgrade"} & set(names):
        found.append("headers about the connection")
    length = re.search(r"(?m)^content-length: ([0-9]+)\r?$", headers)
    if len(one) - match.end() != (int(length[1]) if length else 0):
        found.append("a body of another length")
    path, _, query = target.partition("?")
    method = "GET" if method == "HEAD" else method
    for reading in _readings(path):
        if not _ALLOWED[method].fullmatch(reading):
            found.append(f"{reading} is not allowed")
        if re.match(r"/[^/]*/meta-data/iam(/|$)", reading.lower()):
            found.append(f"{reading} is denied")
    if re.search(r"(^|[&;])recursive", unquote(query).lower()) and not path.startswith("/latest/meta-data/placement"):
        found.append("a query that widens the answer")
    return found


def _readings(path: str) -> set[str]:
    """What servers are known to make of a path: decoded once or twice, normalised, cut at a parameter."""
    decoded = {path, unquote(path), unquote(unquote(path))}
    normal = {posixpath.normpath(re.sub("/+", "/", one.replace("\\", "/"))) for one in decoded}
    return {re.sub(r";[^/]*", "", one).split("\0")[0].rstrip("/") or "/" for one in normal | decoded}
