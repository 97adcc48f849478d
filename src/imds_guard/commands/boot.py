# SPDX-License-Identifier: Apache-2.0
"""``start --boot``: the configuration's policy, or the emergency lock where the configuration can't be used."""

from __future__ import annotations

import os
from typing import Callable, NamedTuple

from imds_guard.backends import choose
from imds_guard.commands import guard
from imds_guard.commands.guard import Outcome
from imds_guard.commands.options import GuardOptions, Progress
from imds_guard.config.read import Config, load_config, top_level_string
from imds_guard.errors import BadPolicy, GuardError, NotPermitted, Unsupported, UsageError
from imds_guard.kernel.dmi import dmi_text
from imds_guard.policy.emergency import emergency_policy, is_emergency
from imds_guard.policy.model import Policy


class BootResult(NamedTuple):
    """The result of start --boot."""

    outcome: Outcome | None = None
    """What was put in force; None when nothing was changed."""
    error: GuardError | None = None
    """Why the configuration's policy is not in force."""


Start = Callable[[Policy, GuardOptions, Progress], Outcome]
"""guard.start(), or guard.start_locked() for a caller that holds the commands' lock."""


def start(path: str, options: GuardOptions, progress: Progress, begin: Start = guard.start) -> BootResult:
    """Puts the policy of the configuration ``path`` in force, by its stored IDs. ``options`` win over the file.

    Raises GuardError when nothing could be locked that should be.
    """
    try:
        config = _load(path)
        where = with_config(options, config)
        outcome = put_in_force(config.policy, where, progress, begin)
    except GuardError as error:
        return _without_the_policy(_of_the_file(error), path, options, progress, begin)
    outcome.warnings.extend(config.warnings)
    outcome.done.extend(_remove_machine_emergency(where.cgroup))
    return BootResult(outcome)


def with_config(options: GuardOptions, config: Config) -> GuardOptions:
    """``options``, with the configuration's values where they say nothing."""
    backend = config.backend if options.backend == choose.AUTO else options.backend
    cgroup = options.cgroup or config.cgroup
    return options._replace(
        backend=backend,
        cgroup=cgroup,
        forwarded=options.forwarded or (config.forwarded if cgroup is None else None),
        resolve_groups=options.resolve_groups or config.resolve_groups,
    )


def _load(path: str) -> Config:
    if not os.path.exists(path):
        raise BadPolicy(
            f"there is no configuration {path}: write it, or save a policy with imds-guard start ... --save"
        )
    return load_config(path, use_stored_ids=True)


def _of_the_file(error: GuardError) -> GuardError:
    """A usage error here is about the configuration file: the command line has only --boot."""
    return BadPolicy(str(error)) if isinstance(error, UsageError) else error


def _without_the_policy(
    error: GuardError, path: str, options: GuardOptions, progress: Progress, begin: Start
) -> BootResult:
    """A policy that is in force is worth more than the emergency lock, and stays."""
    if _is_active(options.cgroup or top_level_string(path, "cgroup")):
        return BootResult(error=_extended(error, "what was in force stays so"))
    if top_level_string(path, "on_error") == "open":
        return BootResult(error=_extended(error, 'nothing is locked, since the configuration says on_error = "open"'))
    try:
        outcome = put_emergency_lock_on(options, progress, begin)
    except GuardError as other:
        raise type(other)(
            f"{error}; the emergency lock could not be put on either, nothing is locked: {other}"
        ) from error
    said = "until that is corrected the built-in endpoints are locked for everyone but root (emergency lock)"
    return BootResult(outcome, _extended(error, said))


def _is_active(cgroup: str | None) -> bool:
    try:
        return bool(choose.running(cgroup))
    except GuardError:
        return False  # there is no such cgroup, so nothing guards it


def put_emergency_lock_on(options: GuardOptions, progress: Progress, begin: Start) -> Outcome:
    """Puts the emergency lock on, with whatever backend can."""
    return put_in_force(emergency_policy(dmi_text()), options._replace(backend=choose.AUTO), progress, begin)


def put_in_force(policy: Policy, options: GuardOptions, progress: Progress, begin: Start) -> Outcome:
    """Starts ``policy``. At boot a backend that fails makes way for the next, as one that refuses does anywhere."""
    try:
        return begin(policy, options, progress)
    except (Unsupported, NotPermitted):
        raise
    except GuardError as error:
        if options.backend != choose.AUTO or options.cgroup is not None:
            raise
        outcome = begin(policy, options._replace(backend="iptables"), progress)
        outcome.warnings.append(f"ebpf failed: {error}")
        return outcome


def _extended(error: GuardError, more: str) -> GuardError:
    return type(error)(f"{error}; {more}")


def _remove_machine_emergency(cgroup: str | None) -> list[str]:
    """A policy for a cgroup does not replace an emergency lock on the whole machine: that is removed here."""
    if cgroup is None:
        return []
    held = [backend.read() for backend in choose.running(None).values()]
    return guard.stop(None) if any(policy is not None and is_emergency(policy) for policy in held) else []
