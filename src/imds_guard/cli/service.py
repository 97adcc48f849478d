# SPDX-License-Identifier: Apache-2.0
"""The commands for years of running: install-service, uninstall-service, verify."""

from __future__ import annotations

import sys
from typing import Any

import click

from imds_guard import CONFIG_PATH
from imds_guard.cli.ask import STATUS_UNKNOWN, status_exit
from imds_guard.cli.group import cli
from imds_guard.cli.options import cgroup_option, config_option, json_option
from imds_guard.cli.output import fail, say, say_json, tell, warn
from imds_guard.commands import guard as actions
from imds_guard.commands.guard import Place
from imds_guard.errors import GuardError, UsageError


@cli.command("install-service", short_help="Lock at every boot what the configuration says.")
@click.option("--watch", is_flag=True, help="Also the log of denials (imds-guard-watch.service).")
@click.option("--verify", is_flag=True, help="Also a check and repair every five minutes (imds-guard-verify.timer).")
@click.option("--require-lock", is_flag=True, help="Keep the network down at boot while nothing could be locked.")
@click.option("--without-root", is_flag=True, help="Install even if an installed metadata client is shut out.")
@click.option("--now", is_flag=True, help="Start the units, too.")
def install_service(**given: Any) -> None:
    """Lock at every boot what /etc/imds-guard/config.toml says, before the network comes up.

    Writes systemd units and switches them on. The same call again changes nothing; units that were switched on before
    stay so.
    """
    from imds_guard.commands import service  # noqa: PLC0415

    actions.require_root("install-service")
    done = service.install(service.Wishes(**given), sys.argv[0])
    say(done.lines)
    warn(done.warnings)


@cli.command("uninstall-service")
def uninstall_service() -> None:
    """Take the systemd units away again. What is locked stays locked until imds-guard stop."""
    from imds_guard.commands import service  # noqa: PLC0415

    actions.require_root("uninstall-service")
    say(service.uninstall())


@cli.command(short_help="Check that all is as it was put; --repair it.")
@click.option("--repair", is_flag=True, help="Put back what is wrong, with no moment in which less is locked.")
@config_option
@cgroup_option
@json_option
def verify(repair: bool, config: str | None, cgroup: str | None, as_json: bool) -> None:
    """Check that hooks, maps and rules are as they were put in place, where the configuration says.

    Exit status, after a repair if there was one: 0 active and whole, 1 degraded, 3 not active, 4 could not tell.
    """
    from imds_guard.commands import verify as verifying  # noqa: PLC0415
    from imds_guard.present import text as present  # noqa: PLC0415

    actions.require_root("verify")
    path, place = CONFIG_PATH if config is None else config, Place(cgroup=cgroup)
    try:
        found = verifying.repair(path, place, tell) if repair else verifying.verify(path, place)
    except UsageError:
        raise
    except GuardError as error:
        fail(error, STATUS_UNKNOWN)
    if as_json:
        say_json(present.verified_values(found))
    else:
        say(present.verified_lines(found))
        warn(found.notes)
    if found.failure is not None:
        fail(found.failure, status_exit(found.after))
    sys.exit(status_exit(found.after))
