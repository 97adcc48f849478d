# SPDX-License-Identifier: Apache-2.0
"""The commands that ask the guard: status, explain."""

from __future__ import annotations

import os
import sys

import click

from imds_guard import identity
from imds_guard.cli import complete
from imds_guard.cli.group import cli
from imds_guard.cli.options import cgroup_option, json_option
from imds_guard.cli.output import fail, print_json, print_lines, print_warnings
from imds_guard.commands import look, which
from imds_guard.commands.capabilities import require_root
from imds_guard.commands.look import Status
from imds_guard.errors import BadPolicy, GuardError, NothingLocked, NotPermitted, UsageError
from imds_guard.policy.endpoint_syntax import doubts_about, parse_endpoint
from imds_guard.present.answers import explanation_lines, explanation_values
from imds_guard.present.status import status_lines, status_values, status_word

STATUS_DENIED = 1
STATUS_ACTIVE, STATUS_DEGRADED, STATUS_INACTIVE, STATUS_UNKNOWN = 0, 1, 3, 4
"""The exit statuses of systemctl status (LSB: 0 running, 3 not running, 4 unknown)."""


@cli.command()
@cgroup_option
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Also show hooks, programs, and every lock.")
def status(cgroup: str | None, as_json: bool, verbose: bool) -> None:
    """Show what the kernel enforces, what the next boot does, and every other guard.

    Exit status: 0 active and whole, 1 degraded, 3 not active, 4 could not tell.
    """
    require_root("status")
    where = which.in_force(cgroup)
    if cgroup is None and where is not None and not os.path.isdir(where):
        where = None  # the configuration names a cgroup that is not there
    try:
        found = look.status(where)
        from imds_guard.commands import surroundings  # noqa: PLC0415 -- start-up time

        seen = surroundings.surroundings(found, where)
    except GuardError as error:
        fail(error, STATUS_UNKNOWN)
    if as_json:
        print_json(status_values(found, seen))
    else:
        print_lines(status_lines(found, seen, verbose))
    sys.exit(exit_status(found))


def exit_status(found: Status) -> int:
    """The exit status for a state."""
    word = status_word(found)
    return {"active": STATUS_ACTIVE, "degraded": STATUS_DEGRADED, "inactive": STATUS_INACTIVE}[word]


@cli.command(short_help="Say how a connect would be judged, and why.")
@click.option("--pid", type=click.IntRange(min=1), metavar="N", help="Ask for a running process.")
@click.option("--user", metavar="U", **complete.by(complete.users), help="Ask for a user as after a fresh login.")
@click.argument("endpoint", **complete.by(complete.locked))
@cgroup_option
@json_option
def explain(pid: int | None, user: str | None, endpoint: str, cgroup: str | None, as_json: bool) -> None:
    """Say whether a connect to ENDPOINT (ADDRESS[:PORT]) would be allowed, and by which rule.

    Exit status: 0 it passes (also in audit mode, or through a filter), 1 denied, 3 nothing is locked, 4 could not tell.
    """
    require_root("explain")
    if (pid is None) == (user is None):
        raise UsageError("name either --pid or --user")
    where = parse_endpoint(endpoint)
    try:
        caller = identity.caller_of_pid(pid) if pid is not None else identity.caller_of_user(str(user))
        found = look.explain(caller, where, which.in_force(cgroup), pid)
    except NothingLocked as error:
        fail(error, STATUS_INACTIVE)
    except (UsageError, BadPolicy, NotPermitted):
        raise
    except GuardError as error:
        fail(error, STATUS_UNKNOWN)
    print_warnings([*([] if user is None else identity.notes_on_digits([user])), *doubts_about([endpoint])])
    if as_json:
        print_json(explanation_values(caller, found))
    else:
        print_lines(explanation_lines(caller, found))
    sys.exit(0 if found.decision.allowed else STATUS_DENIED)
