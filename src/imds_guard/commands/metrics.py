# SPDX-License-Identifier: Apache-2.0
"""The state and the counters as Prometheus text (https://prometheus.io/docs/instrumenting/exposition_formats/).

Names follow https://prometheus.io/docs/practices/naming. What a change of policy can make smaller, but not zero, is a
gauge: Prometheus takes any smaller value of a counter for a restart from zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from imds_guard import __version__
from imds_guard.backends.ebpf import State
from imds_guard.backends.ebpf.abi import needed_hooks
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.report import Report, read_report
from imds_guard.commands.filter_refusals import Refusals, read_refusals
from imds_guard.commands.look import Status, status
from imds_guard.errors import GuardError, Unsupported, UsageError, system_text
from imds_guard.kernel import files
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Mode

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

    from imds_guard.backends.forwarded import ForwardingState

_NAME = "imds_guard"


def metrics(cgroup: str | None) -> bytes:
    """``imds_guard_active 0`` where nothing is locked. Raises Unsupported without the library prometheus_client."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415 -- no other command needs it
    except ImportError as error:
        raise Unsupported(
            "printing metrics: the Python library prometheus_client is missing; install python3-prometheus-client "
            "(python3-prometheus_client on Fedora and RHEL)"
        ) from error
    registry = CollectorRegistry(auto_describe=False)
    register(registry, list(families(*_read(cgroup))))
    text: bytes = generate_latest(registry)
    return text


