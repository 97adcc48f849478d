# SPDX-License-Identifier: Apache-2.0
"""The commands for the service: install-service, uninstall-service, verify."""

from __future__ import annotations

import sys
from typing import Any

import click

from imds_guard import CONFIG_PATH
from imds_guard.cli.group import cli
from imds_guard.cli.options import cgroup_option, config_option, json_option
from imds_guard.cli.output import fail, print_done, print_json, print_lines, print_progress, print_warnings
from imds_guard.cli.status import STATUS_UNKNOWN, exit_status
from imds_guard.commands.capabilities import require_root
from imds_guard.commands.options import GuardOptions
from imds_guard.errors import GuardError, UsageError


@cli.command("install-service", short_help="Lock at every boot what the configuration says.")
@click.option("--watch", is_flag=True, help="Also install the log of denials (imds-guard-watch.service).")
@click.option("--verify", is_flag=True, help="Also check and repair every five minutes, and after others flush rules.")
@click.option("--require-lock", is_flag=True, help="Keep the network down at boot until something is locked.")
@click.option("--filter", is_flag=True, help="Also install the filter (imds-guard-filter.service), and its account.")
@click.option(
    "--textfile",
    metavar="FOLDER",
    type=click.Path(file_okay=False),
    help="Also write metrics there every minute, for node_exporter (imds-guard-metrics.timer).",
)
@click.option("--without-root", is_flag=True, help="Install even if an installed metadata client is shut out.")
@click.option("--now", is_flag=True, help="Also start the units.")
def install_service(**given: Any) -> None:
    """Lock at every boot what /etc/imds-guard/config.toml says, before the network comes up.

    Writes systemd units and enables them. The same call again changes nothing. Units that were enabled before stay
    enabled.
    """
    from imds_guard.commands import service  # noqa: PLC0415

    require_root("install-service")
    done = service.install(service.ServiceOptions(**given), sys.argv[0])
    print_done(done.lines)
    print_warnings(done.warnings)


@cli.command("uninstall-service")
def uninstall_service() -> None:
    """Remove the systemd units. What is locked stays locked until imds-guard stop."""
    from imds_guard.commands import service  # noqa: PLC0415

    require_root("uninstall-service")
    print_done(service.uninstall())


@cli.command(short_help="Check that everything is in place; --repair it.")
@click.option("--repair", is_flag=True, help="Put back what is missing or wrong; at no moment is less locked.")
@click.option("--no-start", is_flag=True, help="With --repair: where nothing is in force, leave it so.")
@config_option
@cgroup_option
@json_option
def verify(repair: bool, no_start: bool, config: str | None, cgroup: str | None, as_json: bool) -> None:
    """Check that hooks, maps and rules are as imds-guard put them, where the configuration says.

    Exit status, after a repair if there was one: 0 active and whole, 1 degraded, 3 not active, 4 could not tell.
    """
    from imds_guard.commands import verify as verify_command  # noqa: PLC0415
    from imds_guard.present.status import verify_lines, verify_values, verify_warnings  # noqa: PLC0415

    require_root("verify")
    path, options = CONFIG_PATH if config is None else config, GuardOptions(cgroup=cgroup, command="verify --repair")
    try:
        found = (
            verify_command.repair(path, options, print_progress, may_start=not no_start)
            if repair
            else verify_command.verify(path, options)
        )
    except UsageError:
        raise
    except GuardError as error:
        fail(error, STATUS_UNKNOWN)
    if not as_json:
        print_lines(verify_lines(found))
        print_warnings(verify_warnings(found))
    elif found.failure is None:
        print_json(verify_values(found))
    if found.failure is not None:
        fail(found.failure, exit_status(found.after), verify_values(found))
    sys.exit(exit_status(found.after))
