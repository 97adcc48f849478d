# SPDX-License-Identifier: Apache-2.0
"""``verify``: is everything that should be in force in force, and how it is put back where it is not."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from imds_guard.backends import choose
from imds_guard.commands import boot, change, filter_service, guard, look
from imds_guard.commands.look import Status
from imds_guard.commands.options import GuardOptions, Progress
from imds_guard.config.boot_file import BootFile
from imds_guard.config.read import Config
from imds_guard.errors import BadPolicy, GuardError
from imds_guard.policy.edit import without_ipv6
from imds_guard.policy.emergency import EMERGENCY_FAULT, is_emergency

if TYPE_CHECKING:
    from imds_guard.connections.values import CutResult


class VerifyResult(NamedTuple):
    """The state that was found, and the state after the repair, if there was one."""

    before: Status
    after: Status
    repaired: list[str]
    """A line for each fault that is gone: what was wrong, and what was done."""
    warnings: list[str]
    failure: GuardError | None = None
    """Why nothing could be done."""
    existing: CutResult | None = None
    """Connections that the policy does not allow; None where nobody looked for them."""


def verify(path: str, options: GuardOptions) -> VerifyResult:
    """Reads the state and changes nothing. ``options`` win over the configuration ``path``."""
    found = look.status(_with_config(_usable(BootFile(path)), options).cgroup, path)
    return VerifyResult(found, found, [], [])


def repair(path: str, options: GuardOptions, progress: Progress, *, may_start: bool = True) -> VerifyResult:
    """Reads the state and puts back what is wrong, without a moment in which less is locked.

    What is put back is the policy in force. Where that can't be read, or someone else changed it, it is the
    configuration's policy. Where the configuration can't be used, it is the emergency lock, since nobody can tell
    which policy was meant. Where nothing is in force and there is a configuration, it starts as at boot. Names that
    had no ID when the configuration's policy was put in force are asked for again. Open connections that the policy
    does not allow are looked for again, too. Unless it ``may_start``, nothing is done where nothing is or should be in
    force.
    """
    if not may_start:
        found = verify(path, options)
        if found.after.backend is None and not found.after.faults:
            return found
    file = BootFile(path)
    incomplete = _usable(file)
    config = _with_answers(file, incomplete)  # before the lock is taken: it may take seconds
    where = _with_config(config, options)
    overdue = _take_back_overdue(where)
    with guard.one_at_a_time(where.cgroup):
        result = _repair(file, where, progress)
        result = result._replace(repaired=overdue + result.repaired)
        if result.failure is not None:
            return result
        joined = _join_names(incomplete, config, where, progress)
        after = look.status(where.cgroup, file.path) if joined else result.after
        joined += _end_machine_emergency(config, after, where)
        in_force = guard.look_again(where.cgroup) if after.backend is not None else None
    existing = None if in_force is None else guard.complete(in_force, progress).existing
    if after.policy is not None and after.policy.filters:
        served = filter_service.repair(where.cgroup)
        joined += served
        if served or after.faults:  # the change of policy may have served them already
            after = look.status(where.cgroup, file.path)
    return result._replace(after=after, repaired=result.repaired + joined, existing=existing)


def _take_back_overdue(where: GuardOptions) -> list[str]:
    """Where that fails, the policy in force may be what is to be repaired."""
    with suppress(GuardError):
        if change.take_back_overdue(where) is not None:
            return ["what allow --for had allowed was still in force after its time: it was taken back"]
    return []


def _repair(file: BootFile, where: GuardOptions, progress: Progress) -> VerifyResult:
    before = look.status(where.cgroup, file.path)
    if not _needs_repair(before, file.path):
        return VerifyResult(before, before, [], [])
    found, repaired = _without_orphans(before, where.cgroup, file.path)
    if _needs_repair(found, file.path):
        found, put_back = _with_forwarded(found, file.path)
        repaired += put_back
    if not _needs_repair(found, file.path):
        return VerifyResult(before, found, repaired, [])
    try:
        done, warnings = _put_back(found, file, where, progress)
    except GuardError as error:
        return VerifyResult(before, look.status(where.cgroup, file.path), repaired, [], error)
    after = look.status(where.cgroup, file.path)
    faults = found.faults or ["nothing was in force"]
    repaired += [f"{fault}: {done}" for fault in faults if fault not in after.faults]
    return VerifyResult(before, after, repaired, warnings)


def _without_orphans(before: Status, cgroup: str | None, path: str) -> tuple[Status, list[str]]:
    """The state when the pins of guards whose cgroup is gone were removed, and a line for each of these faults."""
    if not before.faults or not guard.remove_orphans().done:
        return before, []
    after = look.status(cgroup, path)
    return after, [f"{fault}: the pins were removed" for fault in before.faults if fault not in after.faults]


def _with_forwarded(before: Status, config: str) -> tuple[Status, list[str]]:
    """Where the rules for forwarded packets are all that is wrong, the policy stays, and so do its counters.

    The state when the rules were put back, and a line for each fault that is gone.
    """
    held = before.forwarded
    if held is None or before.policy is None or before.faults != list(held.faults):
        return before, []
    rules = look.forwarded()
    with suppress(GuardError):
        rules.enforce(before.policy, rules.option())
    after = look.status(None, config)
    gone = [fault for fault in before.faults if fault not in after.faults]
    return after, [f"{fault}: the rules were put back" for fault in gone]


def _needs_repair(found: Status, path: str) -> bool:
    return bool(found.faults) or (found.backend is None and os.path.exists(path))


Repair = tuple[str, list[str]]
"""What was done, as the end of a sentence, and warnings."""


def _put_back(before: Status, file: BootFile, options: GuardOptions, progress: Progress) -> Repair:
    if before.backend is None or before.emergency:
        result = boot.start(file, options, progress, guard.holding_the_lock(options.cgroup))
        if result.outcome is not None and not is_emergency(result.outcome.policy):
            warnings = [] if result.error is None else [str(result.error)]
            return "the configuration's policy was put in force", [*result.outcome.warnings, *warnings]
        if result.outcome is not None:
            return "the emergency lock was put on", [str(result.error)]
        if result.error is not None and (before.backend is None or before.faults == [EMERGENCY_FAULT]):
            raise result.error
    policy = choose.running(options.cgroup)[str(before.backend)].unaltered()
    if _has_rights_without_end(options.cgroup):
        if _usable(file) is None:
            raise BadPolicy(
                "the policy in force has rights whose end is not known, and no configuration says what is meant"
            )
        policy = None
    if policy is not None:
        outcome = guard.start_locked(policy, _as_it_was(before, options), progress)
        return _with_details("the policy in force was put back", outcome.done_in_short), []
    return _replace_unreadable(file, options, progress)


def _has_rights_without_end(cgroup: str | None) -> bool:
    try:
        look.temporary_rights(cgroup)
    except GuardError:
        return True
    return False


def _as_it_was(before: Status, options: GuardOptions) -> GuardOptions:
    """The options with which the policy in force was started."""
    asked = look.forwarded().option() if options.cgroup is None else None
    keep = guard.keeps_existing(options.cgroup)
    return options._replace(backend=str(before.backend), forwarded=asked, keep_existing=keep, keep_temporary=True)


def _replace_unreadable(file: BootFile, options: GuardOptions, progress: Progress) -> Repair:
    """The policy in force can't be read, or someone else changed it: the configuration says what was meant."""
    config = _usable(file)
    if config is not None:
        outcome = boot.put_in_force(config.policy, options, progress, guard.holding_the_lock(options.cgroup))
        return _with_details("the configuration's policy took its place", outcome.done_in_short), list(config.warnings)
    if file.string("on_error") == "open":
        raise BadPolicy(f'{file.path} can\'t be used, and says on_error = "open": what is left in force stays as it is')
    boot.put_emergency_lock_on(options, progress, guard.holding_the_lock(options.cgroup))
    return "the emergency lock took its place", [
        f"there is no usable configuration {file.path} that says what was meant"
    ]


