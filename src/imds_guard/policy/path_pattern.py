# SPDX-License-Identifier: Apache-2.0
"""The patterns of a filter: ``GET /*/meta-data/placement/**``.

A pattern is a method, which can be left out, and a path. ``*`` is one segment; ``**`` at the end is everything below
the path, and the path itself. A slash at the end does not count, neither in the pattern nor in the request.
"""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.errors import BadPolicy
from imds_guard.policy.request_target import BadRequest, parse_target

METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS")


class PathPattern(NamedTuple):
    """A parsed pattern. A pattern for GET is one for HEAD, too."""

    text: str
    method: str | None
    segments: tuple[str, ...]
    """Without a ``**`` at the end."""
    is_subtree: bool
    """True with a ``**`` at the end."""
    ignore_case: bool = False

    def is_for(self, method: str) -> bool:
        """True when the pattern is about requests with this method."""
        return self.method is None or self.method == ("GET" if method == "HEAD" else method)

    def matches(self, path: tuple[str, ...]) -> bool:
        """True when the pattern means this path."""
        if len(path) < len(self.segments) or (len(path) > len(self.segments) and not self.is_subtree):
            return False
        return self._begins_like(path)

    def covers(self, path: tuple[str, ...]) -> bool:
        """True when the pattern means this path and everything below it."""
        return self.is_subtree and self.matches(path)

    def touches(self, path: tuple[str, ...]) -> bool:
        """True when the pattern means this path or something below it."""
        return self._begins_like(path) and (self.is_subtree or len(path) <= len(self.segments))

    def _begins_like(self, path: tuple[str, ...]) -> bool:
        return all(own in ("*", self._folded(other)) for own, other in zip(self.segments, path))

    def _folded(self, segment: str) -> str:
        return segment.lower() if self.ignore_case else segment


def parse_pattern(text: str, ignore_case: bool = False) -> PathPattern:
    """Raises BadPolicy."""
    method, space, path = text.partition(" ")
    if not space:
        method, path = "", text
    elif method not in METHODS:
        raise BadPolicy(f"{text!r}: {method!r} is not a method: known are {', '.join(METHODS)}")
    if method == "HEAD":
        raise BadPolicy(f"{text!r}: a rule for GET is one for HEAD, too: write GET")
    try:
        target = parse_target(path.encode("utf-8", "surrogatepass"))
    except BadRequest as error:
        raise BadPolicy(f"{text!r} is not a path: {error}") from None
    if target.has_query or "%" in path:
        raise BadPolicy(f"{text!r}: a rule is about a path, without a query and without percent-encoding")
    segments = target.segments
    is_subtree = segments[-1:] == ("**",)
    if is_subtree:
        segments = segments[:-1]
    for segment in segments:
        if "*" in segment and segment != "*":
            raise BadPolicy(f"{text!r}: * stands for a whole segment, and ** for all that follow, at the end only")
    if ignore_case:
        segments = tuple(segment.lower() for segment in segments)
    return PathPattern(text, method or None, segments, is_subtree, ignore_case)
