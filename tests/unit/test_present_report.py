# SPDX-License-Identifier: Apache-2.0
"""The text of a report: its table fits a terminal, and nothing is lost where it is long."""

from __future__ import annotations

import ipaddress
import time

import pytest

from imds_guard.backends.ebpf.report import Report, Row, Who
from imds_guard.commands.report import ReportResult, Suggestion
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Mode, Protocol
from imds_guard.present.report import MAX_ROWS, report_lines, report_values
from imds_guard.present.wrap import WIDTH
from imds_guard.text import columns, escaped, host_port

UID = 61_001


def row(lock: str = "default", address: str = "192.0.2.1", comm: bytes = b"curl") -> Row:
    target = (ipaddress.ip_address(address), 80, Protocol.TCP)
    return Row(lock, Reason.UNSPECIFIED_DESTINATION, Who.USER, UID, 1234, 0, 10**9, *target, comm)


def lines_of(*rows: Row, mode: Mode = Mode.ENFORCE, overflow: int = 0, commands: int = 0) -> list[str]:
    suggestion = Suggestion(tuple((f"command {number}", 1) for number in range(commands)), "")
    return report_lines(ReportResult(Report(1, 1, mode, rows, overflow), suggestion, ()))


@pytest.mark.parametrize(
    "one",
    [
        row(),
        row(lock="a-lock-with-a-long-name-of-its-own"),
        row(address="2001:db8:1111:2222:3333:4444:5555:6666"),
        row("a-lock-with-a-long-name-of-its-own", "2001:db8:1111:2222:3333:4444:5555:6666", b"\x1b" * 15),
    ],
)
def test_the_table_fits_and_has_every_character(one: Row) -> None:
    lines = lines_of(one)
    assert max(map(len, lines)) <= WIDTH
    head, *table = lines[3:]
    starts = [head.index(title) for title in ("WHO", "BY", "FIRST TO", "WHY", "TIMES", "FIRST, LAST")]
    columns = ["".join(line[a:b].strip() for line in table) for a, b in zip(starts, [*starts[1:], WIDTH])]
    assert [column.replace(" ", "") for column in columns[:5]] == [
        str(UID),
        escaped(one.comm.decode()),
        host_port(one.address, 80),
        "unspecified-destination",
        "1,234",
    ]


def test_a_row_is_one_line_where_it_fits() -> None:
    one = row(comm=b"curl")._replace(reason=Reason.NOT_LISTED)
    head, *table = lines_of(one)[3:]
    assert head.split("  ")[0] == "WHO"
    (line,) = table
    assert line.split()[:5] == [str(UID), "curl", "192.0.2.1:80", "not-listed", "1,234"]


@pytest.mark.parametrize("lock", ["default", "a-lock-with-a-name-of-34-characters", "\u9396" * 20])
@pytest.mark.parametrize("comm", ["curl", "\u76ee" * 5, "e\u0301" * 5])
def test_wide_characters_count_as_two_columns(lock: str, comm: str) -> None:
    """The address stays in one piece: people copy it."""
    one = row(lock=lock, address="169.254.169.254", comm=comm.encode())._replace(reason=Reason.NOT_LISTED)
    lines = lines_of(one, one._replace(lock="other", uid=1_000_000_000))
    assert max(map(columns, lines)) <= WIDTH
    assert sum("169.254.169.254:80" in line for line in lines) == 2


def test_the_lock_is_shown_where_there_are_several() -> None:
    one = row(comm=b"x")._replace(reason=Reason.NOT_LISTED)
    assert "LOCK" not in "".join(lines_of(one))
    lines = lines_of(one, one._replace(lock="web"), one._replace(protocol=Protocol.UDP))
    assert [line.split()[-1] for line in lines[3:6]] == ["LOCK", "default", "web"]
    assert "192.0.2.1:80 udp" in lines[6]


def test_times_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of today, and the day of earlier ones, as the clock on the wall shows them."""
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    noon = time.mktime((*time.localtime()[:3], 12, 0, 0, 0, 0, -1))
    monkeypatch.setattr("imds_guard.present.report.wall_clock", lambda ns: noon - (now - ns) / 1e9)
    hour, day = 3600 * 10**9, 24 * 3600 * 10**9
    for first, last, expected in (
        (now, now, "12:00"),
        (now - hour, now, "11:00, 12:00"),
        (now - 2 * day, now, f"{time.strftime('%b %d', time.localtime(noon - 2 * 86400))}, 12:00"),
    ):
        one = row(comm=b"x")._replace(reason=Reason.NOT_LISTED, first_ns=first, last_ns=last)
        assert lines_of(one)[4].endswith(f"  {expected}")


def test_rows_and_commands_beyond_the_maximum_are_counted() -> None:
    lines = lines_of(*[row()] * (MAX_ROWS + 2), commands=MAX_ROWS + 3)
    assert "and 2 more (--json has them all)" in lines
    assert "  # and 3 more" in lines


def test_rows_that_are_not_about_one_user() -> None:
    """Also where they are broken: in the first column, under WHO."""
    for who, uid, expected in (
        (Who.USER_NAMESPACES, UID, f"user namespaces of {UID}"),
        (Who.OTHERS, UID, f"more of {UID}"),
        (Who.OTHERS, 196_608, "more of the IDs 196608 to 262143"),
    ):
        head, *table = lines_of(row(comm=b"x")._replace(who=who, uid=uid, lock=None))[3:]
        column = "".join(line[: head.index("BY")].strip().replace(" ", "") for line in table)
        assert column == expected.replace(" ", "")


def test_a_caller_that_the_hook_has_not_read_is_nobody() -> None:
    """Credentials that could not be read are no user 0."""
    unread = row(comm=b"")._replace(uid=0, reason=Reason.NO_SETTINGS)
    of_root = row()._replace(uid=0, reason=Reason.UNREADABLE)
    of_a_packet = row(comm=b"")._replace(reason=Reason.NO_SETTINGS)
    rows = (unread, of_root, of_a_packet)
    values = report_values(ReportResult(Report(1, 1, Mode.ENFORCE, rows, 0), Suggestion((), ""), ()))["rows"]
    shown = [(one["who"], one["user"], one["uid"], one["last_uid"]) for one in values]
    assert shown == [("unknown", None, None, None), ("user", "root", 0, 0), ("user", str(UID), UID, UID)]
    assert [line.split("  ")[0] for line in lines_of(*rows)[4:]] == ["caller unknown", "root (0)", str(UID)]


def test_rows_of_one_user_hide_no_other() -> None:
    rows = [row(lock=f"lock-{n}") for n in range(MAX_ROWS)]
    assert any(str(UID + 1) in line for line in lines_of(*rows, row()._replace(uid=UID + 1, count=1)))


def test_what_else_it_says() -> None:
    assert "nobody yet" in lines_of()
    assert "1 denial did not fit into the report since the guard was started." in lines_of(row(), overflow=1)
    assert any(line.startswith("note: audit mode denies nobody") for line in lines_of(mode=Mode.AUDIT))
