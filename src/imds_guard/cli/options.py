# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

from __future__ import annotations

from typing import Any, Callable, TypeVar

import click

from imds_guard import CONFIG_PATH
from imds_guard.cli import complete

F = TypeVar("F", bound=Callable[..., Any])


def options(*several: Callable[[F], F]) -> Callable[[F], F]:
    """A decorator that adds several options, in the order of --help."""

    def decorate(function: F) -> F:
        for option in reversed(several):
            function = option(function)
        return function

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
cgroup_option = click.option(
    "--cgroup",
    metavar="PATH",
    **complete.by(complete.cgroups),
    help="Guard this cgroup2 subtree, not the whole machine.",
)
config_option = click.option(
    "--config", metavar="FILE", **complete.by(complete.files), help=f"Configuration file (default {CONFIG_PATH})."
)
backend_option = click.option(
    "--backend", type=click.Choice(["auto", "ebpf", "iptables"]), help="What enforces (default auto: eBPF if it can)."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would change, and change nothing.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask before a change that locks less than now.")
keep_existing_option = click.option(
    "--keep-existing", is_flag=True, help="Leave open connections that the policy does not allow."
)
resolve_option = click.option(
    "--resolve-groups",
    is_flag=True,
    help="iptables without --suppl-groups: use the user IDs of the groups' members, as they are now.",
)

policy_options = options(
    click.option(
        "--group",
        "groups",
        multiple=True,
        metavar="G",
        **complete.by(complete.groups),
        help="Allow this group (name or ID; repeatable).",
    ),
    click.option(
        "--user",
        "users",
        multiple=True,
        metavar="U",
        **complete.by(complete.users),
        help="Allow this user (name or ID; repeatable).",
    ),
    click.option(
        "--deny-group",
        "deny_groups",
        multiple=True,
        metavar="G",
        **complete.by(complete.groups),
        help="Deny this group, whoever is allowed.",
    ),
    click.option(
        "--deny-user",
        "deny_users",
        multiple=True,
        metavar="U",
        **complete.by(complete.users),
        help="Deny this user, whoever is allowed.",
    ),
    click.option("--nobody", is_flag=True, help="Allow nobody at all, root included."),
    click.option(
        "--ip",
        "ips",
        multiple=True,
        metavar="ENDPOINT",
        **complete.by(complete.endpoints),
        help="Lock ADDR[/LEN][:PORTS][,tcp|udp|any].",
    ),
    click.option(
        "--preset",
        "presets",
        multiple=True,
        metavar="NAME",
        **complete.by(complete.presets),
        help="Lock a built-in set of endpoints.",
    ),
    click.option("--mode", type=click.Choice(["enforce", "audit"]), help="audit: count denials, deny nobody."),
    click.option(
        "--containers", type=click.Choice(["deny", "allow"]), help="Deny containers, or judge them by their IDs."
    ),
    click.option("--strict", is_flag=True, help="Also drop packets of sockets that were not let through (eBPF only)."),
    config_option,
)

save_options = options(
    click.option("--save", is_flag=True, help="Also write the policy to the configuration file."),
    click.option("--without-root", is_flag=True, help="Save even if an installed metadata client is shut out."),
    config_option,
    cgroup_option,
    dry_run_option,
    json_option,
)

change_options = options(
    click.option(
        "--group",
        "groups",
        multiple=True,
        metavar="G",
        **complete.by(complete.groups),
        help="This group (name or ID; repeatable).",
    ),
    click.option(
        "--user",
        "users",
        multiple=True,
        metavar="U",
        **complete.by(complete.users),
        help="This user (name or ID; repeatable).",
    ),
    click.option(
        "--ip",
        "ip",
        metavar="ENDPOINT",
        **complete.by(complete.locked),
        help="Only at this endpoint. A lock with more endpoints is split.",
    ),
    save_options,
)
