# SPDX-License-Identifier: Apache-2.0
"""The command that runs the filters."""

from __future__ import annotations

import click

from imds_guard.cli.group import cli
from imds_guard.cli.options import cgroup_option
from imds_guard.cli.output import print_warnings
from imds_guard.commands import which
from imds_guard.commands.capabilities import require_root


@cli.command("filter", short_help="Run the filters; imds-guard-filter.service does.")
@click.option("--reload", "is_reload", is_flag=True, help="Bring the running one in line with the policy in force.")
@cgroup_option
def run_filter(is_reload: bool, cgroup: str | None) -> None:
    """Pass on what the filters of the policy in force allow, until SIGTERM.

    It begins as root, takes its ports, and becomes the user imds-guard-filter.
    """
    from imds_guard.commands import filter_service  # noqa: PLC0415

    require_root("filter")
    where = which.configured(cgroup)
    if is_reload:
        print_warnings(filter_service.reload(where))
    else:
        filter_service.serve(where, print_warnings)
