# SPDX-License-Identifier: Apache-2.0
"""What status shows beside the guard that it is about: all guards, the boot state, and the configuration file."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from imds_guard import CONFIG_PATH
from imds_guard.commands import all_guards, temporary, turn, which
from imds_guard.commands.all_guards import GuardFound
from imds_guard.commands.look import Status
from imds_guard.config.boot_file import BootFile
from imds_guard.config.read import Config
from imds_guard.errors import GuardError
from imds_guard.kernel import files, systemd
from imds_guard.policy.edit import without_ipv6
from imds_guard.policy.model import Policy

_PLACE = re.compile(r"(/[^\n]*?):([0-9]+): ")
"""The beginning of an error that is about a line of a file."""


class WrongLine(NamedTuple):
    """The line of a configuration file that an error is about."""

    file: str
    number: int
    text: str


class ConfigFile(NamedTuple):
    """The configuration beside what is in force."""

    path: str
    exists: bool = False
    error: str | None = None
    """Why boot could not use it."""
    line: WrongLine | None = None
    """Where ``error`` is, if it is about a line."""
    is_in_force: bool | None = None
    """Whether the policy in force is that of the file; None where that is not known without a name service."""


class Surroundings(NamedTuple):
    """Of the guard at ``cgroup``, or of the machine's."""

    cgroup: str | None
    guards: tuple[GuardFound, ...]
    unit: str | None
    """``enabled``, ``disabled``, ``not-found`` and others of systemctl(1); None where systemd is not the init."""
    file: ConfigFile
    since: float | None
    """When a command changed the policy last, in seconds since the epoch."""

    @property
    def others(self) -> list[GuardFound]:
        """The guards beside the one that status is about."""
        return [one for one in self.guards if not self._is_subject(one)]

    def _is_subject(self, one: GuardFound) -> bool:
        if self.cgroup is None or one.cgroup is None:
            return self.cgroup is None and one.cgroup_id is None
        return one.cgroup_id == _inode(self.cgroup)


def surroundings(found: Status, cgroup: str | None, path: str | None = None) -> Surroundings:
    """Reads them. What can't be read is part of the answer: nothing is raised."""
    since = turn.changed_at(turn.lock_name(cgroup)) if found.backend is not None else None
    config = config_file(found, cgroup, CONFIG_PATH if path is None else path)
    return Surroundings(cgroup, tuple(all_guards.found()), _unit(), config, since)


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _unit() -> str | None:
    if not systemd.is_booted():
        return None
    from imds_guard.commands.service import MAIN  # noqa: PLC0415 -- start-up time

    try:
        return systemd.enablement(MAIN)
    except GuardError:
        return "unknown"


# --- the file -------------------------------------------------------------------------------------------------------


def config_file(found: Status, cgroup: str | None, path: str) -> ConfigFile:
    """Reads the file as boot does, but asks no name service: status waits for nobody."""
    if not os.path.exists(path):
        return ConfigFile(path)
    file = BootFile(path)
    try:
        config = file.load()
    except GuardError as error:
        return ConfigFile(path, True, str(error), wrong_line(str(error)))
    changed = file.changed_names()
    if changed is not None:
        return ConfigFile(path, True, str(changed), wrong_line(str(changed)))
    if config.cgroup is not None and not os.path.isdir(config.cgroup):
        return ConfigFile(path, True, f"{path}: cgroup = {config.cgroup!r}: there is no such directory")
    return ConfigFile(path, True, is_in_force=None if file.has_questions else _is_in_force(config, found, cgroup))


def _is_in_force(config: Config, found: Status, cgroup: str | None) -> bool:
    if found.policy is None or not _is_same_place(which.given(config.cgroup), cgroup):
        return False
    return _lasting(found.policy, found) in (config.policy, without_ipv6(config.policy))


def _lasting(policy: Policy, found: Status) -> Policy:
    """Without what allow --for has allowed."""
    return temporary.without(policy, found.temporary) if found.temporary else policy


def _is_same_place(one: str | None, other: str | None) -> bool:
    return one == other if one is None or other is None else _inode(one) == _inode(other)


def wrong_line(error: str) -> WrongLine | None:
    """The line that an error with a place is about, without its end."""
    place = _PLACE.match(error)
    if place is None:
        return None
    number = int(place[2])
    try:
        lines = files.read_regular(place[1]).decode("utf-8-sig", "replace").splitlines()
    except OSError:
        return None
    return WrongLine(place[1], number, lines[number - 1]) if 1 <= number <= len(lines) else None
