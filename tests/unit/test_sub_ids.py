# SPDX-License-Identifier: Apache-2.0
"""The warning that a deny list does not hold users with sub-IDs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imds_guard.commands.sub_ids import sub_id_warnings
from imds_guard.config.read import parse_config
from imds_guard.kernel import accounts
from imds_guard.kernel.deadline import within

PASSWD = """root:x:0:0::/root:/bin/sh
www:x:1001:2001::/:/bin/sh
dev:x:1002:2002::/:/bin/sh
ops:x:1003:2003::/:/bin/sh
"""
GROUP = "students:x:3001:dev\nothers:x:3002:ops\n"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="names are read only from files of root")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a machine where dev has sub-IDs by name, and ops by number."""
    (tmp_path / "etc").mkdir()
    for name, text in (
        ("passwd", PASSWD),
        ("group", GROUP),
        ("subuid", "dev:100000:65536\n"),
        ("subgid", "1003:9:1\n"),
    ):
        (tmp_path / "etc" / name).write_text(text, encoding="utf-8")
    monkeypatch.setenv(accounts.VARIABLE, str(tmp_path))
    return tmp_path


def warnings(lists: str) -> list[str]:
    """The warnings for a lock with these lists."""
    return sub_id_warnings(parse_config(f'[lock.web]\nendpoints = ["192.0.2.1"]\n{lists}\n').policy)


@pytest.mark.parametrize(
    ("lists", "named"),
    [
        ("deny_users = [1002]", "dev"),
        ("deny_users = [1001, 1002, 1003]", "dev, ops"),
        ("deny_groups = [3001]", "dev"),
        ("deny_groups = [2003]", "ops"),
        ('deny_users = [1002]\nusers = [0]\ndefault = "allow"', "dev"),
    ],
    ids=["user", "by number", "member", "primary group", "a lock that allows by default"],
)
def test_who_has_sub_ids_is_named(lists: str, named: str) -> None:
    (warning,) = warnings(lists)
    assert warning.startswith(f"the deny list of lock 'web' does not hold {named}: ")


@pytest.mark.parametrize(
    "lists",
    [
        "deny_users = [1001]",
        "deny_groups = [3002, 9999]\nusers = [0]",
        "users = [1002]",
        "deny_users = [1002]\nusers = [0]",
    ],
    ids=["no sub-IDs", "allowlist", "no deny list", "allowlist beside the deny list"],
)
def test_an_allowlist_needs_no_warning(lists: str) -> None:
    assert warnings(lists) == []


def test_a_machine_without_sub_ids_has_no_warning(machine: Path) -> None:
    for name in ("subuid", "subgid"):
        (machine / "etc" / name).unlink()
    assert warnings("deny_users = [1002]") == []


def test_a_machine_with_very_many_users_is_looked_at_in_time(machine: Path) -> None:
    """useradd(8) gives each of them sub-IDs; each is in a group of its own, and all of them in one."""
    names = [f"user{number}" for number in range(20_000)]
    text = "".join(f"{name}:x:{number}:{number}::/:\n" for number, name in enumerate(names, 10_000))
    (machine / "etc" / "passwd").write_text(text, encoding="utf-8")
    (machine / "etc" / "subuid").write_text("".join(f"{name}:1:1\n" for name in names), encoding="utf-8")
    groups = "".join(f"{name}:x:{number}:{name},a,b,c\n" for number, name in enumerate(names, 10_000))
    (machine / "etc" / "group").write_text(f"{groups}all:x:9:{','.join(names)}\n", encoding="utf-8")
    with within(20):
        (warning,) = warnings("deny_groups = [9]")
    assert "does not hold user0, user1, user10, and 19997 more" in warning
