# SPDX-License-Identifier: Apache-2.0
"""The JSON schemas that ship with imds-guard, and what they say about an output."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imds_guard
from imds_guard.cli.group import MODULES

FOLDER = Path(imds_guard.__file__).parent / "data" / "schema"
INSTALLED = importlib.util.find_spec("jsonschema") is not None
"""False in the guests of the matrix, which have the packages of a machine that is used, and pytest."""
COMMON, ERROR = "common", "error"
"""Parts of the others, and what any command prints where it fails."""


def load(name: str) -> dict[str, Any]:
    """A schema as it ships."""
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def whole(name: str) -> dict[str, Any]:
    """A schema with the parts that it takes from common.json: they are the only other file that one refers to."""
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8").replace(f"{COMMON}.json#/$defs/", "#/$defs/")
    schema: dict[str, Any] = json.loads(text)
    return {**schema, "$defs": {**load(COMMON)["$defs"], **schema.get("$defs", {})}}


@functools.cache
def _validator(name: str) -> Any:
    return importlib.import_module("jsonschema").Draft202012Validator(whole(name))


def faults(name: str, values: Any) -> list[str]:
    """What is wrong with an output, by the schema of this name."""
    return [f"{error.json_path}: {error.message}" for error in _validator(name).iter_errors(values)]


def command_of(argv: Sequence[str]) -> str:
    """The command that prints JSON by this argv; nothing for another program, or without --json."""
    names = [word for word in argv if word in MODULES]
    return names[0] if names and "--json" in argv else ""


def check(command: str, values: Any) -> None:
    """Fails where an output of a command is not as its schema says."""
    if command and INSTALLED:
        name = ERROR if set(values) == {"schema", "error"} else command
        assert faults(name, values) == [], (command, values)
