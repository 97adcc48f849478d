# SPDX-License-Identifier: Apache-2.0
"""The readers of data that others wrote, each as a function of bytes that raises on failure.

A failure is any exception but the one that the reader documents, or a result that is not the same when it is written
and read again. atheris (fuzz_readers.py) and the tests call the same functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Callable

from imds_guard.backends.ebpf import abi, program
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.image import Image, parse_settings
from imds_guard.backends.ebpf.parse import parse
from imds_guard.backends.ebpf.reader import Snapshot
from imds_guard.backends.ebpf.record import decode
from imds_guard.backends.ebpf.render import render
from imds_guard.backends.ebpf.state import policy_of
from imds_guard.backends.iptables.form import FILTER
from imds_guard.backends.iptables.parse import combine, parse_chains, parse_family
from imds_guard.backends.iptables.render import ResolvedPolicy
from imds_guard.backends.iptables.render import render as render_rules
from imds_guard.backends.iptables.tables import owned, parse_save
from imds_guard.config.read import parse_config
from imds_guard.config.toml_lines import KeyLines, load_toml
from imds_guard.config.write import dump_config
from imds_guard.errors import BadPolicy, GuardError, Unsupported
from imds_guard.filter.request_head import find_end, parse_head
from imds_guard.kernel.btf import Btf
from imds_guard.policy.endpoint_syntax import format_endpoint, parse_endpoint
from imds_guard.policy.filters import FilterRules
from imds_guard.policy.model import make_policy
from imds_guard.policy.request_target import BadRequest
from imds_guard.policy.requests import Judge

__all__ = ["TARGETS", "bytes_of", "image_of", "parse", "parse_settings"]

Target = Callable[[bytes], None]


def config(data: bytes) -> None:
    """A configuration is refused, or is the same when it is written and read again."""
    text = data.decode(errors="ignore")
    try:
        read = parse_config(text, "file", dmi_text="")
    except (BadPolicy, Unsupported):
        return
    again = parse_config(dump_config(read), "again")
    assert again == read, (read, again)


def endpoint(data: bytes) -> None:
    """An endpoint is refused, or its text means the same."""
    text = data.decode(errors="ignore")
    try:
        read = parse_endpoint(text)
    except BadPolicy:
        return
    parts = [parse_endpoint(text) for text in format_endpoint(read)]
    assert {part.network for part in parts} == {read.network}, parts
    assert {r for part in parts for r in part.tcp} == set(read.tcp), parts
    assert {r for part in parts for r in part.udp} == set(read.udp), parts


def lines(data: bytes) -> None:
    """Every key of a TOML file is on a line of the file, or on an unknown line."""
    text = data.decode(errors="ignore")
    try:
        raw = load_toml(text, "file")
    except GuardError:
        return
    key_lines = KeyLines(text)
    for path in _paths(raw):
        for searched in ("", path[-1]):
            line = key_lines.find(path, searched)
            assert line is None or 1 <= line <= len(text.splitlines()), (path, line)


def _paths(table: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


_KEYS_AND_VALUES = {
    Map.LOCKS: (abi.SMALL_KEY.size, abi.LOCK.size),
    Map.ENDPOINTS: (abi.ENDPOINT_KEY.size, abi.ENDPOINT_BYTES),
    Map.MEMBERS: (abi.MEMBER.size, abi.MEMBER_VALUE.size),
    Map.GROUPS: (abi.SMALL_KEY.size, abi.GROUPS.size),
    Map.LISTS: (4, abi.LIST.size),
    Map.FILTERS: (abi.FILTER_KEY.size, abi.FILTER.size),
    Map.TARGETS: (abi.SMALL_KEY.size, abi.TARGET.size),
    Map.FILTER_TEXTS: (abi.FILTER_TEXT_KEY.size, abi.FILTER_PIECE_BYTES),
}


def image_of(data: bytes) -> tuple[Image, bytes]:
    """The data as records: settings first, then for each record the number of its map, its length and its first bytes.

    The rest of a record is zeros, as in most real records.
    """
    settings, rest = data[: abi.SETTINGS.size].ljust(abi.SETTINGS.size, b"\0"), data[abi.SETTINGS.size :]
    items: dict[Map, list[tuple[bytes, bytes]]] = {number: [] for number in _KEYS_AND_VALUES}
    order = list(_KEYS_AND_VALUES)
    while rest:
        number, length = order[rest[0] % len(order)], rest[1] if len(rest) > 1 else 0
        record, rest = rest[2 : 2 + length], rest[2 + length :]
        key, value = _KEYS_AND_VALUES[number]
        whole = record[: key + value].ljust(key + value, b"\0")
        items[number].append((whole[:key], whole[key:]))
    records = {number: tuple(found) for number, found in items.items()}
    return Image(1, {**records, Map.ADDRESS_BITMAP: ((bytes(4), b""),)}), settings


def bytes_of(image: Image, settings: bytes) -> bytes:
    """The data that image_of() turns into this image."""
    found = [settings]
    for at, number in enumerate(_KEYS_AND_VALUES):
        for key, value in image.items.get(number, ()):
            record = (key + value).rstrip(b"\0")[:255]
            found.append(bytes([at, len(record)]) + record)
    return b"".join(found)


def maps(data: bytes) -> None:
    """Records of the maps are a policy, or a fault is reported. A policy without faults renders to the same records."""
    image, record = image_of(data)
    parsed = parse_settings(record)
    settings, digest = parsed if parsed else (None, None)
    policy, faults = policy_of(Snapshot(image, settings, digest))
    assert policy is not None or faults
    if policy is not None and not faults:
        assert render(policy, 1).digest() == image.digest()


def rules(data: bytes) -> None:
    """The output of iptables-save is a policy, or is refused. A policy is valid and in normal form."""
    text = data.decode(errors="surrogateescape")
    found = []
    for version in (4, 6):
        chains, _ = parse_chains(owned(parse_save(text), FILTER))
        found.append(parse_family(chains, version))
    try:
        held = combine(found)
    except BadPolicy:
        return
    if held is not None:
        assert make_policy(held.policy.locks, held.policy.mode, held.policy.containers) == held.policy
        # Some policies can't be rendered: a lock's name may be too long for a comment. Then a GuardError says so.
        with contextlib.suppress(GuardError):
            render_rules(ResolvedPolicy(held.policy, held.members), 4)


def btf(data: bytes) -> None:
    """BTF is refused, or has offsets and sizes."""
    try:
        blob = Btf(data)
        blob.struct_size("cred")
        blob.members("cred")
        blob.offsets(program.OFFSETS)
    except Unsupported:
        return


def event(data: bytes) -> None:
    """Any record of the ring buffer is decoded. Only our programs write them."""
    raw = data[: abi.EVENT.size].ljust(abi.EVENT.size, b"\0")
    # A reason that this version does not know comes from the programs of another version.
    with contextlib.suppress(GuardError):
        decode(raw)


def request(data: bytes) -> None:
    """A request is refused, or has one meaning: what is made of it reads as the same request."""
    try:
        end = find_end(data)
        if not end:
            return
        head = parse_head(data[:end], HOSTS)
    except BadRequest:
        return
    one = head.request
    lines = [f"{one.method} {one.target} HTTP/1.1", "Host: metadata"]
    lines += [f"{name}: {value}" for name, value in head.headers_to_send()]
    again = parse_head("\r\n".join((*lines, "", "")).encode("ascii"), HOSTS)
    assert again.request.method == one.method
    assert again.request.target == one.target
    assert list(again.headers_to_send()) == list(head.headers_to_send())
    for judge in _JUDGES:
        assert judge.judge(one).status in (0, 400, 403)


HOSTS = ("metadata", "169.254.169.254")
_JUDGES = (
    Judge(FilterRules(sets=("no-credentials",), headers="ec2-metadata-filter")),
    Judge(FilterRules(("GET /**",), ("/*/a/**",), require_imdsv2=True)),
)
_READERS = (config, endpoint, lines, maps, rules, btf, event, request)
TARGETS: dict[str, Target] = {one.__name__: one for one in _READERS}
