# SPDX-License-Identifier: Apache-2.0
"""The commands that take a whole policy, from options or from the configuration: start, check, export."""

from __future__ import annotations

import sys
from typing import Any

import click

from imds_guard import CONFIG_PATH
from imds_guard.cli.consent import Consent
from imds_guard.cli.group import cli
from imds_guard.cli.options import (
    backend_option,
    cgroup_option,
    dry_run_option,
    json_option,
    keep_existing_option,
    policy_options,
    resolve_option,
    yes_option,
)
from imds_guard.cli.output import print_json, print_lines, print_outcome, print_progress, print_text, print_warnings
from imds_guard.cli.policy_options import PolicyOptions
from imds_guard.commands import boot as boot_command
from imds_guard.commands import guard, look, which
from imds_guard.commands import save as saving
from imds_guard.commands.capabilities import require_root
from imds_guard.commands.options import GuardOptions
from imds_guard.commands.sub_ids import sub_id_warnings
from imds_guard.config.boot_file import BootFile
from imds_guard.errors import BadPolicy, Unsupported, UsageError
from imds_guard.policy.model import Policy


@cli.command(short_help="Lock the metadata endpoints.")
@policy_options
@backend_option
@cgroup_option
@resolve_option
@click.option(
    "--forwarded",
    type=click.Choice(["drop", "leave"]),
    help="Reject forwarded packets to locked endpoints, or leave them (default: reject).",
)
@keep_existing_option
@click.option("--create-group", is_flag=True, help="Create groups that do not exist (system groups).")
@click.option("--save", is_flag=True, help="Also write the policy to the configuration file.")
@click.option("--without-root", is_flag=True, help="Save even if an installed metadata client is shut out.")
@click.option(
    "--boot",
    is_flag=True,
    help="As at boot: the file's policy by its stored IDs, or the emergency lock if the file can't be used.",
)
@dry_run_option
@yes_option
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
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Lock the metadata endpoints for everyone but those named.

    On a running guard this changes the policy, in one step.
    """
    wanted = PolicyOptions(given)
    require_root("start")
    options = GuardOptions(backend or "auto", cgroup, resolve_groups, forwarded, keep_existing)
    path = CONFIG_PATH if wanted.config is None else wanted.config
    if boot:
        if wanted.describe_policy or wanted.overrides or create_group or save or dry_run:
            raise UsageError(
                "--boot takes everything from the configuration: only --config, --backend and the like go with it"
            )
        _start_at_boot(path, options, as_json)
        return
    if dry_run and create_group:
        wanted.require_groups()
    consent = Consent(may_ask=not (as_json or yes or dry_run))
    policy, options, warnings = wanted.policy(options._replace(agree=consent, dry_run=dry_run), create_group)
    if save:
        saving.check_saving(policy, without_root, path)
    consent.ask(lambda: guard.start_alone(policy, options._replace(dry_run=True), print_progress))
    outcome = guard.start_alone(policy, options, print_progress)
    outcome.done.extend(_saved(policy, options, path, save) if save or wanted.differ_from_file else [])
    outcome.warnings.extend([*warnings, *sub_id_warnings(policy)])
    print_outcome(guard.complete(outcome, print_progress), as_json)


def _saved(policy: Policy, options: GuardOptions, path: str, save: bool) -> list[str]:
    """Saves the policy, and says how long it holds."""
    if options.dry_run:
        return [f"would save the policy to {path}"] if save else []
    if not save:
        return [saving.not_saved(path)]
    return [saving.save(policy, options, path)]


def _start_at_boot(path: str, options: GuardOptions, as_json: bool) -> None:
    """Exits with the status of the configuration's error, also where the emergency lock is on now."""
    options = options._replace(command="start --boot", agree=Consent(may_ask=False))
    result = boot_command.start(BootFile(path), options, print_progress)
    if result.outcome is not None:
        print_outcome(result.outcome, as_json, result.error)
    if result.error is not None:
        raise result.error


@cli.command(short_help="Say what this machine can do, and what it can't.")
@policy_options
@backend_option
@cgroup_option
@resolve_option
@json_option
def check(backend: str | None, cgroup: str | None, resolve_groups: bool, as_json: bool, **given: Any) -> None:
    """Say what this machine can do, which backend would be taken, and why not the others. Changes nothing.

    Without options that say who or where, for the policy of the configuration file, if there is one.
    """
    from imds_guard.present.answers import check_lines, check_values  # noqa: PLC0415

    wanted = PolicyOptions(given)
    require_root("check")
    policy, warnings = None, list[str]()
    options = GuardOptions(backend or "auto", cgroup, resolve_groups)
    if wanted.describe_policy or wanted.has_file:
        policy, options, warnings = wanted.policy(options, create_groups=False)
        warnings = [*warnings, *sub_id_warnings(policy)]
    found = look.check(policy, options, None if wanted.describe_policy or policy is None else wanted.path)
    if as_json:
        print_json(check_values(found))
    else:
        print_lines(check_lines(found))
    print_warnings(warnings)
    sys.exit(0 if found.chosen else Unsupported.exit_status)


@cli.command(short_help="Print the policy as rules of another tool.")
@policy_options
@cgroup_option
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["iptables", "nftables", "pf", "ipfw", "windows", "systemd"]),
    help="The other tool.",
)
@click.option("--force", is_flag=True, help="Export even where the other tool lets more callers through.")
def export(form: str, force: bool, cgroup: str | None, **given: Any) -> None:
    """Print a policy as rules of another tool: the policy in force, or the one of the options or of --config."""
    from imds_guard.export import export as export_policy  # noqa: PLC0415 -- start-up time

    wanted = PolicyOptions(given)
    require_root("export")
    if wanted.describe_policy or wanted.config is not None:
        policy, _, _ = wanted.policy(GuardOptions(cgroup=cgroup), create_groups=False)
    else:
        policy = look.active_policy(which.in_force(cgroup))[1]
    exported = export_policy(policy, form)
    if exported.weakenings and not force:
        raise BadPolicy(
            f"exporting to {form}: it would let through what the policy denies ({'; '.join(exported.weakenings)}); "
            "--force prints it all the same"
        )
    print_warnings(exported.weakenings)
    print_text(exported.text)
