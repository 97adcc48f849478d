# SPDX-License-Identifier: Apache-2.0
"""BTF that the kernel wants to be told of what we make: of a map's records, of a program's functions.

Format: Documentation/bpf/btf.rst. Type 1 is always a 32-bit integer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_INT, _ARRAY, _FUNC, _FUNC_PROTO = 1 << 24, 3 << 24, 12 << 24, 13 << 24
_SIGNED = 1 << 24
FIRST_FUNCTION = 3


def words(octets: int) -> bytes:
    """Type 2: an array of words, ``octets`` long."""
    return _blob(struct.pack("=4I", 1, _INT, 4, 32), struct.pack("=6I", 0, _ARRAY, 0, 1, 1, octets // 4), b"\0word\0")


def functions(names: Sequence[str]) -> bytes:
    """Types from FIRST_FUNCTION on: static functions that return an int and tell nothing of their arguments."""
    strings, types = b"\0int\0", struct.pack("=3I", 0, _FUNC_PROTO, 1)
    for name in names:
        types += struct.pack("=3I", len(strings), _FUNC, 2)
        strings += name.encode() + b"\0"
    return _blob(struct.pack("=4I", 1, _INT, 4, _SIGNED | 32), types, strings)


def _blob(integer: bytes, others: bytes, strings: bytes) -> bytes:
    types = integer + others
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings
