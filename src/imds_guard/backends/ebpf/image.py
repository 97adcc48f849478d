# SPDX-License-Identifier: Apache-2.0
"""The records of one generation as values: what render() makes of a policy and parse() makes a policy of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.policy.model import Identities, Mode, Policy, Verdict

try:  # start-up time: hashlib has the same function, and loads OpenSSL for its others
    from _blake2 import blake2s
except ImportError:  # a Python that has all of its hashes from OpenSSL
    from hashlib import blake2s

Items = tuple[tuple[bytes, bytes], ...]

ListKey = tuple[Identities, Identities, Verdict, tuple[int, ...]]
"""The allow list, the deny list, the default and the filters of a lock, these by their place in the policy. Locks with
the same lists share one."""


class Image(NamedTuple):
    """Every record of one generation but its settings: (key, value) pairs, as they are in the maps."""

    generation: int
    items: Mapping[Map, Items]

    def digest(self) -> bytes:
        """16 bytes that change with any record. The order in which the kernel returns records does not matter."""
        state = blake2s(digest_size=16)
        for number in sorted(self.items):
            state.update(bytes([number]))
            state.update(b"".join(key + value for key, value in sorted(self.items[number])))
        return state.digest()


class Settings(NamedTuple):
    """struct ig_settings without its digest and its serial number."""

    mode: Mode
    containers: Verdict
    strict: bool = False

    def pack(self, digest: bytes, serial: int) -> bytes:
        """The record as it is in the map."""
        mode = abi.MODE_AUDIT if self.mode is Mode.AUDIT else abi.MODE_ENFORCE
        containers = self.containers is Verdict.ALLOW
        return abi.SETTINGS.pack(1, mode, containers, abi.ABI, digest, self.strict, serial)


def settings_of(policy: Policy) -> Settings:
    """The part of a policy that is in the settings of its generation."""
    return Settings(policy.mode, policy.containers, policy.strict)


def parse_settings(record: bytes) -> tuple[Settings, bytes] | None:
    """Settings and digest, or None for a record that is not valid."""
    valid, mode, containers, version, digest, strict, _ = abi.SETTINGS.unpack(record)
    if not valid or version != abi.ABI or mode not in (abi.MODE_ENFORCE, abi.MODE_AUDIT):
        return None
    chosen = Mode.AUDIT if mode == abi.MODE_AUDIT else Mode.ENFORCE
    return Settings(chosen, Verdict.ALLOW if containers else Verdict.DENY, bool(strict)), digest


class Stamp(NamedTuple):
    """Who wrote a settings record: the ABI of that version (0: no valid record), and the number of that change."""

    abi: int
    serial: int


def stamp_of(record: bytes) -> Stamp:
    """The stamp of a record of any layout: ``valid``, ``abi`` and ``serial`` are at the same place in each of them."""
    valid, _, _, version, _, _, serial = abi.SETTINGS.unpack(
        record[: abi.SETTINGS.size].ljust(abi.SETTINGS.size, b"\0")
    )
    return Stamp(version if valid else 0, serial)