class _Collected:
    """A collector in the sense of prometheus_client, for metrics that were read before."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        return self._families


def register(registry: CollectorRegistry, found: list[Metric]) -> None:
    """Makes the registry print these metrics."""
    registry.register(_Collected(found))  # type: ignore[arg-type]


def _read(cgroup: str | None) -> tuple[Status, Report | None, Refusals | None]:
    found = status(cgroup)
    refusals = read_refusals() if found.policy is not None and found.policy.filters else None
    if found.ebpf is None:
        return found, None, refusals
    try:
        return found, read_report(PinLocation.of(cgroup)), refusals
    except GuardError:
        return found, None, refusals  # found.faults says that its maps can't be read


# --- families -------------------------------------------------------------------------------------------------------


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

    return GaugeMetricFamily(f"{_NAME}_{name}", text, value=value)


def _labelled_gauge(name: str, text: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

    return GaugeMetricFamily(f"{_NAME}_{name}", text, labels=labels)


def _counter(name: str, text: str, labels: tuple[str, ...] = (), unit: str = "") -> CounterMetricFamily:
    """The library adds _total."""
    from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415

    return CounterMetricFamily(f"{_NAME}_{name}", text, labels=labels, unit=unit)


def _versions(found: Status) -> InfoMetricFamily:
    from prometheus_client.core import InfoMetricFamily  # noqa: PLC0415

    programs = ",".join(found.ebpf.versions) if found.ebpf is not None else ""
    labels = {"version": __version__, "backend": found.backend or "none", "programs": programs}
    return InfoMetricFamily(_NAME, "Versions of imds-guard and of its programs; the backend in force.", value=labels)


def families(found: Status, report: Report | None, refusals: Refusals | None) -> Iterator[Metric]:
    """All metrics that there are for these values."""
    yield _versions(found)
    yield _gauge("active", "1 when a policy is in force.", found.backend is not None)
    yield _gauge("degraded", "1 when the guard has a fault: imds-guard status names it.", bool(found.faults))
    text = "1 while the emergency lock replaces a configuration that can't be used."
    yield _gauge("emergency", text, found.emergency)
    audit = found.policy is not None and found.policy.mode is Mode.AUDIT
    yield _gauge("audit", "1 when the policy in force only counts denials.", audit)
    if found.ebpf is not None:
        yield from _of_state(found.ebpf)
        yield from _of_hooks(found.ebpf, needed_hooks(found.policy))
    if report is not None:
        yield from _of_report(report)
    if found.forwarded is not None:
        yield from _of_forwarded(found.forwarded, "audited" if audit else "denied")
    if refusals is not None:
        yield from _of_filter(refusals)


def _of_state(state: State) -> Iterator[Metric]:
    if state.generation is not None:
        yield _gauge("policy_generation", "The generation in force: 1 or 2 in turn.", state.generation)
    decisions = _counter("decisions", "Connects to locked endpoints, by reason and outcome.", ("reason", "outcome"))
    for reason, (enforced, audited) in zip(Reason, state.counters):
        if reason is Reason.NOT_LOCKED:
            continue
        is_filtered = reason is Reason.FILTERED
        outcome = "redirected" if is_filtered else "allowed" if reason.permits else "denied"
        decisions.add_metric([reason.label, outcome], enforced)
        if is_filtered or not reason.permits:
            decisions.add_metric([reason.label, "audited"], audited)
    if state.counters:
        yield decisions
        lost = _counter("lost_records", "Denials whose record did not fit into the ring buffer.")
        lost.add_metric([], state.lost_events)
        yield lost
        overflow = _counter("report_overflow", "Denials that did not fit into the report.")
        overflow.add_metric([], state.report_overflow)
        yield overflow


def _of_hooks(state: State, needed: tuple[str, ...]) -> Iterator[Metric]:
    """The kernel counts runs only while kernel.bpf_stats_enabled is 1 or somebody holds BPF_ENABLE_STATS (bpf(2))."""
    attached = _labelled_gauge("hook_attached", "1 when the hook runs our program.", ("hook",))
    runs = _counter("hook_runs", "Runs of the hook, while kernel.bpf_stats_enabled was on.", ("hook",))
    text = "Time spent in the hook, while kernel.bpf_stats_enabled was on."
    seconds = _counter("hook_seconds", text, ("hook",), unit="seconds")
    for hook in state.hooks:
        if hook.name not in needed:
            continue
        attached.add_metric([hook.name], hook.ours is not None)
        if hook.ours is not None and hook.ours.run_count:
            runs.add_metric([hook.name], hook.ours.run_count)
            seconds.add_metric([hook.name], hook.ours.run_time_ns / 1e9)
    yield attached
    if runs.samples:
        yield runs
        yield seconds


def _of_report(report: Report) -> Iterator[Metric]:
    changes = _counter("policy_changes", "Policies that came into force since the guard was started.")
    changes.add_metric([], report.serial)
    yield changes
    # Not a counter: a row goes when the policy lets its caller through.
    text = "Denials in the report, by lock and reason. Those of a caller go when a change of policy allows it."
    denials = _labelled_gauge("report_denials", text, ("lock", "reason"))
    sums: Counter[tuple[str, str]] = Counter()
    for row in report.rows:
        sums[row.lock or "", row.reason.label] += row.count
    for labels, count in sorted(sums.items()):
        denials.add_metric(list(labels), count)
    yield denials


def _of_forwarded(state: ForwardingState, outcome: str) -> Iterator[Metric]:
    in_force = state.by is not None and not state.is_open
    yield _gauge("forwarded_rules", "1 when rules for forwarded packets are in force.", in_force)
    if not in_force:
        return
    text = "Forwarded packets to locked endpoints: denied, or counted in audit mode. New rules reset them."
    packets = _counter("forwarded_packets", text, ("lock", "ip", "protocol", "outcome"))
    for one in state.counts.rejected:
        packets.add_metric([one.lock, str(one.version), one.protocol.value, outcome], one.packets)
    yield packets
    text = "Forwarded fragments to locked addresses: dropped, or counted in audit mode. New rules reset them."
    fragments = _counter("forwarded_fragments", text, ("outcome",))
    fragments.add_metric([outcome], state.counts.fragments)
    yield fragments


def _of_filter(refusals: Refusals) -> Iterator[Metric]:
    text = "Requests to filters since their service was started."
    requests = _counter("filter_requests", text, ("filter", "outcome"))
    for name, outcome, count in refusals.counters:
        requests.add_metric([name, outcome], count)
    yield requests
    yield _gauge("filter_connections", "Open connections to filters.", refusals.connections)


# --- the file -------------------------------------------------------------------------------------------------------


def check_textfile_name(path: str) -> None:
    """Raises UsageError: node_exporter reads no other name (github.com/prometheus/node_exporter#textfile-collector)."""
    if not path.endswith(".prom"):
        raise UsageError(f"--textfile {path}: node_exporter reads only *.prom; end the name in .prom")


def write_textfile(text: bytes, path: str) -> None:
    """Replaces the file in one step, so that node_exporter never reads a part of it. Raises GuardError."""
    try:
        files.replace(path, text)
    except OSError as error:
        raise GuardError(
            f"writing metrics to {path}: {system_text(error)}; name a file in an existing, writable directory"
        ) from error
