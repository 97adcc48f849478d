# SPDX-License-Identifier: Apache-2.0
"""The commands of the command line, each of which is imported when it is asked for."""

from __future__ import annotations

import click

from imds_guard.cli import cli


def every_command() -> dict[str, click.Command]:
    """Every command by its name."""
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}
