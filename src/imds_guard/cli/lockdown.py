# SPDX-License-Identifier: Apache-2.0
"""The ``ip-lockdown`` command, which takes the place of the script of that name."""

from __future__ import annotations

import click

from imds_guard import CONFIG_PATH, identity
from imds_guard.cli import complete
from imds_guard.cli.options import backend_option, cgroup_option, dry_run_option, keep_existing_option
from imds_guard.cli.output import print_outcome, print_progress
from imds_guard.commands import change, which
from imds_guard.commands.capabilities import require_root
from imds_guard.commands.options import GuardOptions
from imds_guard.commands.save import not_saved
from imds_guard.policy.difference import Difference


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("ip", **complete.by(complete.endpoints))
@click.argument("users", nargs=-1, **complete.by(complete.users))
@backend_option
@cgroup_option
@keep_existing_option
@dry_run_option
def ip_lockdown(
    ip: str, users: tuple[str, ...], backend: str | None, cgroup: str | None, keep_existing: bool, dry_run: bool
) -> None:
    """Deny IP to everyone but USERS, beside those whom earlier calls let through.

    Locks of other addresses are not touched. The same call again changes nothing.
    """
    require_root("ip-lockdown")
    options = GuardOptions(
        backend or "auto", which.in_force(cgroup), keep_existing=keep_existing, command="ip-lockdown", dry_run=dry_run
    )
    user_ids = [identity.user_id(user) for user in users]
    outcome = change.ip_lockdown(ip, user_ids, options, print_progress)
    outcome.warnings.extend(identity.notes_on_digits(users))
    if outcome.difference != Difference() and not dry_run:
        outcome.done.append(not_saved(CONFIG_PATH, ""))
    print_outcome(outcome, as_json=False)
