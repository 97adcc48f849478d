# SPDX-License-Identifier: Apache-2.0
"""What allow --for has added, and taking back no more than that."""

from __future__ import annotations

from pathlib import Path

import pytest

from imds_guard.commands import temporary
from imds_guard.commands.temporary import Right, added_by, rights, seconds_of, split, without, write
from imds_guard.errors import GuardError, UsageError
from imds_guard.kernel import lockfile
from imds_guard.policy import edit
from imds_guard.policy.difference import difference
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy

A, B = parse_endpoint("10.0.0.1"), parse_endpoint("10.0.0.2:80+443,tcp")
ONE, TWO = Identities(frozenset((1,))), Identities(frozenset((2,)), frozenset((9,)))
POLICY = make_policy([Lock("a", (A, B), ONE)])


@pytest.mark.parametrize(
    ("span", "seconds"), [("90s", 90), ("15m", 900), ("15min", 900), ("1h30m", 5400), ("2d", 172_800)]
)
def test_a_time_is_read(span: str, seconds: int) -> None:
    assert seconds_of(span) == seconds


@pytest.mark.parametrize("span", ["", "15", "0s", "31d", "-5m", "1 h", "m", "1w", "999999d", "1h-1m", "\u0661m"])
def test_what_is_no_time_is_refused(span: str) -> None:
    with pytest.raises(UsageError):
        seconds_of(span)


def granted(before: Policy, who: Identities, endpoint: Endpoint | None = None) -> tuple[Policy, list[Right]]:
    after = edit.allow(before, who, endpoint)
    return after, added_by(difference(before, after), after, "t", temporary.End(5.0, 6.0))


@pytest.mark.parametrize("endpoint", [None, A, parse_endpoint("10.0.0.2:80,tcp")])
def test_taking_back_leaves_everybody_the_rights_of_before(endpoint: Endpoint | None) -> None:
    after, found = granted(POLICY, TWO, endpoint)
    assert difference(POLICY, after)
    assert not difference(POLICY, without(after, found))


def test_what_was_there_before_is_not_taken_back() -> None:
    before = edit.allow(POLICY, TWO, A)
    after, found = granted(before, Identities(ONE.users | TWO.users, TWO.groups), B)
    assert not difference(before, without(after, found))


def test_another_policy_loses_only_these_rights() -> None:
    """The policy may have been changed since: what is not locked any more is left out."""
    _, found = granted(POLICY, TWO)
    other = make_policy([Lock("x", (A, parse_endpoint("10.0.0.3")), Identities(frozenset((2, 3))))])
    left = without(other, found)
    expected = make_policy(
        [
            Lock("x", (parse_endpoint("10.0.0.3"),), Identities(frozenset((2, 3)))),
            Lock("y", (A,), Identities(frozenset((3,)))),
        ]
    )
    assert not difference(expected, left)


def test_rights_are_split_by_who_and_where() -> None:
    right = Right("t", 5.0, (A, B), TWO)
    theirs, others = split([right], Identities(frozenset((2,))), A)
    assert theirs == [right._replace(endpoints=(A,), who=Identities(frozenset((2,))))]
    assert set(others) == {
        right._replace(endpoints=(B,), who=Identities(frozenset((2,)))),
        right._replace(who=Identities(groups=frozenset((9,)))),
    }
    assert split([right], ONE, None) == ([], [right])


def test_the_file_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockfile, "FOLDER", str(tmp_path))
    found = [Right("t", 5.5, (A, B), TWO), Right("u", 6.0, (A,), ONE)]
    write("command", found)
    assert rights("command") == found
    temporary.forget_all("command")
    assert (rights("command"), list(tmp_path.iterdir())) == ([], [])


def stored(until: str = "5", ends: str = "6") -> str:
    return f'[{{"timer":"t","until":{until},"ends":{ends},"endpoints":["10.0.0.1"],"users":[1],"groups":[]}}]'


NO_ENDS = (
    *(stored(ends="NaN"), stored(ends="Infinity"), stored(ends="1e12"), stored(ends='"x"'), stored(ends="null")),
    *(stored(until="NaN"), stored(until="-1"), stored(until="1e300")),
)


def test_a_right_that_ended_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the next test damages."""
    monkeypatch.setattr(lockfile, "FOLDER", str(tmp_path))
    (tmp_path / "command.until").write_text(stored(), encoding="ascii")
    assert [(one.until, one.ends) for one in rights("command")] == [(5.0, 6.0)]


@pytest.mark.parametrize("text", ["", "[", "[{}]", "[1]", "1", '{"a": 1}', "[[]]", "\x00", "[" * 100_000, *NO_ENDS])
def test_a_damaged_file_is_not_an_empty_one(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were, what it said would be allowed for good, and nobody would be told."""
    monkeypatch.setattr(lockfile, "FOLDER", str(tmp_path))
    (tmp_path / "command.until").write_text(text, encoding="ascii")
    with pytest.raises(GuardError, match=r"command\.until can't be read: nothing tells what allow --for has allowed"):
        rights("command")


def test_the_end_does_not_move_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before = temporary.end_after(60)
    monkeypatch.setattr("time.time", lambda: 0.0)
    after = temporary.end_after(60)
    assert after.until == 60
    assert 0 <= after.ends - before.ends < 30
