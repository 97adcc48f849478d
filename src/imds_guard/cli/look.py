# SPDX-License-Identifier: Apache-2.0
"""The commands that leave the guard alone: endpoints, demo."""

from __future__ import annotations

import click

from imds_guard.cli.group import cli
from imds_guard.cli.options import backend_option, json_option
from imds_guard.cli.output import say, say_json, tell
from imds_guard.commands import guard as actions
from imds_guard.errors import GuardError
from imds_guard.kernel.dmi import dmi_words


@cli.command()
@json_option
def endpoints(as_json: bool) -> None:
    """List the built-in endpoints with their sources."""
    from imds_guard.present import text as present  # noqa: PLC0415

    rows = present.endpoint_rows(dmi_words())
    if as_json:
        say_json(rows)
    else:
        say(present.endpoint_lines(rows))


@cli.command(short_help="Show who gets through, in a namespace of its own.")
@backend_option
@json_option
def demo(backend: str | None, as_json: bool) -> None:
    """Show who gets through before and after locking, in a network namespace and a cgroup of its own."""
    from imds_guard.commands import demo as stage  # noqa: PLC0415
    from imds_guard.present import text as present  # noqa: PLC0415

    actions.require_root("demo")
    tell("making a network namespace with a fake metadata service, and trying to reach it ...")
    result = actions.demo(backend or "auto")
    if as_json:
        say_json(present.demo_values(result))
    else:
        click.echo(stage.render(result.rows))
        click.echo(stage.LEGEND)
    if not result.whole:
        raise GuardError("showing what the lock does: the kernel did not do what the policy says, see AFTER and WHY")
