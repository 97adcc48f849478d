# SPDX-License-Identifier: Apache-2.0
"""The commands about denials: watch, report, metrics."""

from __future__ import annotations

import sys

import click

from imds_guard.cli.group import cli
from imds_guard.cli.options import cgroup_option, json_option
from imds_guard.cli.output import print_json, print_lines
from imds_guard.commands.capabilities import require_root


@cli.command(short_help="Tell of denials as they happen.")
@json_option
@click.option("--all", "allowed", is_flag=True, help="Tell of connects that are let through, too.")
@click.option("--once", is_flag=True, help="Tell what is there now, and end.")
@cgroup_option
def watch(as_json: bool, allowed: bool, once: bool, cgroup: str | None) -> None:
    """Tell of denials as they happen, a line each, until it is interrupted.

    Several may run: one reads, the others follow it. Connects that are alike become one line and a count.
    """
    from imds_guard.kernel import notify  # noqa: PLC0415
    from imds_guard.watch import event as events  # noqa: PLC0415
    from imds_guard.watch import run as watching  # noqa: PLC0415
    from imds_guard.watch.leader import Wish  # noqa: PLC0415
    from imds_guard.watch.output import Outlet  # noqa: PLC0415

    require_root("watch")
    outlet = Outlet(sys.stdout.fileno(), events.as_json if as_json else events.as_line)
    watching.watch(Wish(cgroup, allowed, once), outlet, notify.ready)


@cli.command(short_help="Show who was denied, and what would let them in.")
@json_option
@cgroup_option
def report(as_json: bool, cgroup: str | None) -> None:
    """Show who was denied, or would have been in audit mode, and what would let them through."""
    from imds_guard.commands import report as reporting  # noqa: PLC0415

    require_root("report")
    found = reporting.report(cgroup)
    if as_json:
        print_json(reporting.values(found))
    else:
        print_lines(reporting.lines(found))


@cli.command()
@click.option("--textfile", metavar="PATH", help="Write them to a file, for node_exporter.")
@cgroup_option
def metrics(textfile: str | None, cgroup: str | None) -> None:
    """Print state and counters as Prometheus text."""
    from imds_guard.commands import metrics as exposition  # noqa: PLC0415

    require_root("metrics")
    text = exposition.metrics(cgroup)
    if textfile is not None:
        exposition.write_textfile(text, textfile)
    else:
        click.echo(text.decode(), nl=False)
