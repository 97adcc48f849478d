# SPDX-License-Identifier: Apache-2.0
"""The JSON schemas: one for each command with --json, valid, strict, and with the values that the source has."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imds_guard.backends.ebpf.other_programs import Order
from imds_guard.backends.ebpf.report import Who
from imds_guard.backends.forwarded import Forwarding
from imds_guard.commands.look import Older
from imds_guard.connections.values import SweepEnd, WhyOpen
from imds_guard.policy.builtin import DefaultOn
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Mode, Protocol, Verdict
from imds_guard.text import JSON_SCHEMA
from imds_guard.watch.event import VERDICTS
from tests import schemas
from tests.tools import missing
from tests.tree import every_command

NAMES = sorted(path.stem for path in schemas.FOLDER.glob("*.json"))
COMMANDS = {
    name for name, command in every_command().items() if any("--json" in option.opts for option in command.params)
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def test_each_command_with_json_has_a_schema_and_no_other_has_one() -> None:
    assert set(NAMES) == COMMANDS | {schemas.COMMON, schemas.ERROR}
    assert {"start", "status", "watch"} <= COMMANDS


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_schema_of_this_draft(name: str) -> None:
    if not schemas.INSTALLED:
        missing("jsonschema is not installed")
    assert schemas.load(name)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    importlib.import_module("jsonschema").Draft202012Validator.check_schema(schemas.whole(name))


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema."""
    if isinstance(schema, dict):
        yield schema
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from parts(inner)


@pytest.mark.parametrize("name", NAMES)
def test_no_object_may_have_keys_that_are_not_described(name: str) -> None:
    objects = [part for part in parts(schemas.load(name)) if "object" in str(part.get("type"))]
    assert [part for part in objects if "additionalProperties" not in part] == []
    assert [part for part in objects if not set(part.get("required", ())) <= set(part.get("properties", ()))] == []


@pytest.mark.parametrize("name", NAMES)
def test_what_it_refers_to_is_there(name: str) -> None:
    """A validator finds common.json beside the file; a reference to any other file is not foreseen in the tests."""
    defined = schemas.whole(name)["$defs"]
    for part in parts(schemas.load(name)):
        found = re.fullmatch(r"(common\.json)?#/\$defs/(\w+)", part.get("$ref", "#/$defs/schema"))
        assert found is not None, part
        assert found[2] in defined, part


def test_every_part_is_used() -> None:
    text = "".join((schemas.FOLDER / f"{name}.json").read_text(encoding="utf-8") for name in NAMES)
    assert [part for part in schemas.load(schemas.COMMON)["$defs"] if f'#/$defs/{part}"' not in text] == []


def described(path: str) -> set[str | None]:
    """The values that a schema has at NAME/KEY/KEY."""
    name, *keys = path.split("/")
    part: Any = schemas.load(name)
    for key in keys:
        part = part["items"] if key == "*" else part["$defs"][key] if key in part.get("$defs", ()) else part
        part = part["properties"][key] if key in part.get("properties", ()) else part
    return set(part["enum"])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("common/reason", {one.label for one in Reason}),
        ("common/mode", {one.value for one in Mode}),
        ("common/verdict", {one.value for one in Verdict}),
        ("common/protocol", {one.value for one in Protocol}),
        ("common/why_left", {one.value for one in WhyOpen} | {None}),
        ("common/connections/sweep", {one.value for one in SweepEnd}),
        ("common/forwarded/state", {one.value for one in Forwarding}),
        ("explain/forwarded", {one.value for one in Forwarding} | {None}),
        ("explain/new_process", {one.value for one in Older} | {None}),
        ("endpoints/endpoints/*/default", {one.value for one in DefaultOn}),
        ("report/rows/*/who", {one.label for one in Who} | {"unknown"}),
        ("status/ebpf/other_programs/*/runs", {one.name.lower() for one in Order}),
        ("watch/connect/event", set(VERDICTS)),
    ],
)
def test_the_values_are_those_of_the_source(path: str, expected: set[str | None]) -> None:
    assert described(path) == expected


def test_the_number_is_the_one_that_is_printed() -> None:
    assert schemas.load(schemas.COMMON)["$defs"]["schema"]["const"] == JSON_SCHEMA


def test_an_error_is_as_its_schema_says() -> None:
    if not schemas.INSTALLED:
        missing("jsonschema is not installed")
    right = {"schema": JSON_SCHEMA, "error": {"status": 64, "message": "x"}}
    assert schemas.faults("error", right) == []
    assert len(schemas.faults("error", {**right, "more": 1})) == 1
    assert len(schemas.faults("error", {**right, "schema": JSON_SCHEMA + 1})) == 1


def test_the_page_says_where_they_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "src/imds_guard/data/schema" in text
    assert f"/usr/share/imds-guard/{schemas.FOLDER.relative_to(schemas.FOLDER.parents[2])}" in text
