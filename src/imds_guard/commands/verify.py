# SPDX-License-Identifier: Apache-2.0
"""Whether what should be in force is, and how it is put back where it is not."""

from __future__ import annotations

import os
from typing import NamedTuple

from imds_guard.backends import choose
from imds_guard.commands import boot
from imds_guard.commands import guard as actions
from imds_guard.commands.guard import Place, Status, Tell
from imds_guard.config.store import Config, load_config, word_at_top
from imds_guard.errors import BadPolicy, GuardError
from imds_guard.policy.emergency import FAULT as EMERGENCY_FAULT


class Checked(NamedTuple):
    """What was found, and what is so after the repair, if there was one.

    ``repaired`` has a line for each fault that is gone: what was wrong, and what was done. ``failure`` is why nothing
    could be done.
    """

    before: Status
    after: Status
    repaired: list[str]
    notes: list[str]
    failure: GuardError | None = None


def verify(path: str, place: Place) -> Checked:
    """Looks, and changes nothing. The configuration says where, unless ``place`` does."""
    found = actions.status(_place(path, place).cgroup)
    return Checked(found, found, [], [])


def repair(path: str, place: Place, tell: Tell) -> Checked:
    """Looks, and puts back what is wrong, without a moment in which less is locked.

    What is put back is the policy in force. Where it can't be read, or someone else changed it, it is the
    configuration's; where that is unusable, the emergency lock, since nobody can tell what was meant. Nothing in force:
    as at boot, if there is a configuration.
    """
    where = _place(path, place)
    with actions.one_at_a_time(where.cgroup):
        before = actions.status(where.cgroup)
        if not _wants_repair(before, path):
            return Checked(before, before, [], [])
        try:
            done, notes = _put_back(before, path, where, tell)
        except GuardError as error:
            return Checked(before, actions.status(where.cgroup), [], [], error)
        after = actions.status(where.cgroup)
    wrong = before.faults or ["nothing was in force"]
    return Checked(before, after, [f"{fault}: {done}" for fault in wrong if fault not in after.faults], notes)


def _wants_repair(found: Status, path: str) -> bool:
    return bool(found.faults) or (found.backend is None and os.path.exists(path))


Done = tuple[str, list[str]]
"""What was done, as the end of a sentence, and what to look at."""


def _put_back(before: Status, path: str, where: Place, tell: Tell) -> Done:
    if before.backend is None or before.emergency:
        booted = boot.start(path, where, tell, actions.start_now)
        if booted.error is None:
            return "the configuration's policy was put in force", []
        if booted.outcome is not None:
            return "the emergency lock was put on", [str(booted.error)]
        if before.backend is None or before.faults == [EMERGENCY_FAULT]:
            raise booted.error
    policy = choose.running(where.cgroup)[str(before.backend)].unaltered()
    if policy is not None:
        asked = actions.forwarded().asked() if where.cgroup is None else None
        place = where._replace(backend=str(before.backend), forwarded=asked)
        lines = actions.start_now(policy, place, tell).deeds
        return _with("the policy in force was put back", lines), []
    return _put_in_place_of_the_unreadable(path, where, tell)


def _put_in_place_of_the_unreadable(path: str, where: Place, tell: Tell) -> Done:
    """Nobody knows what was in force, or it is what someone else made of it."""
    config = _usable(path)
    if config is not None:
        lines = boot.put_on(config.policy, where, tell, actions.start_now).deeds
        return _with("the configuration's policy took its place", lines), list(config.warnings)
    if word_at_top(path, "on_error") == "open":
        raise BadPolicy(f'{path} can\'t be used, and says on_error = "open": what is left in force stays as it is')
    boot.lock_down(where, tell, actions.start_now)
    return "the emergency lock took its place", [f"there is no usable configuration {path} that says what was meant"]


def _with(words: str, lines: list[str]) -> str:
    return f"{words} ({'; '.join(lines)})" if lines else words


def _place(path: str, place: Place) -> Place:
    config = _usable(path)
    return boot.place_of(config, place) if config is not None else place


def _usable(path: str) -> Config | None:
    try:
        return load_config(path, use_stored_ids=True) if os.path.exists(path) else None
    except GuardError:
        return None
