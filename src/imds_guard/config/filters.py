# SPDX-License-Identifier: Apache-2.0
"""Reads the tables [filter.NAME] of a configuration; config/write.py writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable

from imds_guard.config.names import Names
from imds_guard.config.table import Table
from imds_guard.errors import BadPolicy, GuardError
from imds_guard.kernel import accounts
from imds_guard.policy.filters import FILTER_USER, PLAIN_HTTP, Filter, FilterRules
from imds_guard.policy.header_rules import HEADER_RULES
from imds_guard.policy.model import NOBODY, Identities
from imds_guard.policy.path_pattern import parse_pattern
from imds_guard.policy.rule_sets import RULE_SETS

FILTER_KEYS = (
    *("locks", "users", "groups", "everyone", "port", "rules", "allow", "deny", "headers", "user_agents"),
    *("require_imdsv2", "mode"),
)

ReadIdentities = Callable[[Table, str, str], Identities]


def read_filters(tables: Iterable[Table], names: Names, identities: ReadIdentities) -> list[Filter]:
    """The filters of the tables [filter.NAME], in their order. Raises BadPolicy.

    A filter that comes first may be the stricter one. So as long as a name in it has no ID, the later ones are for
    nobody.
    """
    found: list[Filter] = []
    is_complete = True
    for table in tables:
        missing = len(names.missing)
        one = _filter(table, identities)
        found.append(one if is_complete else one._replace(who=NOBODY, everyone=False))
        if len(names.missing) > missing:
            is_complete = False
            names.warnings.append(f"until then, the filters that come after {table.name!r} are for nobody")
    return found


def filter_uid(filters: list[Filter], names: Names) -> int | None:
    """The ID of the account that runs the filters, which is an account of the machine's own files. Warns without it."""
    if not filters:
        return None
    try:
        user = accounts.user_in_files(FILTER_USER)
    except GuardError:
        user = None
    if user is None:
        names.warnings.append(
            f"there is no account {FILTER_USER}, so the filters serve nobody; imds-guard install-service --filter "
            "makes it"
        )
    return None if user is None else user.uid


def _filter(table: Table, identities: ReadIdentities) -> Filter:
    table.check_keys(FILTER_KEYS)
    locks = table.strings("locks")
    if not locks:
        table.fail(None, f"filter {table.name!r} has no locks: add locks = [...] with names of locks")
    everyone = table.flag("everyone")
    who = identities(table, "users", "groups")
    listed = table.entries("users") or table.entries("groups")
    if everyone and listed:
        table.fail("everyone", f"filter {table.name!r} is for everyone, which contradicts its users and groups")
    if not everyone and not listed:
        table.fail(None, f"filter {table.name!r} is for nobody: add users or groups, or everyone = true")
    return Filter(table.name, tuple(locks), who, everyone, _rules(table), _port(table))


def _port(table: Table) -> int:
    value = table.values.get("port", PLAIN_HTTP)
    if type(value) is not int or not 1 <= value <= 65535:
        table.fail("port", f"port = {value!r} must be a port (1 to 65535)")
    return value


def _rules(table: Table) -> FilterRules:
    sets = tuple(_known(table, "rules", RULE_SETS))
    allow = tuple(table.strings("allow"))
    if not allow and not sets:
        known = " or ".join(map(repr, RULE_SETS))
        table.fail(None, f"filter {table.name!r} passes nothing on: add allow = [...], or rules = {known}")
    deny = tuple(table.strings("deny"))
    for key, patterns in (("allow", allow), ("deny", deny)):
        for text in patterns:
            table.convert(key, text, parse_pattern)
    headers = _known(table, "headers", HEADER_RULES)
    if len(headers) > 1:
        table.fail("headers", f"headers = {headers!r} must be one of {', '.join(HEADER_RULES)}")
    return FilterRules(
        allow,
        deny,
        headers[0] if headers else None,
        _user_agents(table, bool(headers)),
        table.flag("require_imdsv2"),
        table.choice("mode", ("enforce", "audit")) == "audit",
        sets,
    )


def _known(table: Table, key: str, known: tuple[str, ...]) -> list[str]:
    """A name, or a list of names, that are all in ``known``."""
    names = table.strings(key, single=True)
    for name in names:
        if name not in known:
            table.fail(key, f"{key} = {name!r} is not known: known are {', '.join(known)}")
    return names


def _user_agents(table: Table, has_headers: bool) -> tuple[str, ...]:
    found = tuple(table.strings("user_agents"))
    if found and not has_headers:
        table.fail("user_agents", 'user_agents replaces what headers = "ec2-metadata-filter" accepts: add that key')
    for text in found:
        table.convert("user_agents", text, _check_user_agent)
    return found


def _check_user_agent(text: str) -> None:
    if not text or not text.isascii() or not text.isprintable() or text != text.strip():
        raise BadPolicy(f"user_agents: {text!r} is not the beginning of a User-Agent: it takes printable ASCII")
