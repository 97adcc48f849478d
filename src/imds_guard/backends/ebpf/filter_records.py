# SPDX-License-Identifier: Apache-2.0
"""The records about filters of one generation, and the way back from them. Pure.

Users and groups of a filter are members of the lists of its locks (render.py).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.image import Image, Items
from imds_guard.errors import GuardError, Unsupported
from imds_guard.policy.filter_numbers import Numbered, Numbers, listeners_of
from imds_guard.policy.filter_text import parse_rules, rules_text
from imds_guard.policy.filters import Filter, Target
from imds_guard.policy.model import NOBODY, Policy, unmapped

FILTER_MAPS = (Map.FILTERS, Map.TARGETS, Map.FILTER_TEXTS)
_MAX_PIECES = abi.FILTER_PIECES // len(abi.GENERATIONS)


def filter_bit(index: int) -> int:
    """IG_FILTER_BIT()."""
    return 1 << abi.FIRST_FILTER_BIT + index


def filter_items(policy: Policy, generation: int, numbers: Numbers) -> dict[Map, Items]:
    """The records of Map.FILTERS, Map.TARGETS and Map.FILTER_TEXTS. Raises Unsupported when rules are too long."""
    index = {one.name: number for number, one in enumerate(policy.filters)}
    pieces = [
        (abi.FILTER_TEXT_KEY.pack(generation, number, at), piece)
        for number, one in enumerate(policy.filters)
        for at, piece in enumerate(_pieces(_text(one)))
    ]
    if len(pieces) > _MAX_PIECES:
        most = _MAX_PIECES * abi.FILTER_PIECE_BYTES >> 20
        raise Unsupported(f"loading the policy into eBPF maps: the rules of its filters are more than {most} MiB")
    return {
        Map.FILTERS: tuple(
            (
                abi.FILTER_KEY.pack(generation, one.target_number, filter_bit(index[one.filter])),
                abi.FILTER.pack(one.digest, one.number),
            )
            for one in listeners_of(policy, numbers)
        ),
        Map.TARGETS: tuple(
            (abi.SMALL_KEY.pack(generation, number), abi.TARGET.pack(abi.address_bytes(target.address), target.port))
            for target, number in numbers.targets.items()
        ),
        Map.FILTER_TEXTS: tuple(pieces),
    }


# --- text -----------------------------------------------------------------------------------------------------------

_LINES = ("name", "port", "everyone", "lock")


def _text(one: Filter) -> str:
    """What lists don't have of a filter. A name has no line end (model.py): it is printable."""
    head = [
        f"name {one.name}",
        f"port {one.port}",
        f"everyone {one.everyone:d}",
        *(f"lock {name}" for name in one.locks),
    ]
    return "\n".join((*head, "", rules_text(one.rules)))


def _parsed(text: str) -> Filter:
    head, _, rules = text.partition("\n\n")
    lines = [line.partition(" ") for line in head.splitlines()]
    if not {key for key, _, _ in lines} <= set(_LINES):
        raise GuardError("reading the policy back from the eBPF maps: a filter has a line that is unknown")
    values = {key: value for key, _, value in lines}
    locks = tuple(value for key, _, value in lines if key == "lock")
    everyone, port = bool(int(values["everyone"])), int(values["port"])
    return Filter(values["name"], locks, NOBODY, everyone, parse_rules(rules), port)


def _pieces(text: str) -> Iterable[bytes]:
    """The text in pieces, padded with NUL."""
    raw, size = text.encode(), abi.FILTER_PIECE_BYTES
    for at in range(0, len(raw), size):
        yield raw[at : at + size].ljust(size, b"\0")


# --- the way back ---------------------------------------------------------------------------------------------------


def parse_filters(image: Image) -> tuple[Filter, ...]:
    """The filters of a generation in order, without their users and groups. Raises GuardError."""
    pieces: dict[int, dict[int, bytes]] = {}
    for key, value in image.items[Map.FILTER_TEXTS]:
        _, index, piece = abi.FILTER_TEXT_KEY.unpack(key)
        pieces.setdefault(index, {})[piece] = value
    if sorted(pieces) != list(range(len(pieces))):
        raise GuardError("reading the policy back from the eBPF maps: a filter is missing")
    texts = (b"".join(pieces[index][piece] for piece in sorted(pieces[index])) for index in range(len(pieces)))
    try:
        return tuple(_parsed(text.rstrip(b"\0").decode()) for text in texts)
    except (KeyError, ValueError) as error:
        raise GuardError(f"reading the policy back from the eBPF maps: a filter is incomplete ({error})") from error


def parse_numbers(image: Image, filters: tuple[Filter, ...]) -> Numbers:
    """The numbers of a generation."""
    found: Mapping[Target, int] = {
        _target(value): abi.SMALL_KEY.unpack(key)[1] for key, value in image.items[Map.TARGETS]
    }
    names: dict[str, int] = {}
    for key, value in image.items[Map.FILTERS]:
        index = abi.FILTER_KEY.unpack(key)[2].bit_length() - 1 - abi.FIRST_FILTER_BIT
        if 0 <= index < len(filters):
            names[filters[index].name] = abi.FILTER.unpack(value)[1]
    return Numbers(found, names)


def parse_numbered(image: Image) -> Numbered:
    """The filters and the numbers of a generation. Raises GuardError."""
    filters = parse_filters(image)
    return Numbered(filters, parse_numbers(image, filters))


def _target(value: bytes) -> Target:
    packed, port = abi.TARGET.unpack(value)
    return Target(unmapped(ipaddress.IPv6Address(packed)), port)
