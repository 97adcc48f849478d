# SPDX-License-Identifier: Apache-2.0
"""The options that describe a policy, read into a Policy."""

from __future__ import annotations

import os
from typing import Any

from imds_guard import CONFIG_PATH
from imds_guard.commands import which
from imds_guard.commands.boot import with_config
from imds_guard.commands.options import GuardOptions
from imds_guard.config.boot_file import warnings_of_file
from imds_guard.config.options import policy_from_options
from imds_guard.config.read import load_config
from imds_guard.errors import UsageError
from imds_guard.identity import is_missing_group, notes_on_digits
from imds_guard.kernel.dmi import dmi_text
from imds_guard.policy.endpoint_syntax import doubts_about
from imds_guard.policy.model import Mode, Policy, Verdict


class PolicyOptions:
    """The policy options of one call, as they were given. Takes them out of ``given``."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.groups: tuple[str, ...] = given.pop("groups")
        self.users: tuple[str, ...] = given.pop("users")
        self.deny_groups: tuple[str, ...] = given.pop("deny_groups")
        self.deny_users: tuple[str, ...] = given.pop("deny_users")
        self.nobody: bool = given.pop("nobody")
        self.ips: tuple[str, ...] = given.pop("ips")
        self.presets: tuple[str, ...] = given.pop("presets")
        self.mode: str | None = given.pop("mode")
        self.containers: str | None = given.pop("containers")
        self.strict: bool = given.pop("strict")
        self.config: str | None = given.pop("config")

    @property
    def describe_policy(self) -> bool:
        """True when an option says who or where: then the configuration file is not read."""
        who = self.groups or self.users or self.deny_groups or self.deny_users or self.nobody
        return bool(who or self.ips or self.presets)

    @property
    def overrides(self) -> bool:
        """True when an option takes the place of a value of the configuration file."""
        return bool(self.mode or self.containers or self.strict)

    @property
    def differ_from_file(self) -> bool:
        """True when the policy is not what the configuration file says."""
        return self.describe_policy or self.overrides

    @property
    def path(self) -> str:
        """The configuration file."""
        return CONFIG_PATH if self.config is None else self.config

    @property
    def has_file(self) -> bool:
        """True when there is a configuration file, or one was named."""
        return self.config is not None or os.path.exists(CONFIG_PATH)

    def require_groups(self) -> None:
        """Raises UsageError for a group that does not exist: a dry run makes none, so its ID is not known."""
        for name in self.groups:
            if is_missing_group(name):
                raise UsageError(f"--dry-run makes no group, and there is no group {name!r} yet: make it first")

    def policy(self, options: GuardOptions, create_groups: bool) -> tuple[Policy, GuardOptions, list[str]]:
        """The policy, the options with the file's values, and warnings. From the file unless options describe one."""
        if not self.describe_policy:
            policy, options, warnings = self._from_file(options)
            return policy, options._replace(cgroup=which.given(options.cgroup)), warnings
        if self.config is not None:
            raise UsageError("--config contradicts options that say who or where: give one or the other")
        policy = policy_from_options(
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
            dmi_text=dmi_text(),
            create_groups=create_groups,
        )
        users, groups = (*self.users, *self.deny_users), (*self.groups, *self.deny_groups)
        cgroup = which.configured(options.cgroup)
        where = [] if options.cgroup is not None or cgroup is None else [_only_there(cgroup)]
        options = options._replace(cgroup=cgroup, presets=self.presets)
        return policy, options, [*where, *notes_on_digits(users, groups), *doubts_about(self.ips)]

    def _from_file(self, options: GuardOptions) -> tuple[Policy, GuardOptions, list[str]]:
        path = self.path
        if not self.has_file:
            raise UsageError(
                f"nothing says who is allowed: name a --group or a --user, or write {path} "
                "(imds-guard start --group canAccessIP --create-group)"
            )
        config = load_config(path)
        policy = config.policy._replace(
            mode=Mode(self.mode) if self.mode else config.policy.mode,
            containers=Verdict(self.containers) if self.containers else config.policy.containers,
            strict=self.strict or config.policy.strict,
        )
        return policy, with_config(options, config), [*config.warnings, *warnings_of_file(path)]


def _only_there(cgroup: str) -> str:
    return (
        f"this is about the processes of {cgroup} alone, since {CONFIG_PATH} says cgroup = ...; to lock the whole "
        "machine, take that line out, or name the root of cgroup2 with --cgroup"
    )
