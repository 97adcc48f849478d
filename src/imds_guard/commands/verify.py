# SPDX-License-Identifier: Apache-2.0
"""``verify``: is everything that should be in force in force, and how it is put back where it is not."""

from __future__ import annotations

import os
from typing import NamedTuple

from imds_guard.backends import choose
from imds_guard.commands import boot, guard, look
from imds_guard.commands.look import Status
from imds_guard.commands.options import GuardOptions, Progress
from imds_guard.config.read import Config, load_config, top_level_string
from imds_guard.errors import BadPolicy, GuardError
from imds_guard.policy.emergency import EMERGENCY_FAULT


class VerifyResult(NamedTuple):
    """The state that was found, and the state after the repair, if there was one."""

    before: Status
    after: Status
    repaired: list[str]
    """A line for each fault that is gone: what was wrong, and what was done."""
    warnings: list[str]
    failure: GuardError | None = None
    """Why nothing could be done."""


def verify(path: str, options: GuardOptions) -> VerifyResult:
    """Reads the state and changes nothing. ``options`` win over the configuration ``path``."""
    found = look.status(_with_config(path, options).cgroup)
    return VerifyResult(found, found, [], [])


def repair(path: str, options: GuardOptions, progress: Progress) -> VerifyResult:
    """Reads the state and puts back what is wrong, without a moment in which less is locked.

    What is put back is the policy in force. Where that can't be read, or someone else changed it, it is the
    configuration's policy. Where the configuration can't be used, it is the emergency lock, since nobody can tell
    which policy was meant. Where nothing is in force and there is a configuration, it starts as at boot.
    """
    where = _with_config(path, options)
    with guard.one_at_a_time(where.cgroup):
        before = look.status(where.cgroup)
        if not _needs_repair(before, path):
            return VerifyResult(before, before, [], [])
        found, repaired = _without_orphans(before, where.cgroup)
        if not _needs_repair(found, path):
            return VerifyResult(before, found, repaired, [])
        try:
            done, warnings = _put_back(found, path, where, progress)
        except GuardError as error:
            return VerifyResult(before, look.status(where.cgroup), repaired, [], error)
        after = look.status(where.cgroup)
    faults = found.faults or ["nothing was in force"]
    repaired += [f"{fault}: {done}" for fault in faults if fault not in after.faults]
    return VerifyResult(before, after, repaired, warnings)


def _without_orphans(before: Status, cgroup: str | None) -> tuple[Status, list[str]]:
    """The state when the pins of guards whose cgroup is gone were removed, and a line for each of these faults."""
    if not before.faults or not guard.remove_orphans().done:
        return before, []
    after = look.status(cgroup)
    return after, [f"{fault}: the pins were removed" for fault in before.faults if fault not in after.faults]


def _needs_repair(found: Status, path: str) -> bool:
    return bool(found.faults) or (found.backend is None and os.path.exists(path))


Repair = tuple[str, list[str]]
"""What was done, as the end of a sentence, and warnings."""


def _put_back(before: Status, path: str, options: GuardOptions, progress: Progress) -> Repair:
    if before.backend is None or before.emergency:
        result = boot.start(path, options, progress, guard.start_locked)
        if result.error is None:
            return "the configuration's policy was put in force", []
        if result.outcome is not None:
            return "the emergency lock was put on", [str(result.error)]
        if before.backend is None or before.faults == [EMERGENCY_FAULT]:
            raise result.error
    policy = choose.running(options.cgroup)[str(before.backend)].unaltered()
    if policy is not None:
        asked = look.forwarded().option() if options.cgroup is None else None
        same = options._replace(backend=str(before.backend), forwarded=asked)
        outcome = guard.start_locked(policy, same, progress)
        return _with_details("the policy in force was put back", outcome.done_in_short), []
    return _replace_unreadable(path, options, progress)


def _replace_unreadable(path: str, options: GuardOptions, progress: Progress) -> Repair:
    """The policy in force can't be read, or someone else changed it: the configuration says what was meant."""
    config = _usable(path)
    if config is not None:
        outcome = boot.put_in_force(config.policy, options, progress, guard.start_locked)
        return _with_details("the configuration's policy took its place", outcome.done_in_short), list(config.warnings)
    if top_level_string(path, "on_error") == "open":
        raise BadPolicy(f'{path} can\'t be used, and says on_error = "open": what is left in force stays as it is')
    boot.put_emergency_lock_on(options, progress, guard.start_locked)
    return "the emergency lock took its place", [f"there is no usable configuration {path} that says what was meant"]


def _with_details(sentence: str, details: list[str]) -> str:
    return f"{sentence} ({'; '.join(details)})" if details else sentence


def _with_config(path: str, options: GuardOptions) -> GuardOptions:
    config = _usable(path)
    return boot.with_config(options, config) if config is not None else options


def _usable(path: str) -> Config | None:
    try:
        return load_config(path, use_stored_ids=True) if os.path.exists(path) else None
    except GuardError:
        return None
