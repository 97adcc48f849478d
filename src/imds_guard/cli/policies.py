# SPDX-License-Identifier: Apache-2.0
"""The commands that are given a whole policy, by options or by the configuration: start, check, export."""

from __future__ import annotations

import sys
from typing import Any

import click

from imds_guard import CONFIG_PATH
from imds_guard.cli.given import Words
from imds_guard.cli.group import cli
from imds_guard.cli.options import (
    backend_option,
    cgroup_option,
    json_option,
    keep_existing_option,
    policy_options,
    resolve_option,
)
from imds_guard.cli.output import say, say_json, show_outcome, tell, warn
from imds_guard.commands import boot as boot_time
from imds_guard.commands import guard as actions
from imds_guard.commands.guard import Place
from imds_guard.errors import BadPolicy, UsageError


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
    backend: str | None,
    cgroup: str | None,
    resolve_groups: bool,
    forwarded: str | None,
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


@cli.command(short_help="Say what this machine can do, and what it can't.")
@policy_options
@backend_option
@cgroup_option
@resolve_option
@json_option
def check(backend: str | None, cgroup: str | None, resolve_groups: bool, as_json: bool, **given: Any) -> None:
    """Say what this machine can do, which backend would be taken, and why not the others. Changes nothing."""
    from imds_guard.present import text as present  # noqa: PLC0415

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


@cli.command(short_help="Print the policy in another tool's words.")
@policy_options
@cgroup_option
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["iptables", "nftables", "pf", "ipfw", "windows", "systemd"]),
    help="Whose words.",
)
@click.option("--force", is_flag=True, help="Export even what that format can only say more weakly.")
def export(form: str, force: bool, cgroup: str | None, **given: Any) -> None:
    """Print the policy in another tool's words: the one in force, unless options or --config name another."""
    words = Words(given)
    actions.require_root("export")
    if words.describe_policy or words.config is not None:
        policy, _, _ = words.policy(Place(cgroup=cgroup), create_groups=False)
    else:
        policy = actions.the_running(cgroup)[1]
    exported = actions.export(policy, form)
    if exported.weakenings and not force:
        raise BadPolicy(
            f"exporting to {form}: it would let through what the policy denies ({'; '.join(exported.weakenings)}); "
            "--force prints it all the same"
        )
    warn(exported.weakenings)
    click.echo(exported.text, nl=False)
