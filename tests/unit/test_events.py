# SPDX-License-Identifier: Apache-2.0
"""What is told of a record, and what would have helped."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest

from imds_guard.backends.ebpf import abi, watch
from imds_guard.backends.ebpf.watch import Record
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Protocol
from imds_guard.watch import event as events
from imds_guard.watch.event import as_json, as_line, denial, would_allow
from imds_guard.watch.process_info import Home, Names, Program

UID, GID = 61_001, 62_001

RAW = abi.EVENT.pack(
    *(123, 456, 789, 1001, 1000, UID, GID, 3, 80, 2),
    *(abi.address_bytes(ipaddress.ip_address("192.0.2.1")), b"curl".ljust(16, b"\0")),
    *(1, abi.HOOK_CONNECT4, Reason.NOT_LISTED, abi.VERDICT_DENIED, abi.TCP),
)
RECORD = watch.decode(RAW)
PACKET = RECORD._replace(pid=0, tgid=0, cgroup_id=0, netns_cookie=0, fsgid=0, groups=0, comm=b"", hook="egress")


def told(record: Record = RECORD, **changed: Any) -> events.Values:
    home, program = Home("/system.slice/web.service", "web.service"), Program("/usr/bin/curl", "curl http://192.0.2.1")
    return {**denial(record, "default", Names(), home, program), **changed}


def test_a_record_is_decoded_field_by_field() -> None:
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


def test_every_reason_hook_and_verdict_of_the_kernel_has_a_word() -> None:
    hooks = {watch._HOOKS[number] for number in range(abi.HOOK_CONNECT4, abi.HOOK_EGRESS + 1)}
    assert hooks == set(abi.HOOKS)
    assert set(watch._VERDICTS.values()) == set(events.COUNTED)
    assert len(Reason) == abi.REASONS


@pytest.mark.parametrize(
    ("field", "value", "alike"),
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
def test_records_are_alike_when_time_and_process_alone_differ(field: str, value: Any, alike: bool) -> None:
    fields = [
        "time_ns",
        "cgroup_id",
        "netns_cookie",
        "pid",
        "tgid",
        "fsuid",
        "fsgid",
        "groups_len",
        "port",
        "lock",
        "address",
        "comm",
        "generation",
        "hook",
        "reason",
        "verdict",
        "protocol",
    ]
    values = dict(zip(fields, abi.EVENT.unpack(RAW)))
    other = abi.EVENT.pack(*{**values, field: value}.values())
    assert other != RAW
    assert (watch.same_caller(other) == watch.same_caller(RAW)) is alike
    assert (watch.process_of(other) == watch.process_of(RAW)) is (field != "tgid")


def test_records_of_what_is_let_through_are_told_apart() -> None:
    fields = list(abi.EVENT.unpack(RAW))
    fields[-2] = abi.VERDICT_ALLOWED
    assert [watch.is_allowed(RAW), watch.is_allowed(abi.EVENT.pack(*fields))] == [False, True]


def test_a_line_for_people() -> None:
    line = as_line(told(would_allow="imds-guard allow --user 61001", time="T"))
    assert line == (
        "time=T verdict=denied to=192.0.2.1:80/tcp lock=default reason=not-listed user=61001 uid=61001 pid=1000 "
        'comm=curl exe=/usr/bin/curl cmdline="curl http://192.0.2.1" unit=web.service hook=connect4 '
        'would_allow="imds-guard allow --user 61001"'
    )


def test_a_line_with_a_count() -> None:
    line = as_line(told(count=5, processes=2, since="S", time="T"))
    assert line.endswith(" hook=connect4 count=5 processes=2 since=S")


def test_of_a_packet_nothing_is_said_about_a_process() -> None:
    values = denial(PACKET, "default", Names(), Home(), Program())
    assert {key for key, value in values.items() if value is None} == {
        *("gid", "groups", "pid", "thread", "comm", "exe", "cmdline", "unit", "container", "cgroup", "cgroup_id"),
        "netns_cookie",
    }
    assert "None" not in as_line(values)


def test_other_lines() -> None:
    assert as_line({"event": "lost", "time": "T", "count": 7}) == "time=T watch=lost count=7"


@pytest.mark.parametrize("as_text", [as_line, as_json])
def test_hostile_text_stays_in_its_value(as_text: Any) -> None:
    hostile = 'a\nverdict=allowed "\x1b[0m\u202e\x7f'
    text = as_text(told(cmdline=hostile, exe=hostile, cgroup=hostile, unit=hostile, comm=hostile))
    assert text.isprintable()
    assert text.count("\n") == 0
    assert " verdict=allowed" not in text
    if as_text is as_json:
        assert json.loads(text)["cmdline"] == hostile


@pytest.mark.parametrize(
    ("reason", "uid", "groups", "words"),
    [
        (
            Reason.NOT_LISTED,
            0,
            frozenset((0,)),
            "add root to group root, or imds-guard allow --user root",
        ),
        (Reason.NOT_LISTED, 0, frozenset(), "imds-guard allow --user root"),
        (Reason.NOT_LISTED, UID, frozenset((0,)), "imds-guard allow --user 61001"),
        (
            Reason.NOT_LISTED,
            0,
            frozenset(range(70_000, 70_005)),
            "add root to group 70000 or 70001 or 70002 (or 2 more), or imds-guard allow --user root",
        ),
        (Reason.DENIED_USER, UID, frozenset(), "take user 61001 off the deny list"),
        (Reason.KERNEL_THREAD, UID, frozenset(), None),
    ],
)
def test_what_would_have_let_it_through(reason: Reason, uid: int, groups: frozenset[int], words: str | None) -> None:
    assert would_allow(reason, uid, groups, Names()) == words


def test_every_reason_to_deny_but_one_has_something_that_would_have_helped() -> None:
    helpless = {
        reason for reason in Reason if not reason.permits and would_allow(reason, UID, frozenset(), Names()) is None
    }
    assert helpless == {Reason.KERNEL_THREAD}
