# SPDX-License-Identifier: Apache-2.0
"""The tables [filter.NAME]: read, refused with the line, written, and left alone by --save."""

from __future__ import annotations

from pathlib import Path

import pytest

from imds_guard.config import edit as config_edit
from imds_guard.config.names import BootNames, Name
from imds_guard.config.read import Config, config_of, parse_config
from imds_guard.config.source import parse_source
from imds_guard.config.write import dump_config
from imds_guard.errors import BadPolicy, UsageError
from imds_guard.export import export
from imds_guard.kernel import accounts
from imds_guard.policy import edit
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.filters import Filter, FilterRules
from imds_guard.policy.model import NOBODY, Identities

TEXT = """\
[lock.web]
endpoints = ["10.0.0.1:80+8080,tcp", "10.0.0.2:80,tcp"]
users = [0]

# Region for monitoring.
[filter.region]
locks = ["web"]
users = [41001]   # collectd
groups = [51001]
allow = ["GET /*/meta-data/placement/**"]

[filter.rest]
locks = ["web"]
everyone = true
port = 8080
rules = "no-credentials"
deny = ["/a"]
headers = "ec2-metadata-filter"
user_agents = ["curl/"]
require_imdsv2 = true
mode = "audit"
"""
LINE_OF = {line: number for number, line in enumerate(TEXT.splitlines(), 1)}


def test_filters_are_read_in_their_order() -> None:
    assert parse_config(TEXT).policy.filters == (
        Filter(
            "region",
            ("web",),
            Identities(frozenset((41001,)), frozenset((51001,))),
            rules=FilterRules(("GET /*/meta-data/placement/**",)),
        ),
        Filter(
            "rest",
            ("web",),
            NOBODY,
            True,
            FilterRules((), ("/a",), "ec2-metadata-filter", ("curl/",), True, True, ("no-credentials",)),
            8080,
        ),
    )


@pytest.mark.parametrize(
    ("old", "new", "expected", "at"),
    [
        ('allow = ["GET /*/meta-data/placement/**"]', 'allow = ["GET x"]', "'GET x' is not a path", ""),
        ('allow = ["GET /*/meta-data/placement/**"]', "allow = 5", "allow = 5 must be a list of strings", ""),
        (
            'allow = ["GET /*/meta-data/placement/**"]',
            "[filter.x]",
            "filter 'region' passes nothing on",
            "[filter.region]",
        ),
        ('deny = ["/a"]', 'deny = ["/a//b"]', "'/a//b' is not a path: the path has an empty segment", ""),
        ('rules = "no-credentials"', 'rules = "all"', "rules = 'all' is not known: known are no-credentials", ""),
        ('headers = "ec2-metadata-filter"', 'headers = "other"', "headers = 'other' is not known", ""),
        ('headers = "ec2-metadata-filter"', "", "user_agents replaces what headers", 'user_agents = ["curl/"]'),
        ('user_agents = ["curl/"]', 'user_agents = ["a\\nb"]', "is not the beginning of a User-Agent", ""),
        ("require_imdsv2 = true", "require_imdsv2 = 1", "require_imdsv2 = 1 must be true or false", ""),
        ('mode = "audit"', 'mode = "off"', "mode = 'off' must be 'enforce' or 'audit'", ""),
        ("port = 8080", 'port = "8080"', "port = '8080' must be a port", ""),
        (
            "port = 8080",
            "port = 81",
            "filter 'rest': its locks have no address of one host with TCP port 81",
            "[filter.rest]",
        ),
        ("port = 8080", "ports = 8080", "unknown key 'ports' in filter 'rest'; did you mean port?", ""),
        ("everyone = true", "everyone = true\nusers = [5]", "filter 'rest' is for everyone, which contradicts", ""),
        ("everyone = true", "", "filter 'rest' is for nobody", "[filter.rest]"),
        ("groups = [51001]", 'groups = ["nobody-has-it"]', "there is no group 'nobody-has-it'", ""),
    ],
)
def test_an_error_names_the_line(old: str, new: str, expected: str, at: str) -> None:
    with pytest.raises(BadPolicy) as caught:
        parse_config(TEXT.replace(old, new), "/etc/x.toml")
    message = str(caught.value)
    assert expected in message
    assert int(message.split(":")[1]) == LINE_OF[at or old]


def test_locks_must_exist_and_be_named() -> None:
    for new, expected in (('locks = ["no"]', "filter 'rest': there is no lock 'no'"), ("", "has no locks: add locks")):
        with pytest.raises(BadPolicy, match=expected):
            parse_config(TEXT.replace('locks = ["web"]\neveryone', f"{new}\neveryone"))


@pytest.mark.parametrize(("text", "expected"), [("filter = 5\n", "tables with a name"), ("filter.x = 5\n", "a table")])
def test_a_filter_is_a_table(text: str, expected: str) -> None:
    with pytest.raises(BadPolicy, match=expected):
        parse_config(text + TEXT.partition("# Region")[0])


def test_without_the_account_there_is_a_warning() -> None:
    config = parse_config(TEXT)
    known = accounts.user_in_files("imds-guard-filter")
    assert config.policy.filter_uid == (None if known is None else known.uid)
    assert any("there is no account imds-guard-filter" in line for line in config.warnings) is (known is None)


def test_at_boot_filters_behind_a_missing_name_are_for_nobody() -> None:
    """The first filter may be the stricter one for whoever has that name."""
    text = TEXT.replace("users = [41001]", 'users = ["not-here-yet"]')
    source = parse_source(text, "x")
    region, rest = config_of(source, BootNames({})).policy.filters
    assert (region.who, region.everyone) == (Identities(groups=frozenset((51001,))), False)
    assert (rest.who, rest.everyone) == (NOBODY, False)
    region, rest = config_of(source, BootNames({Name("user", "not-here-yet"): 7})).policy.filters
    assert 7 in region.who.users
    assert rest.everyone


def test_written_filters_are_read_back() -> None:
    config = parse_config(TEXT)
    assert parse_config(dump_config(config)) == config


SOURCE = parse_source(TEXT, "x")


def test_saving_leaves_the_tables_alone() -> None:
    """allow changes a lock; where that splits the lock, the filter names both parts."""
    pytest.importorskip("tomlkit")
    before = parse_config(TEXT)
    who = Identities(frozenset((41009,)))
    edited = config_edit.edit(SOURCE, before._replace(policy=edit.allow(before.policy, who)))["x"]
    assert edited.partition("# Region")[2] == TEXT.partition("# Region")[2]
    split = before._replace(policy=edit.allow(before.policy, who, parse_endpoint("10.0.0.2:80,tcp")))
    edited = config_edit.edit(SOURCE, split)["x"]
    assert parse_config(edited).policy == split.policy
    assert "# collectd" in edited


def test_saving_a_policy_without_filters_removes_the_tables(tmp_path: Path) -> None:
    pytest.importorskip("tomlkit")
    before = parse_config(TEXT)
    wanted = Config(before.policy._replace(filters=(), filter_uid=None))
    assert "filter" not in config_edit.edit(SOURCE, wanted)["x"]


@pytest.mark.parametrize("format", ["iptables", "nftables", "pf", "windows", "systemd"])
def test_filters_are_not_exported(format: str) -> None:
    with pytest.raises(UsageError, match="filter 'region' is a service of imds-guard"):
        export(parse_config(TEXT).policy, format)
