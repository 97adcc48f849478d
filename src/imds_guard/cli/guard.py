# SPDX-License-Identifier: Apache-2.0
"""The commands that change the guard or ask it: start, stop, status, allow, revoke, check, explain."""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable, Optional, Sequence

import click

from imds_guard import actions, identity
from imds_guard import boot as boot_time
from imds_guard.actions import Outcome, Place, Status
from imds_guard.cli.group import cli
from imds_guard.cli.options import (
    Words,
    backend_option,
    cgroup_option,
    change_options,
    json_option,
    keep_existing_option,
    policy_options,
    resolve_option,
)
from imds_guard.cli.output import fail, say, say_json, show_outcome, tell, warn
from imds_guard.config import CONFIG_PATH, parse_endpoint
from imds_guard.errors import GuardError, UsageError
from imds_guard.policy import Endpoint, Identities, Policy

STATUS_ACTIVE, STATUS_DEGRADED, STATUS_INACTIVE, STATUS_UNKNOWN = 0, 1, 3, 4
"""As systemctl status has them (LSB: 0 running, 3 not running, 4 unknown)."""


@cli.command(short_help="Lock the metadata endpoints.")
@policy_options
@backend_option
@cgroup_option
@resolve_option
@click.option("--forwarded", type=click.Choice(["drop", "leave"]), help="Packets that this machine forwards.")
@keep_existing_option
@click.option("--create-group", is_flag=True, help="Make groups that do not exist (system groups).")
@click.option("--save", is_flag=True, help="Write the policy to the configuration file, too.")
@click.option("--without-root", is_flag=True, help="Save even if an installed metadata client is shut out.")
@click.option(
    "--boot",
    is_flag=True,
    help="As the service does at boot: the file's policy by its stored IDs; if it is unusable, the emergency lock.",
)
@json_option
def start(
    backend: Optional[str],
    cgroup: Optional[str],
    resolve_groups: bool,
    forwarded: Optional[str],
    keep_existing: bool,
    create_group: bool,
    save: bool,
    without_root: bool,
    boot: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Lock the metadata endpoints for everyone but those named.

    On a running guard this changes the policy, in one step.
    """
    words = Words(given)
    actions.require_root("start")
    place = Place(backend or "auto", cgroup, resolve_groups, forwarded, keep_existing)
    path = CONFIG_PATH if words.config is None else words.config
    if boot:
        if words.describe_policy or words.mode or words.containers or words.strict or create_group or save:
            raise UsageError(
                "--boot takes everything from the configuration: only --config, --backend and the like go with it"
            )
        _start_at_boot(path, place, as_json)
        return
    policy, place, warnings = words.policy(place, create_group)
    if save:
        actions.check_saving(policy, without_root, path)
    outcome = actions.start(policy, place, tell)
    if save:
        actions.save(policy, place, path)
        outcome.lines.append(f"saved the policy to {path}")
    outcome.warnings.extend(warnings)
    show_outcome(outcome, as_json)


def _start_at_boot(path: str, place: Place, as_json: bool) -> None:
    """Ends with the status of what was wrong with the configuration, also where the emergency lock is on now."""
    booted = boot_time.start(path, place, tell)
    if booted.outcome is not None:
        show_outcome(booted.outcome, as_json)
    if booted.error is not None:
        raise booted.error


@cli.command(short_help="Open the locks; leave nothing in the kernel.")
@click.option(
    "--service",
    metavar="UNIT",
    help="As this unit's ExecStop=: leave the lock alone unless systemd stops the unit for good.",
)
@cgroup_option
def stop(service: Optional[str], cgroup: Optional[str]) -> None:
    """Open the locks and remove everything of ours from the kernel."""
    from imds_guard.service import may_open, repairs_itself  # noqa: PLC0415

    actions.require_root("stop")
    if service is not None and not may_open(service):
        say([f"the lock stays in force: {service} is restarted, or the machine goes down"])
        return
    say(actions.stop(cgroup) or ["imds-guard was not active: nothing to remove"])
    if service is None and cgroup is None and repairs_itself():
        warn(["imds-guard-verify.timer runs and will lock again; systemctl stop imds-guard stops it, too"])


@cli.command()
@cgroup_option
@json_option
def status(cgroup: Optional[str], as_json: bool) -> None:
    """Show what the kernel enforces.

    Exit status: 0 active and whole, 1 degraded, 3 not active, 4 could not tell.
    """
    from imds_guard import present  # noqa: PLC0415

    actions.require_root("status")
    try:
        found = actions.status(cgroup)
    except GuardError as error:
        fail(error, STATUS_UNKNOWN)
    if as_json:
        say_json(present.status_values(found))
    else:
        say(present.status_lines(found))
    sys.exit(status_exit(found))


def status_exit(found: Status) -> int:
    """The exit status that tells the state."""
    from imds_guard import present  # noqa: PLC0415

    word = present.status_word(found)
    return {"active": STATUS_ACTIVE, "degraded": STATUS_DEGRADED, "inactive": STATUS_INACTIVE}[word]


def _who(groups: Sequence[str], users: Sequence[str]) -> Identities:
    if not groups and not users:
        raise UsageError("name a --group or a --user")
    return Identities(frozenset(map(identity.user_id, users)), frozenset(map(identity.group_id, groups)))


def _change(
    change: Callable[[Identities, Optional[Endpoint], Optional[str], Callable[[Policy], None]], Outcome],
    groups: Sequence[str],
    users: Sequence[str],
    ip: Optional[str],
    save: bool,
    without_root: bool,
    config: Optional[str],
    cgroup: Optional[str],
    as_json: bool,
) -> None:
    who, endpoint = _who(groups, users), None if ip is None else parse_endpoint(ip)
    path = CONFIG_PATH if config is None else config

    def accept(policy: Policy) -> None:
        if save:
            actions.check_saving(policy, without_root, path)

    outcome = change(who, endpoint, cgroup, accept)
    if save:
        actions.save(outcome.policy, Place(cgroup=cgroup), path)
        outcome.lines.append(f"saved the policy to {path}")
    else:
        outcome.lines.append("this holds until the next boot; --save keeps it")
    show_outcome(outcome, as_json)


@cli.command(short_help="Let a user or a group through, from now on.")
@change_options
def allow(**given: Any) -> None:
    """Add a user or a group to what is running, in one step."""
    actions.require_root("allow")
    _change(actions.allow, **given)


@cli.command(short_help="Take a user or a group off the list.")
@change_options
@keep_existing_option
def revoke(keep_existing: bool, **given: Any) -> None:
    """Take a user or a group off what is running, in one step."""
    actions.require_root("revoke")
    _change(functools.partial(actions.revoke, keep_existing=keep_existing), **given)


@cli.command(short_help="Say what this machine can do, and what it can't.")
@policy_options
@backend_option
@cgroup_option
@resolve_option
@json_option
def check(backend: Optional[str], cgroup: Optional[str], resolve_groups: bool, as_json: bool, **given: Any) -> None:
    """Say what this machine can do, which backend would be taken, and why not the others. Changes nothing."""
    from imds_guard import present  # noqa: PLC0415

    words = Words(given)
    actions.require_root("check")
    policy = None
    place = Place(backend or "auto", cgroup, resolve_groups)
    if words.describe_policy or words.config is not None:
        policy, place, _ = words.policy(place, create_groups=False)
    found = actions.check(policy, place)
    if as_json:
        say_json(present.checked_values(found))
    else:
        say(present.checked_lines(found))
    sys.exit(0 if found.taken else actions.UNSUPPORTED)


@cli.command(short_help="Say how a connect would be judged, and why.")
@click.option("--pid", type=click.IntRange(min=1), metavar="N", help="Ask for a running process.")
@click.option("--user", metavar="U", help="Ask for a user as after a fresh login.")
@click.argument("endpoint")
@cgroup_option
@json_option
def explain(pid: Optional[int], user: Optional[str], endpoint: str, cgroup: Optional[str], as_json: bool) -> None:
    """Say whether a connect to ENDPOINT (ADDRESS[:PORT]) would be allowed, and by which rule."""
    from imds_guard import present  # noqa: PLC0415

    actions.require_root("explain")
    if (pid is None) == (user is None):
        raise UsageError("name either --pid or --user")
    caller = identity.caller_of_pid(pid) if pid is not None else identity.caller_of_user(str(user))
    decision, destination = actions.explain(caller, parse_endpoint(endpoint), cgroup)
    if as_json:
        say_json(present.decision_values(caller, destination, decision))
    else:
        say(present.decision_lines(caller, destination, decision))
