# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what they come to."""

from __future__ import annotations

import os
from typing import Any, Callable, List, Optional, Tuple, TypeVar

import click

from imds_guard.actions import Place
from imds_guard.boot import place_of
from imds_guard.config import CONFIG_PATH, load_config, policy_from_words
from imds_guard.errors import UsageError
from imds_guard.kernel.dmi import dmi_words
from imds_guard.policy import Mode, Policy, Verdict

F = TypeVar("F", bound=Callable[..., Any])


def options(*several: Callable[[F], F]) -> Callable[[F], F]:
    """A decorator that adds several options, in the order in which --help has them."""

    def decorate(function: F) -> F:
        for option in reversed(several):
            function = option(function)
        return function

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
cgroup_option = click.option("--cgroup", metavar="PATH", help="Guard this cgroup2 subtree, not the whole machine.")
config_option = click.option("--config", metavar="FILE", help=f"Configuration file (default {CONFIG_PATH}).")
backend_option = click.option(
    "--backend", type=click.Choice(["auto", "ebpf", "iptables"]), help="What enforces (default auto: eBPF if it can)."
)
keep_existing_option = click.option(
    "--keep-existing", is_flag=True, help="Leave connections open that the policy does not allow."
)
resolve_option = click.option(
    "--resolve-groups",
    is_flag=True,
    help="iptables without --suppl-groups: use the user IDs of the groups' present members.",
)

policy_options = options(
    click.option("--group", "groups", multiple=True, metavar="G", help="Allow this group (name or ID; repeatable)."),
    click.option("--user", "users", multiple=True, metavar="U", help="Allow this user (name or ID; repeatable)."),
    click.option(
        "--deny-group", "deny_groups", multiple=True, metavar="G", help="Deny this group, whoever is allowed."
    ),
    click.option("--deny-user", "deny_users", multiple=True, metavar="U", help="Deny this user, whoever is allowed."),
    click.option("--nobody", is_flag=True, help="Allow nobody at all, root included."),
    click.option("--ip", "ips", multiple=True, metavar="ENDPOINT", help="Lock ADDR[/LEN][:PORTS][,tcp|udp|any]."),
    click.option("--preset", "presets", multiple=True, metavar="NAME", help="Lock a built-in set of endpoints."),
    click.option("--mode", type=click.Choice(["enforce", "audit"]), help="audit counts denials and denies nobody."),
    click.option("--containers", type=click.Choice(["deny", "allow"]), help="Containers: denied, or judged by ID."),
    click.option(
        "--strict", is_flag=True, help="Drop packets, too, of sockets that were not let through (eBPF alone)."
    ),
    config_option,
)

change_options = options(
    click.option("--group", "groups", multiple=True, metavar="G", help="This group (name or ID; repeatable)."),
    click.option("--user", "users", multiple=True, metavar="U", help="This user (name or ID; repeatable)."),
    click.option("--ip", "ip", metavar="ENDPOINT", help="Only at this endpoint; its lock is split if it has more."),
    click.option("--save", is_flag=True, help="Write the policy to the configuration file, too."),
    click.option("--without-root", is_flag=True, help="Save even if an installed metadata client is shut out."),
    config_option,
    cgroup_option,
    json_option,
)


class Words:
    """The policy options of one call, as they were given."""

    def __init__(self, given: Any) -> None:
        self.groups: Tuple[str, ...] = given.pop("groups")
        self.users: Tuple[str, ...] = given.pop("users")
        self.deny_groups: Tuple[str, ...] = given.pop("deny_groups")
        self.deny_users: Tuple[str, ...] = given.pop("deny_users")
        self.nobody: bool = given.pop("nobody")
        self.ips: Tuple[str, ...] = given.pop("ips")
        self.presets: Tuple[str, ...] = given.pop("presets")
        self.mode: Optional[str] = given.pop("mode")
        self.containers: Optional[str] = given.pop("containers")
        self.strict: bool = given.pop("strict")
        self.config: Optional[str] = given.pop("config")

    @property
    def describe_policy(self) -> bool:
        """True when the options themselves say who or where."""
        who = self.groups or self.users or self.deny_groups or self.deny_users or self.nobody
        return bool(who or self.ips or self.presets)

    def policy(self, place: Place, create_groups: bool) -> Tuple[Policy, Place, List[str]]:
        """The policy, the place, and warnings: from the options if they describe one, else from the file."""
        if not self.describe_policy:
            return self._from_file(place)
        if self.config is not None:
            raise UsageError("--config contradicts options that say who or where: give one or the other")
        policy = policy_from_words(
            users=self.users,
            groups=self.groups,
            deny_users=self.deny_users,
            deny_groups=self.deny_groups,
            ips=self.ips,
            presets=self.presets,
            nobody=self.nobody,
            mode=Mode(self.mode or "enforce"),
            containers=Verdict(self.containers or "deny"),
            strict=self.strict,
            dmi_words=dmi_words(),
            create_groups=create_groups,
        )
        return policy, place, []

    def _from_file(self, place: Place) -> Tuple[Policy, Place, List[str]]:
        path = CONFIG_PATH if self.config is None else self.config
        if self.config is None and not os.path.exists(path):
            raise UsageError(
                f"nothing says who is allowed: name a --group or a --user, or write {path} "
                "(imds-guard start --group canAccessIP --create-group)"
            )
        config = load_config(path)
        policy = Policy(
            config.policy.locks,
            Mode(self.mode) if self.mode else config.policy.mode,
            Verdict(self.containers) if self.containers else config.policy.containers,
            self.strict or config.policy.strict,
        )
        return policy, place_of(config, place), list(config.warnings)
