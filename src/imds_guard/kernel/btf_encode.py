# SPDX-License-Identifier: Apache-2.0
"""Writes the BTF that the kernel demands: types of a map's records, and of a program's functions.

Format: Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from imds_guard.kernel.btf import MAGIC, Kind

INT = 1
"""ID of a 32-bit integer, in all that this module writes."""
ARRAY = 2
"""ID of the array in u32_array()."""
FIRST_FUNCTION = 3
"""ID of the first function in functions(); the others follow."""

_PROTOTYPE = 2
_SIGNED = 1 << 24
_HEADER = struct.Struct("=HBBIIIII")
"""struct btf_header: magic, version, flags, hdr_len, then offset and length of the types and of the strings."""


def u32_array(size: int) -> bytes:
    """An array of 32-bit integers that is ``size`` bytes long: type ARRAY."""
    array = _type(0, Kind.ARRAY, 0, INT, INT, size // 4)
    return _blob(_type(1, Kind.INT, 4, 32) + array, b"\0u32\0")


def functions(names: Sequence[str]) -> bytes:
    """Static functions that return an int and whose arguments are left open: types from FIRST_FUNCTION on."""
    strings = b"\0int\0"
    types = _type(1, Kind.INT, 4, _SIGNED | 32) + _type(0, Kind.FUNC_PROTO, INT)
    for name in names:
        types += _type(len(strings), Kind.FUNC, _PROTOTYPE)
        strings += name.encode() + b"\0"
    return _blob(types, strings)


def _type(name_offset: int, kind: Kind, size_or_type: int, *more: int) -> bytes:
    """struct btf_type, and what follows it for its kind."""
    return struct.pack(f"={3 + len(more)}I", name_offset, kind << 24, size_or_type, *more)


def _blob(types: bytes, strings: bytes) -> bytes:
    header = _HEADER.pack(MAGIC, 1, 0, _HEADER.size, 0, len(types), len(types), len(strings))
    return header + types + strings
