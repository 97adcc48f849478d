# SPDX-License-Identifier: Apache-2.0
"""Reads BTF: the offsets of the members of the kernel's structs, from /sys/kernel/btf/vmlinux.

Format: Documentation/bpf/btf.rst and include/uapi/linux/btf.h.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from imds_guard.errors import Unsupported, system_text

PATH = "/sys/kernel/btf/vmlinux"

MAGIC = 0xEB9F


class Kind(enum.IntEnum):
    """BTF_KIND_*: those of which more follows than struct btf_type, and functions."""

    INT = 1
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    DECL_TAG = 17
    ENUM64 = 19


# Bytes after struct btf_type, by kind: a fixed number, and a number for each of its vlen elements.
_EXTRA: dict[int, tuple[int, int]] = {
    Kind.INT: (4, 0),
    Kind.ARRAY: (12, 0),
    Kind.STRUCT: (0, 12),
    Kind.UNION: (0, 12),
    Kind.ENUM: (0, 8),
    Kind.FUNC_PROTO: (0, 8),
    Kind.VAR: (4, 0),
    Kind.DATASEC: (0, 12),
    Kind.DECL_TAG: (4, 0),
    Kind.ENUM64: (0, 12),
}
_KNOWN_KINDS = 20
"""Kinds from this number on are unknown."""
_MAX_LEVELS = 8
"""Levels of anonymous structs inside each other. Linux 6.18 has six."""


@contextmanager
def _consistent() -> Iterator[None]:
    """Turns the errors of a blob that ends too early, or refers to something that is not in it, into Unsupported."""
    try:
        yield
    except (struct.error, TypeError, ValueError, IndexError) as error:
        raise Unsupported(
            f"reading {PATH}: it contradicts itself ({error}), so the offsets of the kernel are not known; "
            "the iptables backend can serve instead"
        ) from error


class Member(NamedTuple):
    """A member of a struct. The name of an anonymous one is ""."""

    name: str
    type_id: int
    offset_bits: int


class Btf:
    """The structs of one BTF blob."""

    def __init__(self, blob: bytes) -> None:
        """Raises Unsupported when the blob is not BTF, or has a kind of type that this reader does not know."""
        if len(blob) < 24 or struct.unpack_from("=H", blob)[0] != MAGIC:
            raise Unsupported(f"reading {PATH}: it does not begin like BTF, so the offsets of the kernel are not known")
        header, type_at, type_len, string_at, string_len = struct.unpack_from("=5I", blob, 4)
        self._types = blob[header + type_at : header + type_at + type_len]
        self._strings = blob[header + string_at : header + string_at + string_len]
        with _consistent():
            self._words = memoryview(self._types).cast("I")
            self._positions = self._walk()

    def _walk(self) -> list[int]:
        """The index of each type in self._words, by ID. Type 0 is void. A kernel has more than 100,000 types."""
        positions, at, words, end = [0], 0, self._words, len(self._words)
        fixed = [3 + _EXTRA.get(kind, (0, 0))[0] // 4 for kind in range(_KNOWN_KINDS)]
        each = [_EXTRA.get(kind, (0, 0))[1] // 4 for kind in range(_KNOWN_KINDS)]
        while at < end:
            positions.append(at)
            word = words[at + 1]
            kind = word >> 24 & 0x1F
            if kind >= _KNOWN_KINDS:
                raise Unsupported(f"reading {PATH}: BTF kind {kind} is unknown to this version, a newer one is needed")
            at += fixed[kind] + each[kind] * (word & 0xFFFF)
        return positions

    def _text(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def _find(self, names: Iterable[str]) -> dict[str, int]:
        """Name -> ID, for the names that are structs."""
        wanted = {offset: name for name in names for offset in self._offsets_of(name)}
        found: dict[str, int] = {}
        words = self._words
        for identity, at in enumerate(self._positions[1:], 1):
            if words[at] in wanted and words[at + 1] >> 24 & 0x1F == Kind.STRUCT:
                found.setdefault(wanted[words[at]], identity)
        return found

    def _offsets_of(self, name: str) -> list[int]:
        needle, offsets, at = b"\0" + name.encode() + b"\0", [], 0
        while (at := self._strings.find(needle, at)) >= 0:
            at += 1
            offsets.append(at)
        return offsets

    def _members(self, identity: int) -> list[Member]:
        at = self._positions[identity] * 4
        word = self._words[self._positions[identity] + 1]
        if word >> 24 & 0x1F not in (Kind.STRUCT, Kind.UNION):
            return []
        has_bitfields = word >> 31
        members = []
        for i in range(word & 0xFFFF):
            name_at, type_id, offset = struct.unpack_from("=III", self._types, at + 12 + 12 * i)
            members.append(Member(self._text(name_at), type_id, offset & 0xFFFFFF if has_bitfields else offset))
        return members

    def _offset_bits(self, identity: int, name: str, levels: int = _MAX_LEVELS) -> int | None:
        """Members of an anonymous struct or union count as members of the struct around it, as in C."""
        for member in self._members(identity) if levels else ():
            if member.name == name:
                return member.offset_bits
            inner = self._offset_bits(member.type_id, name, levels - 1) if not member.name else None
            if inner is not None:
                return member.offset_bits + inner
        return None

    def offsets(self, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """The offset in bytes of each (struct, member). Raises Unsupported when a struct has no such member."""
        pairs = list(wanted)
        with _consistent():
            structs = self._find({name for name, _ in pairs})
        result = {}
        for name, member in pairs:
            with _consistent():
                bits = self._offset_bits(structs[name], member) if name in structs else None
            if bits is None or bits % 8:
                raise Unsupported(
                    f"looking up {member} of struct {name} in {PATH}: this kernel has no such member, "
                    "so the caller's credentials can't be read here; the iptables backend can serve instead"
                )
            result[name, member] = bits // 8
        return result

    def struct_size(self, name: str) -> int | None:
        """A struct's size in bytes; None when there is no such struct."""
        with _consistent():
            identity = self._find([name]).get(name)
            if identity is None:
                return None
            return self._words[self._positions[identity] + 2]

    def members(self, name: str) -> dict[str, int]:
        """Named member -> offset in bytes; empty when there is no such struct."""
        with _consistent():
            identity = self._find([name]).get(name)
            return {} if identity is None else {m.name: m.offset_bits // 8 for m in self._members(identity) if m.name}


def read_kernel_btf() -> Btf:
    """The running kernel's BTF. Raises Unsupported when it has none."""
    return Btf(_kernel_blob())


def kernel_btf_digest() -> str:
    """The SHA-256 of the running kernel's BTF, which tells whether offsets are still those. Raises Unsupported."""
    return hashlib.sha256(_kernel_blob()).hexdigest()


def _kernel_blob() -> bytes:
    try:
        with open(PATH, "rb") as file:
            return file.read()
    except OSError as error:
        raise Unsupported(
            f"opening {PATH} for the offsets of the kernel's structs: {system_text(error)}; this kernel was built or "
            "booted without BTF (CONFIG_DEBUG_INFO_BTF), the iptables backend can serve instead"
        ) from error
