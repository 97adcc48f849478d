# SPDX-License-Identifier: Apache-2.0
"""Records of the ring buffer: decoding, and which of them are similar."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from imds_guard.backends.ebpf import abi, record
from imds_guard.backends.ebpf.record import Record
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Protocol
from imds_guard.watch.event import VERDICTS

UID, GID = 61_001, 62_001

RAW = abi.EVENT.pack(
    *(123, 456, 789, 1001, 1000, UID, GID, 3, 80, 2),
    *(abi.address_bytes(ipaddress.ip_address("192.0.2.1")), b"curl".ljust(16, b"\0")),
    *(1, abi.HOOK_CONNECT4, Reason.NOT_LISTED, abi.VERDICT_DENIED, abi.TCP),
)
RECORD = record.decode(RAW)
PACKET = RECORD._replace(pid=0, tgid=0, cgroup_id=0, netns_cookie=0, fsgid=0, groups=0, comm=b"", hook="egress")

FIELDS = (
    *("time_ns", "cgroup_id", "netns_cookie", "pid", "tgid", "fsuid", "fsgid", "groups_len", "port", "lock"),
    *("address", "comm", "generation", "hook", "reason", "verdict", "protocol"),
)


def test_every_field_is_decoded() -> None:
    assert (
        Record(
            time_ns=123,
            cgroup_id=456,
            netns_cookie=789,
            pid=1001,
            tgid=1000,
            fsuid=UID,
            fsgid=GID,
            groups=3,
            address=ipaddress.ip_address("192.0.2.1"),
            port=80,
            protocol=Protocol.TCP,
            lock=2,
            generation=1,
            comm=b"curl",
            hook="connect4",
            reason=Reason.NOT_LISTED,
            verdict="denied",
        )
        == RECORD
    )


def test_every_reason_hook_and_verdict_of_the_kernel_has_a_name() -> None:
    hooks = {record.HOOK_NAMES[number] for number in range(abi.HOOK_CONNECT4, abi.HOOK_EGRESS + 1)}
    assert hooks == set(abi.HOOKS) - set(abi.GETPEERNAME)  # these write no records
    assert set(record.VERDICT_NAMES.values()) == set(VERDICTS)
    assert len(Reason) == abi.REASONS


@pytest.mark.parametrize(
    ("field", "value", "similar"),
    [
        ("time_ns", 124, True),
        ("pid", 5, True),
        ("tgid", 5, True),
        ("groups_len", 4, True),
        ("cgroup_id", 5, False),
        ("netns_cookie", 5, False),
        ("fsuid", 5, False),
        ("fsgid", 5, False),
        ("port", 81, False),
        ("lock", 3, False),
        ("address", bytes(16), False),
        ("comm", b"wget".ljust(16, b"\0"), False),
        ("generation", 2, False),
        ("hook", 2, False),
        ("reason", 7, False),
        ("verdict", 2, False),
        ("protocol", 2, False),
    ],
)
def test_records_are_similar_if_they_differ_only_in_time_process_and_number_of_groups(
    field: str, value: Any, similar: bool
) -> None:
    values = dict(zip(FIELDS, abi.EVENT.unpack(RAW)))
    other = abi.EVENT.pack(*{**values, field: value}.values())
    assert other != RAW
    assert (record.similarity_key(other) == record.similarity_key(RAW)) is similar
    assert (record.process_key(other) == record.process_key(RAW)) is (field != "tgid")


def test_records_of_allowed_connects_are_recognised() -> None:
    fields = list(abi.EVENT.unpack(RAW))
    fields[FIELDS.index("verdict")] = abi.VERDICT_ALLOWED
    assert [record.is_allowed(RAW), record.is_allowed(abi.EVENT.pack(*fields))] == [False, True]
