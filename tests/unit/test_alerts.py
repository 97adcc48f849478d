# SPDX-License-Identifier: Apache-2.0
"""The alert rules in examples/prometheus, by promtool. Rows say for each alert when it fires and when it does not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tools import need
from tests.tree import every_command

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "prometheus"
RULES, ROWS = FOLDER / "alerts.yml", FOLDER / "alerts-test.yml"
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]
NAMES = [rule["alert"] for rule in ALERTS]


def promtool(*arguments: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    need("promtool")
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", RULES.name)
    assert (done.returncode, f"SUCCESS: {len(NAMES)} rules found" in done.stdout) == (0, True), done


def test_each_alert_fires_when_it_should() -> None:
    done = promtool("test", "rules", ROWS.name)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", ["vector(1) > 1", "vector(1)"], ids=["never", "always"])
def test_an_alert_that_never_or_always_fires_is_found(name: str, wrong: str, tmp_path: Path) -> None:
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    (rule,) = (one for group in rules["groups"] for one in group["rules"] if one["alert"] == name)
    rule["expr"] = wrong
    (tmp_path / RULES.name).write_text(yaml.safe_dump(rules), encoding="utf-8")
    shutil.copy(ROWS, tmp_path)
    done = promtool("test", "rules", ROWS.name, folder=tmp_path)
    assert (done.returncode, f"alertname: {name}," in done.stderr) == (1, True), done


# --- without the tool -----------------------------------------------------------------------------------------------


def test_each_alert_has_rows_where_it_fires_and_where_it_does_not() -> None:
    tests = yaml.safe_load(ROWS.read_text(encoding="utf-8"))["tests"]
    rows = {(row["alertname"], bool(row["exp_alerts"])) for test in tests for row in test["alert_rule_test"]}
    assert rows == {(name, fires) for name in NAMES for fires in (True, False)}


def test_rules_and_rows_use_metrics_that_there_are() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    there = set(re.findall(r"^\| `(imds_guard_\w+)` \|", page, re.MULTILINE))
    for path in (RULES, ROWS):
        assert set(re.findall(r"\bimds_guard_\w+", path.read_text(encoding="utf-8"))) <= there


def test_every_state_that_is_wrong_has_an_alert() -> None:
    text = " ".join(rule["expr"] for rule in ALERTS)
    for name in ("active", "degraded", "emergency", "audit"):
        assert f"imds_guard_{name} == " in text


def test_the_page_has_every_alert() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(ImdsGuard\w+)` \| (\w+) \|", page, re.MULTILINE)
    assert rows == [(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS]


def test_severity_and_annotations_are_there() -> None:
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"]


def test_a_command_in_an_alert_is_one_and_takes_its_options() -> None:
    """What follows the name of the program and is no command is the verb of a sentence."""
    text = " ".join(text for rule in ALERTS for text in rule["annotations"].values())
    called = re.findall(r"\bimds-guard ([a-z-]+)((?: enforce)?(?: --[a-z]+(?: FOLDER)?)*)", text)
    assert {word for word, _ in called if word not in every_command()} == {
        "are",
        "denies",
        "locks",
        "says",
        "there",
        "was",
    }
    assert len(called) > 8
    for word, more in called:
        if word in every_command():
            every_command()[word].make_context(word, more.split())
