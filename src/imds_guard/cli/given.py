# SPDX-License-Identifier: Apache-2.0
"""What the options that describe a policy come to."""

from __future__ import annotations

import os
from typing import Any

from imds_guard import CONFIG_PATH
from imds_guard.commands.boot import place_of
from imds_guard.commands.guard import Place
from imds_guard.config.store import load_config, policy_from_words
from imds_guard.errors import UsageError
from imds_guard.kernel.dmi import dmi_words
from imds_guard.policy.model import Mode, Policy, Verdict


class Words:
    """The policy options of one call, as they were given."""

    def __init__(self, given: Any) -> None:
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
        """True when the options themselves say who or where."""
        who = self.groups or self.users or self.deny_groups or self.deny_users or self.nobody
        return bool(who or self.ips or self.presets)

    def policy(self, place: Place, create_groups: bool) -> tuple[Policy, Place, list[str]]:
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

    def _from_file(self, place: Place) -> tuple[Policy, Place, list[str]]:
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
