# SPDX-License-Identifier: Apache-2.0
"""What ``start --boot`` does: the configuration's policy, or, where it can't be had, the emergency lock."""

from __future__ import annotations

import os
from typing import Callable, NamedTuple

from imds_guard.backends import choose
from imds_guard.commands import guard as actions
from imds_guard.commands.guard import Outcome, Place, Tell
from imds_guard.config.store import Config, load_config, word_at_top
from imds_guard.errors import BadPolicy, GuardError, NotPermitted, Unsupported, UsageError
from imds_guard.kernel.dmi import dmi_words
from imds_guard.policy.emergency import emergency_policy, is_emergency
from imds_guard.policy.model import Policy, PolicyError


class Booted(NamedTuple):
    """What is in force now. ``error`` is why it is not the configuration's policy; ``outcome`` what was put on."""

    outcome: Outcome | None = None
    error: GuardError | None = None


Begin = Callable[[Policy, Place, Tell], Outcome]
"""actions.start(), or start_now() for one who holds the lock of the commands."""


def start(path: str, place: Place, tell: Tell, begin: Begin = actions.start) -> Booted:
    """Puts the policy of the configuration ``path`` in force; stored IDs count, not the names beside them.

    What ``place`` names wins over the file. Raises GuardError when nothing could be locked that should be.
    """
    try:
        config = _load(path)
        where = place_of(config, place)
        outcome = put_on(config.policy, where, tell, begin)
    except (GuardError, PolicyError) as error:
        return _without_the_policy(_as_guard_error(error), path, place, tell, begin)
    outcome.warnings.extend(config.warnings)
    outcome.lines.extend(_lift_emergency(where.cgroup))
    return Booted(outcome)


def place_of(config: Config, place: Place) -> Place:
    """Where a configuration wants to be enforced, unless ``place`` says otherwise."""
    backend = config.backend if place.backend == choose.AUTO else place.backend
    cgroup = place.cgroup or config.cgroup
    return place._replace(
        backend=backend,
        cgroup=cgroup,
        forwarded=place.forwarded or (config.forwarded if cgroup is None else None),
        resolve_groups=place.resolve_groups or config.resolve_groups,
    )


def _load(path: str) -> Config:
    if not os.path.exists(path):
        raise BadPolicy(
            f"there is no configuration {path}: write it, or save a policy with imds-guard start ... --save"
        )
    return load_config(path, use_stored_ids=True)


def _as_guard_error(error: Exception) -> GuardError:
    """The words of the file are wrong, not those of the command line."""
    if isinstance(error, GuardError) and not isinstance(error, UsageError):
        return error
    return BadPolicy(str(error))


def _without_the_policy(error: GuardError, path: str, place: Place, tell: Tell, begin: Begin) -> Booted:
    """A policy that is in force is worth more than the emergency lock, and stays."""
    if _is_running(place.cgroup or word_at_top(path, "cgroup")):
        return Booted(error=_more(error, "what was in force stays so"))
    if word_at_top(path, "on_error") == "open":
        return Booted(error=_more(error, 'nothing is locked, since the configuration says on_error = "open"'))
    try:
        outcome = lock_down(place, tell, begin)
    except GuardError as other:
        raise type(other)(
            f"{error}; the emergency lock could not be put on either, nothing is locked: {other}"
        ) from error
    words = "until that is corrected the built-in endpoints are locked for everyone but root (emergency lock)"
    return Booted(outcome, _more(error, words))


def _is_running(cgroup: str | None) -> bool:
    try:
        return bool(choose.running(cgroup))
    except GuardError:
        return False  # no such cgroup, so nothing guards it


def lock_down(place: Place, tell: Tell, begin: Begin) -> Outcome:
    """Puts the emergency lock on, with whatever backend can."""
    return put_on(emergency_policy(dmi_words()), place._replace(backend=choose.AUTO), tell, begin)


def put_on(policy: Policy, place: Place, tell: Tell, begin: Begin) -> Outcome:
    """As actions.start(). Here a backend that fails, and not only one that refuses, makes way for the next."""
    try:
        return begin(policy, place, tell)
    except (Unsupported, NotPermitted):
        raise
    except GuardError as error:
        if place.backend != choose.AUTO or place.cgroup is not None:
            raise
        outcome = begin(policy, place._replace(backend="iptables"), tell)
        outcome.warnings.append(f"ebpf failed: {error}")
        return outcome


def _more(error: GuardError, words: str) -> GuardError:
    return type(error)(f"{error}; {words}")


def _lift_emergency(cgroup: str | None) -> list[str]:
    """A policy for a subtree does not take the place of an emergency lock on the whole machine."""
    if cgroup is None:
        return []
    held = [backend.read() for backend in choose.running(None).values()]
    return actions.stop(None) if any(policy is not None and is_emergency(policy) for policy in held) else []
