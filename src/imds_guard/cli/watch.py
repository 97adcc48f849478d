# SPDX-License-Identifier: Apache-2.0
"""The commands that tell of denials: watch, report, metrics."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from imds_guard.cli.group import cli
from imds_guard.cli.options import cgroup_option, json_option
from imds_guard.cli.output import say, say_json, warn
from imds_guard.commands import guard as actions

if TYPE_CHECKING:
    from imds_guard.commands.report import Reported


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

    actions.require_root("watch")
    outlet = Outlet(sys.stdout.fileno(), events.as_json if as_json else events.as_line)
    watching.watch(Wish(cgroup, allowed, once), outlet, notify.ready)


@cli.command(short_help="Show who was denied, and what would let them in.")
@json_option
@cgroup_option
def report(as_json: bool, cgroup: str | None) -> None:
    """Show who was denied, or would have been in audit mode, and what would let them through."""
    from imds_guard.commands import report as reporting  # noqa: PLC0415

    actions.require_root("report")
    found = reporting.report(cgroup)
    if as_json:
        say_json(reporting.values(found))
        return
    say(reporting.title(found))
    if not found.report.rows:
        say(["", "nobody yet"])
    elif not _show_table(found):
        say(["", *reporting.plain(reporting.cells(found))])
    say(reporting.after(found))


def _show_table(found: Reported) -> bool:
    """With rich, on a terminal that wants colour; False where the table is to be plain."""
    from imds_guard.commands import report as reporting  # noqa: PLC0415

    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        from rich import box  # noqa: PLC0415 -- start-up time: only this table needs it
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415
    except ImportError:
        warn(["the table is plain, since the Python library rich is missing: install python3-rich"])
        return False
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for word in reporting.HEAD:
        table.add_column(word, overflow="fold")
    for cells in reporting.cells(found):
        table.add_row(*(Text.assemble((one, "bold"), "\n", (other, "dim")) for one, other in cells))
    Console(highlight=False).print(table)
    return True


@cli.command()
@click.option("--textfile", metavar="PATH", help="Write them to a file, for node_exporter.")
@cgroup_option
def metrics(textfile: str | None, cgroup: str | None) -> None:
    """Print state and counters as Prometheus text."""
    from imds_guard.commands import metrics as exposition  # noqa: PLC0415

    actions.require_root("metrics")
    text = exposition.metrics(cgroup)
    if textfile is not None:
        exposition.write_textfile(text, textfile)
    else:
        click.echo(text.decode(), nl=False)
