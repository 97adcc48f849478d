# SPDX-License-Identifier: Apache-2.0
"""Tables of nft in a network namespace: replaced in one step, read back, removed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Callable, TypeVar

import pytest

from imds_guard.errors import GuardError, NotPermitted
from imds_guard.kernel import nft
from imds_guard.kernel.credentials import become
from imds_guard.kernel.run import run
from imds_guard.kernel.sandbox import Sandbox
from tests.tools import need

T = TypeVar("T")

ONE, TWO = nft.Table("ip", "imds-guard-test"), nft.Table("ip6", "imds-guard-test")
BASE = "type filter hook output priority -101; policy accept;"


@pytest.fixture
def box() -> Iterator[Sandbox]:
    """A namespace without any rule."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    need("nft")
    with Sandbox() as sandbox:
        yield sandbox


def table(*rules: str) -> dict[str, tuple[str, ...]]:
    return {"deny": ('counter reject comment "denied"',), "output": (BASE, *rules)}


def send(port: int) -> bool:
    """True when a datagram to the loopback interface left."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.sendto(b"?", ("127.0.0.1", port))
        except PermissionError:
            return False
    return True


def test_the_trial_changes_nothing(box: Sandbox) -> None:
    def inside() -> str:
        for family in ("ip", "ip6", "inet"):
            nft.require(family)
        return run(["nft", "list", "ruleset"]).stdout

    assert box.call(inside) == ""


def test_a_table_is_replaced_as_a_whole(box: Sandbox) -> None:
    """What the new table does not have is gone, and others' tables stay."""

    def inside() -> tuple[list[bool], str]:
        run(["nft", "-f", "-"], stdin="table ip others { chain empty { }; }\n")
        nft.change([nft.replacement(ONE, table("udp dport 7 goto deny", "udp dport 8 goto deny"))])
        first = [send(7), send(8), send(9)]
        nft.change([nft.replacement(ONE, table("udp dport 9 goto deny"))])
        return [*first, send(7), send(8), send(9)], run(["nft", "list", "tables"]).stdout

    reached, tables = box.call(inside)
    assert reached == [False, False, True, True, True, False]
    assert set(tables.splitlines()) == {"table ip others", f"table {ONE}"}


def test_a_change_that_fails_changes_nothing(box: Sandbox) -> None:
    """The first table of a change is as it was when the second one can't be loaded."""

    def inside() -> tuple[nft.Listing | None, nft.Listing | None, bool]:
        nft.change([nft.replacement(ONE, table("udp dport 7 goto deny"))])
        before = nft.read(ONE)
        with pytest.raises(GuardError, match="nothing was changed"):
            nft.change([nft.replacement(ONE, table()), nft.replacement(TWO, {"output": ("goto nowhere",)})])
        return before, nft.read(ONE), send(7)

    before, after, reached = box.call(inside)
    assert before is not None
    assert (before, reached) == (after, False)


def test_counters_and_comments_are_read(box: Sandbox) -> None:
    def inside() -> tuple[nft.Listing | None, list[bool], nft.Listing | None]:
        nft.change([nft.replacement(ONE, table("udp dport 7 goto deny"))])
        return nft.read(ONE), [send(7), send(7)], nft.read(ONE)

    before, sent, after = box.call(inside)
    assert before is not None
    assert after is not None
    assert sent == [False, False]
    assert after.rules == (nft.Rule("deny", 2, "denied"), nft.Rule("output", None, ""))
    assert (before.packets("deny"), after.packets("deny"), after.packets("output")) == ([0], [2], [])
    assert before.fingerprint == after.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        ("udp dport 8 goto deny",),
        ("udp dport 7 goto deny", "udp dport 8 goto deny"),
        (),
        ("udp dport { 7, 9 } goto deny",),
        ("udp dport 7 jump deny",),
    ],
)
def test_another_rule_is_another_fingerprint(box: Sandbox, other: tuple[str, ...]) -> None:
    def inside() -> list[str]:
        found = []
        for rules in (("udp dport 7 goto deny",), other, ("udp dport 7 goto deny",)):
            nft.change([nft.replacement(ONE, table(*rules))])
            listed = nft.read(ONE)
            found.append("" if listed is None else listed.fingerprint)
        return found

    first, second, third = box.call(inside)
    assert first == third != second


def test_removing_says_what_was_there(box: Sandbox) -> None:
    def inside() -> tuple[list[nft.Table], list[nft.Table], nft.Listing | None]:
        nft.change([nft.replacement(TWO, table())])
        return nft.remove([ONE, TWO]), nft.remove([ONE, TWO]), nft.read(TWO)

    assert box.call(inside) == ([TWO], [], None)


def test_without_the_right_it_says_so(box: Sandbox) -> None:
    def inside() -> list[str]:
        become((41_001,) * 3, (51_001,) * 3, ())
        said = []
        for attempt in (lambda: nft.require("ip"), lambda: nft.read(ONE)):
            said.append(refusal(attempt))
        return said

    assert box.call(inside) == ["needs root"] * 2


def refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except NotPermitted as error:
        return "needs root" if "needs root and CAP_NET_ADMIN" in str(error) else str(error)
    return "it worked"
