# SPDX-License-Identifier: Apache-2.0
"""The values of an event, and its two kinds of line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from imds_guard.backends.ebpf.record import Record
from imds_guard.policy.decide import Reason
from imds_guard.watch.cgroup_info import CgroupInfo
from imds_guard.watch.event import Values, as_json, as_line, record_values
from imds_guard.watch.process_info import UNKNOWN, ProcessInfo
from tests.unit.test_record import PACKET, RECORD, UID


def values_of(record: Record = RECORD, **changed: Any) -> Values:
    cgroup = CgroupInfo("/system.slice/web.service", "web.service")
    program = ProcessInfo("/usr/bin/curl", "curl http://192.0.2.1")
    return {**record_values(record, "default", str(UID), cgroup, program), **changed}


def test_a_line_for_people() -> None:
    line = as_line(values_of(would_allow="imds-guard allow --user 61001", time="T"))
    assert line == (
        "time=T verdict=denied to=192.0.2.1:80/tcp lock=default reason=not-listed user=61001 uid=61001 pid=1000 "
        'comm=curl exe=/usr/bin/curl cmdline="curl http://192.0.2.1" unit=web.service hook=connect4 '
        'would_allow="imds-guard allow --user 61001"'
    )


def test_a_line_with_a_count() -> None:
    line = as_line(values_of(count=5, processes=2, since="S", time="T"))
    assert line.endswith(" hook=connect4 count=5 processes=2 since=S")


def test_an_event_about_a_packet_has_no_process() -> None:
    values = record_values(PACKET, "default", str(UID), CgroupInfo(), UNKNOWN)
    assert {key for key, value in values.items() if value is None} == {
        *("gid", "groups", "pid", "thread", "comm", "exe", "cmdline", "unit", "container", "cgroup", "cgroup_id"),
        "netns_cookie",
    }
    assert "None" not in as_line(values)


def test_a_caller_that_the_hook_has_not_read_is_nobody() -> None:
    """Without the settings of the policy the hook denies before it reads the credentials: user 0 was not there."""
    record = RECORD._replace(tgid=0, pid=0, fsuid=0, reason=Reason.NO_SETTINGS)
    values = record_values(record, None, "root", CgroupInfo(), UNKNOWN)
    assert (values["user"], values["uid"]) == (None, None)
    assert "root" not in as_line(values)


def test_a_line_about_the_watch_itself() -> None:
    assert as_line({"event": "lost", "time": "T", "count": 7}) == "time=T watch=lost count=7"


@pytest.mark.parametrize("render", [as_line, as_json])
def test_hostile_text_stays_in_its_value(render: Any) -> None:
    hostile = 'a\nverdict=allowed "\x1b[0m\u202e\x7f'
    text = render(values_of(cmdline=hostile, exe=hostile, cgroup=hostile, unit=hostile, comm=hostile))
    assert text.isprintable()
    assert text.count("\n") == 0
    assert " verdict=allowed" not in text
    if render is as_json:
        assert json.loads(text)["cmdline"] == hostile
