# SPDX-License-Identifier: Apache-2.0
"""The commands that leave the guard alone: endpoints, demo, export."""

from __future__ import annotations

from typing import Any, Optional

import click

from imds_guard import actions
from imds_guard.actions import Place
from imds_guard.cli.group import cli
from imds_guard.cli.options import (
    Words,
    backend_option,
    cgroup_option,
    json_option,
    policy_options,
)
from imds_guard.cli.output import say, say_json, tell, warn
from imds_guard.errors import BadPolicy, GuardError
from imds_guard.kernel.dmi import dmi_words


@cli.command()
@json_option
def endpoints(as_json: bool) -> None:
    """List the built-in endpoints with their sources."""
    from imds_guard import present  # noqa: PLC0415

    rows = present.endpoint_rows(dmi_words())
    if as_json:
        say_json(rows)
    else:
        say(present.endpoint_lines(rows))


@cli.command(short_help="Show who gets through, in a namespace of its own.")
@backend_option
@json_option
def demo(backend: Optional[str], as_json: bool) -> None:
    """Show who gets through before and after locking, in a network namespace and a cgroup of its own."""
    from imds_guard import demo as stage  # noqa: PLC0415
    from imds_guard import present  # noqa: PLC0415

    actions.require_root("demo")
    tell("making a network namespace with a fake metadata service, and trying to reach it ...")
    result = actions.demo(backend or "auto")
    if as_json:
        say_json(present.demo_values(result))
    else:
        click.echo(stage.render(result.rows))
        click.echo(stage.LEGEND)
    if not result.whole:
        raise GuardError("showing what the lock does: the kernel did not do what the policy says, see AFTER and WHY")


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
def export(form: str, force: bool, cgroup: Optional[str], **given: Any) -> None:
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
