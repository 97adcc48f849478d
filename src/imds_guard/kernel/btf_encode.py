# SPDX-License-Identifier: Apache-2.0
"""Writes the BTF that the kernel demands: types of a map's records, and of a program's functions.

Format: Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

INT = 1
"""ID of a 32-bit integer, in all that this module writes."""
ARRAY = 2
"""ID of the array in u32_array()."""
FIRST_FUNCTION = 3
"""ID of the first function in functions(); the others follow."""

_PROTOTYPE = 2
_KIND_INT, _KIND_ARRAY, _KIND_FUNC, _KIND_FUNC_PROTO = 1 << 24, 3 << 24, 12 << 24, 13 << 24
_SIGNED = 1 << 24
_HEADER = struct.Struct("=HBBIIIII")
"""struct btf_header: magic, version, flags, hdr_len, then offset and length of the types and of the strings."""
_MAGIC = 0xEB9F


def u32_array(size: int) -> bytes:
    """An array of 32-bit integers that is ``size`` bytes long: type ARRAY."""
    array = struct.pack("=6I", 0, _KIND_ARRAY, 0, INT, INT, size // 4)
    return _blob(struct.pack("=4I", 1, _KIND_INT, 4, 32) + array, b"\0u32\0")


def functions(names: Sequence[str]) -> bytes:
    """Static functions that return an int and whose arguments are left open: types from FIRST_FUNCTION on."""
    strings = b"\0int\0"
    types = struct.pack("=4I", 1, _KIND_INT, 4, _SIGNED | 32) + struct.pack("=3I", 0, _KIND_FUNC_PROTO, INT)
    for name in names:
        types += struct.pack("=3I", len(strings), _KIND_FUNC, _PROTOTYPE)
        strings += name.encode() + b"\0"
    return _blob(types, strings)


def _blob(types: bytes, strings: bytes) -> bytes:
    header = _HEADER.pack(_MAGIC, 1, 0, _HEADER.size, 0, len(types), len(types), len(strings))
    return header + types + strings
