# SPDX-License-Identifier: Apache-2.0
"""The one door of colour. Only words that tell how it stands have one, on a terminal, unless somebody wants none."""

from __future__ import annotations

import os
import re
from typing import TextIO

_GREEN, _YELLOW, _RED = "\x1b[32m", "\x1b[33m", "\x1b[31m"
_DEFAULT = "\x1b[39m"
"""The colour of before. Source: ECMA-48, SGR."""

_COLOURS = {
    "active": _GREEN,
    "allowed": _GREEN,
    "degraded": _YELLOW,
    "fault": _YELLOW,
    "inactive": _RED,
    "denied": _RED,
}
_STATE = re.compile(
    r"^(imds-guard: (?=active|degraded|inactive)|  (?=fault: )|(?=(?:allowed|denied): ))"
    r"(active|degraded|inactive|fault|allowed|denied)\b",
    re.MULTILINE,
)
"""At the beginning of a line: of status and verify ("imds-guard: active", "  fault: ..."), and of explain."""


def is_wanted(stream: TextIO) -> bool:
    """False without a terminal, on one that knows no colour (TERM=dumb), and with NO_COLOR (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in ("", "dumb"):
        return False
    return stream.isatty()


def painted(text: str, stream: TextIO) -> str:
    """The text as it is to be written to ``stream``."""
    if not is_wanted(stream):
        return text
    return _STATE.sub(lambda found: f"{found[1]}{_COLOURS[found[2]]}{found[2]}{_DEFAULT}", text)
