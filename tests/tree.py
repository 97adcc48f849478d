# SPDX-License-Identifier: Apache-2.0
"""All commands of the command line. Each is imported on first use."""

from __future__ import annotations

import click

from imds_guard.cli import cli


def every_command() -> dict[str, click.Command]:
    """All commands by name."""
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}
