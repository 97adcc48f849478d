# SPDX-License-Identifier: Apache-2.0
"""The ``ip-lockdown`` command, in place of the script of that name."""

from __future__ import annotations

import click

from imds_guard import identity
from imds_guard.cli.options import (
    backend_option,
    cgroup_option,
    keep_existing_option,
)
from imds_guard.cli.output import show_outcome, tell
from imds_guard.commands import guard as actions
from imds_guard.commands.guard import Place


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("ip")
@click.argument("users", nargs=-1)
@backend_option
@cgroup_option
@keep_existing_option
def lock_down(ip: str, users: tuple[str, ...], backend: str | None, cgroup: str | None, keep_existing: bool) -> None:
    """Deny IP to everyone but USERS, beside those whom earlier calls let through.

    Locks of other addresses are not touched. The same call again changes nothing.
    """
    actions.require_root("ip-lockdown")
    place = Place(backend or "auto", cgroup, keep_existing=keep_existing)
    show_outcome(actions.lock_down(ip, [identity.user_id(user) for user in users], place, tell), as_json=False)