def _with_details(sentence: str, details: list[str]) -> str:
    return f"{sentence} ({'; '.join(details)})" if details else sentence


# --- the configuration ------------------------------------------------------------------------------------------------


def _usable(file: BootFile) -> Config | None:
    """The configuration without the names that only the name service knows. None where it can't be used."""
    try:
        return file.load() if os.path.exists(file.path) else None
    except GuardError:
        return None


def _with_answers(file: BootFile, config: Config | None) -> Config | None:
    if config is None or not file.has_questions:
        return config
    file.ask()
    return _usable(file)


def _with_config(config: Config | None, options: GuardOptions) -> GuardOptions:
    return boot.with_config(options, config) if config is not None else options


def _join_names(
    incomplete: Config | None, config: Config | None, options: GuardOptions, progress: Progress
) -> list[str]:
    """Puts the whole policy in force where it is in force without the names that have an ID only now. What was done.

    Any other policy in force was changed by somebody, and stays.
    """
    if incomplete is None or config is None or incomplete.policy == config.policy:
        return []
    active = choose.running(options.cgroup)
    # iptables has no IPv6 where the kernel has none.
    if not any(backend.read() in (incomplete.policy, without_ipv6(incomplete.policy)) for backend in active.values()):
        return []
    boot.put_in_force(config.policy, options, progress, guard.holding_the_lock(options.cgroup))
    return ["names of the configuration had no ID: they have one now, and its policy was put in force"]


def _end_machine_emergency(config: Config | None, after: Status, options: GuardOptions) -> list[str]:
    """Takes the emergency lock off the machine where the configuration's cgroup is guarded. Returns what was done.

    Boot does that, too, unless it was ended before.
    """
    is_meant = config is not None and config.cgroup is not None and config.cgroup == options.cgroup
    if not is_meant or after.policy is None or after.emergency:
        return []
    done = boot.remove_machine_emergency(options.cgroup, guard.TAKING_THE_LOCK)
    sentence = "the machine had the emergency lock beside the guard of the cgroup: it was taken off"
    return [_with_details(sentence, done)] if done else []
