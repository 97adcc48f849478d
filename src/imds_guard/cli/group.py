# SPDX-License-Identifier: Apache-2.0
"""The command that the others are part of."""

from __future__ import annotations

import click

from imds_guard import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, no_args_is_help=False)
@click.version_option(__version__, prog_name="imds-guard")
def cli() -> None:
    """Only the right users and groups reach the instance metadata service."""
