# SPDX-License-Identifier: Apache-2.0
"""All metrics at once: the parsers of prometheus_client, the conventions for names, and the page that explains them.

The conventions: https://prometheus.io/docs/practices/naming and https://prometheus.io/docs/specs/om/open_metrics_spec.
tests/system/test_report.py reads the metrics of real guards.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_open_metrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from imds_guard import __version__
from imds_guard.backends.ebpf import State
from imds_guard.backends.ebpf.hooks import Attached, Hook
from imds_guard.backends.ebpf.report import Report, Row, Who
from imds_guard.backends.forwarded.places import Count, Counts
from imds_guard.backends.forwarded.state import Forwarding, ForwardingState
from imds_guard.commands import metrics
from imds_guard.commands.filter_refusals import Refusals
from imds_guard.commands.look import Status
from imds_guard.policy.decide import Reason
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.filters import Filter, FilterRules
from imds_guard.policy.model import Identities, Lock, Mode, Protocol, make_policy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"
HOSTILE = 'a"b\\c\nd'
FALLS = {
    "active": "stop",
    "degraded": "repaired",
    "emergency": "a usable configuration",
    "audit": "enforce",
    "policy_generation": "2 is followed by 1",
    "report_denials": "a caller that is allowed leaves the report",
    "hook_attached": "somebody detaches it",
    "forwarded_rules": "somebody removes them",
    "filter_connections": "clients close them",
    "info": "always 1, by the form of an Info",
}
"""Each gauge, and what makes it fall. One that can only grow is a counter."""


def lock(name: str = "default") -> Lock:
    return Lock(name, (parse_endpoint("192.0.2.1:80,tcp"),), Identities(frozenset({41_001})))


def row(name: str | None, reason: Reason, count: int) -> Row:
    return Row(name, reason, Who.USER, 41_002, count, 1, 2, ip_address("192.0.2.1"), 80, Protocol.TCP, b"curl")


def everything(mode: Mode = Mode.ENFORCE) -> list[Metric]:
    """The metrics of a guard that has all there is."""
    rules = FilterRules(("GET /a",))
    policy = make_policy(
        [lock()], mode, filters=[Filter("region", ("default",), Identities(), everyone=True, rules=rules)]
    )
    ours = Attached(7, "ig_connect4", __version__, (), 5, 1_500_000)
    hooks = tuple(Hook(name, (ours,), 7) for name in ("connect4", "connect6", "sendmsg4", "sendmsg6"))
    counters = tuple((int(reason) + 1, 1) for reason in Reason)
    state = State("/", True, "/sys/fs/bpf/imds-guard", 1, policy, hooks, counters, (), 3, 4)
    counts = Counts((Count("default", 4, Protocol.TCP, 8),), 2)
    forwarded = ForwardingState(Forwarding.REJECTED, (), "nft", (4, 6), counts)
    found = Status("ebpf", policy, ["a fault"], state, forwarded=forwarded)
    rows = (
        row("default", Reason.NOT_LISTED, 3),
        row("default", Reason.NOT_LISTED, 4),
        row(None, Reason.NO_SETTINGS, 1),
    )
    report = Report(1, 12, mode, rows, 4)
    return list(metrics.families(found, report, Refusals((), 0, ((HOSTILE, "refused", 2),), 1)))


def registry(found: list[Metric]) -> CollectorRegistry:
    made = CollectorRegistry(auto_describe=False)
    metrics.register(made, found)
    return made


@pytest.fixture(scope="module")
def text() -> str:
    return generate_latest(registry(everything())).decode()


def test_both_parsers_of_prometheus_client_read_the_same_samples(text: str) -> None:
    """That of OpenMetrics is strict about types, units and escapes."""
    plain = {(one.name, *sorted(one.labels.items())): one.value for f in parse_text(text) for one in f.samples}
    open_text = generate_open_metrics(registry(everything())).decode()
    strict = {
        (one.name, *sorted(one.labels.items())): one.value for f in parse_open_metrics(open_text) for one in f.samples
    }
    assert plain == strict
    assert plain["imds_guard_filter_requests_total", ("filter", HOSTILE), ("outcome", "refused")] == 2
    assert plain["imds_guard_report_denials", ("lock", "default"), ("reason", "not-listed")] == 7
    assert plain["imds_guard_policy_changes_total",] == 12
    assert plain["imds_guard_hook_seconds_total", ("hook", "connect4")] == 0.0015


def declared(text: str) -> dict[str, str]:
    """Metric -> type, from the lines that declare it."""
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))


def test_each_metric_is_declared_once_before_its_samples(text: str) -> None:
    seen: list[str] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("# HELP "):
            name, _, help_text = line[len("# HELP ") :].partition(" ")
            assert name not in seen
            assert re.fullmatch(r".{10,}\.", help_text), line
            assert lines[number + 1].startswith(f"# TYPE {name} ")
            seen.append(name)
        elif not line.startswith("#"):
            assert re.split(r"[{ ]", line)[0] == seen[-1]
    assert sorted(seen) == sorted(declared(text))


def test_counters_end_in_total_and_nothing_else_does(text: str) -> None:
    found = declared(text)
    assert set(found.values()) == {"counter", "gauge"}
    assert {name for name in found if name.endswith("_total")} == {n for n, kind in found.items() if kind == "counter"}


def test_each_gauge_can_fall(text: str) -> None:
    gauges = {name[len("imds_guard_") :] for name, kind in declared(text).items() if kind == "gauge"}
    assert gauges == set(FALLS)


def test_names_have_the_prefix_and_base_units(text: str) -> None:
    for name in declared(text):
        assert re.fullmatch(r"imds_guard(_[a-z]+)+", name)
        words = set(name.split("_"))
        # The suffixes of histograms and summaries, and what stands for a base unit (seconds, bytes, ratio).
        assert words.isdisjoint({"count", "sum", "bucket", "created", "gauge", "counter"})
        assert words.isdisjoint({"s", "ms", "us", "ns", "sec", "milliseconds", "minutes", "hours", "days"})
        assert words.isdisjoint({"b", "kb", "mb", "kib", "mib", "kilobytes", "bits", "percent"})


def test_labels_are_words_that_prometheus_does_not_set_itself() -> None:
    labels = {label for family in everything() for one in family.samples for label in one.labels}
    assert {label for label in labels if not re.fullmatch(r"[a-z]+(_[a-z]+)*", label)} == set()
    assert labels.isdisjoint({"job", "instance", "le", "quantile", "file", "mtime"})


def test_packets_and_connects_in_audit_mode_are_not_called_denied() -> None:
    for family in everything(Mode.AUDIT):
        if family.name.startswith("imds_guard_forwarded") and family.type == "counter":
            assert {one.labels["outcome"] for one in family.samples} == {"audited"}
    audit = {one.name: one.value for family in everything(Mode.AUDIT) for one in family.samples}
    assert audit["imds_guard_audit"] == 1


def test_the_page_has_every_metric_and_its_type(text: str) -> None:
    table = PAGE.read_text(encoding="utf-8").split("<!-- metrics -->")[1].split("<!-- /metrics -->")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .+ \|$", table, re.MULTILINE)
    assert dict(rows) == declared(text)
    assert len(rows) == len(dict(rows)) == len(table.strip().splitlines()) - 2


def test_the_page_names_every_label() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for one in (sample for family in everything() for sample in family.samples):
        (line,) = (line for line in lines if line.startswith(f"| `{one.name}` "))
        assert [label for label in one.labels if f"`{label}`" not in line] == []
