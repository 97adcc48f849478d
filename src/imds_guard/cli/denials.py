# SPDX-License-Identifier: Apache-2.0
"""The commands about denials: watch, report, metrics."""

from __future__ import annotations

import sys

import click

from imds_guard.cli import complete, streams
from imds_guard.cli.group import cli
from imds_guard.cli.options import cgroup_option, json_option
from imds_guard.cli.output import print_json, print_lines
from imds_guard.commands import which
from imds_guard.commands.capabilities import require_root
from imds_guard.errors import UsageError


@cli.command(short_help="Print denials as they happen.")
@json_option
@click.option("--all", "allowed", is_flag=True, help="Also print connects that are allowed.")
@click.option("--once", is_flag=True, help="Print the denials that the kernel holds now, and exit.")
@cgroup_option
def watch(as_json: bool, allowed: bool, once: bool, cgroup: str | None) -> None:
    """Print denials as they happen, one per line, until interrupted.

    Similar connects are combined into one line with a count. Several watches can run at the same time.
    """
    from imds_guard.kernel import notify  # noqa: PLC0415
    from imds_guard.watch import event, run  # noqa: PLC0415
    from imds_guard.watch.line_queue import LineQueue  # noqa: PLC0415
    from imds_guard.watch.options import WatchOptions  # noqa: PLC0415

    require_root("watch")
    queue = LineQueue(sys.stdout.fileno(), event.as_json if as_json else event.as_line, sys.stdout.encoding)
    run.watch(WatchOptions(which.configured(cgroup), allowed, once), queue, notify.ready)
    if queue.error is not None:
        streams.note_error(queue.error)


@cli.command(short_help="Show who was denied, and what would let them through.")
@click.option("--as-config", is_flag=True, help="Print only a configuration (TOML) that lets all of them through.")
@json_option
@cgroup_option
def report(as_config: bool, as_json: bool, cgroup: str | None) -> None:
    """Show who was denied, or would have been in audit mode, and what would let them through."""
    from imds_guard.commands import report as report_command  # noqa: PLC0415
    from imds_guard.present.report import report_lines, report_values  # noqa: PLC0415

    if as_config and as_json:
        raise UsageError("--as-config contradicts --json, which has the configuration, too")
    require_root("report")
    result = report_command.report(which.in_force(cgroup))
    if as_config:
        streams.put(report_command.require_config(result))
    elif as_json:
        print_json(report_values(result))
    else:
        print_lines(report_lines(result))


@cli.command()
@click.option(
    "--textfile",
    metavar="PATH",
    **complete.by(complete.files),
    help="Write them to a file, for node_exporter's textfile collector.",
)
@cgroup_option
def metrics(textfile: str | None, cgroup: str | None) -> None:
    """Print state and counters as Prometheus text."""
    from imds_guard.commands import metrics as metrics_command  # noqa: PLC0415

    if textfile is not None:
        metrics_command.check_textfile_name(textfile)
    require_root("metrics")
    text = metrics_command.metrics(which.in_force(cgroup))
    if textfile is not None:
        metrics_command.write_textfile(text, textfile)
    else:
        streams.put_utf8(text)
