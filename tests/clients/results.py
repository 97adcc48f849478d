# SPDX-License-Identifier: Apache-2.0
"""What the clients showed, and the table of it in docs/clients.md: ``./run clients --record`` writes both."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vagrant.matrix import cache

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "clients.md"
BACKEND = "ebpf"
"""The backend whose messages the table has. Under iptables they have ECONNREFUSED in place of EPERM."""
_TABLE = re.compile(r"(<!-- clients-table -->\n)(.*?)(<!-- /clients-table -->)", re.DOTALL)
_LONGEST = 150
_CLOUDS = {"imdsv2": "AWS", "gcp": "Google Cloud", "azure": "Azure"}
_SHOWN = {"secret": "credentials", "place": "region or zone"}
_FROM_NPM: dict[str, str | dict[str, str]] = {
    "aws-sdk-js": {"secret": "@aws-sdk/credential-providers", "place": "@aws-sdk/ec2-metadata-service"},
    "gcp-metadata": "gcp-metadata",
    "google-auth-library": "google-auth-library",
    "azure-identity-js": "@azure/identity",
}
_FROM_PYPI = {"aws-cli": "awscli"}

VARIABLE = "IMDS_GUARD_CLIENTS_RESULTS"
"""The file to which a run adds what it saw."""


class Answer(NamedTuple):
    """Of a client to a question."""

    asked: str
    """``secret`` or ``place``."""
    got: Any
    said: str
    """Its message; empty where it got something."""
    seconds: float


def record(backend: str, client: str, flavour: str, account: str, answers: Sequence[Answer]) -> None:
    """Adds a line for each answer to the file that the variable names."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    with open(path, "a", encoding="utf-8") as lines:
        for one in answers:
            row = {"backend": backend, "client": client, "flavour": flavour, "account": account, **one._asdict()}
            lines.write(json.dumps(row) + "\n")


def read(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The rows that a run has added, without what was got: that is the same in every run, and tested."""
    rows = [json.loads(line) for line in lines]
    return [{**row, "got": row["got"] not in (None, ""), "said": _short(row["said"])} for row in rows]


def _short(said: str) -> str:
    """On one line, without addresses of objects and times, and without its middle: the cause is often at the end."""
    text = " ".join(re.sub(r"0x[0-9a-f]+", "0x...", re.sub(r" after \d+ ms", "", said)).split())
    half = _LONGEST // 2 - 3
    return text if len(text) <= _LONGEST else f"{text[:half].rstrip()} ... {text[-half:].lstrip()}"


def versions() -> dict[str, str]:
    """Of the clients that run in the suite."""
    pins = dict(line.split("==") for line in _text("requirements.txt").splitlines() if "==" in line)
    npm = json.loads(_text("package.json"))["dependencies"]
    found = sorted(cache.root().glob("clients/cloud-init-*/recipe.json"), key=lambda path: path.stat().st_mtime)
    newest = json.loads(found[-1].read_text(encoding="utf-8")) if found else {}
    return {**pins, **npm, **newest}


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """The rows of denied and filtered accounts: what they get, what the client says and after how long."""
    lines = [
        "| client | cloud | asked for | filtered (`no-credentials`) | denied |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = {
        (row["client"], row["flavour"], row["asked"], row["account"]): row
        for row in results["rows"]
        if row["backend"] == BACKEND
    }
    for client, flavour, asked, account in rows:
        # Messages under IMDSv1 are the same.
        if account == "denied" and flavour != "imdsv1":
            cells = [_cell(rows[client, flavour, asked, one]) for one in ("filtered", "denied")]
            name = _name(client, asked, results["versions"])
            lines.append("| " + " | ".join([name, _CLOUDS[flavour], _asked(client, asked), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _asked(client: str, asked: str) -> str:
    return "user data" if (client, asked) == ("cloud-init", "secret") else _SHOWN[asked]


def _name(client: str, asked: str, known: dict[str, str]) -> str:
    package: str | dict[str, str] = _FROM_NPM.get(client, _FROM_PYPI.get(client, client))
    name = package[asked] if isinstance(package, dict) else package
    return f"{name} {known[name]}" if name in known else name


def _cell(row: dict[str, Any]) -> str:
    if row["got"]:
        return "gets it"
    said = row["said"].replace("|", "\\|").replace("<", "&lt;")
    return f"{said or 'nothing, without a message'} ({row['seconds']:.1f} s)"


def write(lines: Iterable[str]) -> None:
    """Keeps the results of a run, and writes the table of the page."""
    results = {"versions": versions(), "rows": read(lines)}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_TABLE.sub(lambda match: match[1] + table(results) + match[3], page), encoding="utf-8")


def table_of_page() -> str:
    """As docs/clients.md has it."""
    match = _TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert match is not None
    return match[2]


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as seen:
        write(seen)
