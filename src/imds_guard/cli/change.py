# SPDX-License-Identifier: Apache-2.0
"""The commands that change the guard that runs: stop, allow, revoke."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Callable

import click

from imds_guard import CONFIG_PATH, identity
from imds_guard.cli.group import cli
from imds_guard.cli.options import cgroup_option, change_options, keep_existing_option
from imds_guard.cli.output import print_done, print_outcome, print_progress, print_warnings
from imds_guard.commands import guard
from imds_guard.commands.capabilities import require_root
from imds_guard.commands.guard import Accept
from imds_guard.commands.options import GuardOptions
from imds_guard.commands.outcome import Outcome
from imds_guard.errors import UsageError
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.model import Endpoint, Identities, Policy


@cli.command(short_help="Open the locks and leave nothing in the kernel.")
@click.option(
    "--service",
    metavar="UNIT",
    help="As this unit's ExecStop=: leave the lock alone unless systemd stops the unit for good.",
)
@click.option("--all", "everywhere", is_flag=True, help="Also open the locks of all cgroups.")
@cgroup_option
def stop(service: str | None, everywhere: bool, cgroup: str | None) -> None:
    """Open the locks and remove everything of imds-guard from the kernel."""
    from imds_guard.commands.service import may_unlock, repairs_itself  # noqa: PLC0415

    require_root("stop")
    if everywhere and (service is not None or cgroup is not None):
        raise UsageError("--all is about every guard: neither --cgroup nor --service goes with it")
    if service is not None and not may_unlock(service):
        print_done([f"the lock stays in force: {service} is restarted, or the machine goes down"])
        return
    done = guard.stop_all() if everywhere else guard.stop(cgroup)
    print_done(done or ["imds-guard was not active: nothing to remove"])
    if service is None and cgroup is None and repairs_itself():
        print_warnings(["imds-guard-verify.timer runs and will lock again; systemctl stop imds-guard stops it, too"])


def _identities(groups: Sequence[str], users: Sequence[str]) -> Identities:
    if not groups and not users:
        raise UsageError("name a --group or a --user")
    return Identities(frozenset(map(identity.user_id, users)), frozenset(map(identity.group_id, groups)))


def _change(
    change: Callable[[Identities, Endpoint | None, str | None, Accept], Outcome],
    groups: Sequence[str],
    users: Sequence[str],
    ip: str | None,
    save: bool,
    without_root: bool,
    config: str | None,
    cgroup: str | None,
    as_json: bool,
) -> None:
    from imds_guard.commands import save as saving  # noqa: PLC0415 -- start-up time

    who, endpoint = _identities(groups, users), None if ip is None else parse_endpoint(ip)
    path = CONFIG_PATH if config is None else config

    def accept(policy: Policy) -> None:
        if save:
            saving.check_saving(policy, without_root, path)

    outcome = change(who, endpoint, cgroup, accept)
    outcome.warnings.extend(identity.notes_on_digits(users, groups))
    if save:
        saving.save(outcome.policy, GuardOptions(cgroup=cgroup), path)
        outcome.done.append(f"saved the policy to {path}")
    else:
        outcome.done.append("this holds until the next boot; --save keeps it")
    print_outcome(guard.complete(outcome, print_progress), as_json)


@cli.command(short_help="Let a user or a group through, from now on.")
@change_options
def allow(**given: Any) -> None:
    """Add a user or a group to the policy in force, in one step."""
    require_root("allow")
    _change(guard.allow, **given)


@cli.command(short_help="Take a user or a group off the list.")
@change_options
@keep_existing_option
def revoke(keep_existing: bool, **given: Any) -> None:
    """Take a user or a group off the policy in force, in one step."""
    require_root("revoke")
    _change(functools.partial(guard.revoke, keep_existing=keep_existing), **given)
