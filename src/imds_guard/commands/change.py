# SPDX-License-Identifier: Apache-2.0
"""The commands that change the policy in force: allow, revoke, ip-lockdown, mode."""

from __future__ import annotations

from typing import Callable

from imds_guard.backends import Change, choose
from imds_guard.commands import review, trail
from imds_guard.commands.guard import complete, nothing_done, one_at_a_time, outcome_of, start_locked
from imds_guard.commands.look import active_policy, forwarded
from imds_guard.commands.options import GuardOptions, Progress
from imds_guard.commands.outcome import Outcome
from imds_guard.errors import BadPolicy
from imds_guard.policy.difference import Difference
from imds_guard.policy.emergency import is_emergency
from imds_guard.policy.model import Endpoint, Identities, Mode, Policy

Edit = Callable[[Policy], Policy]
"""Makes the new policy from the one in force. Raises GuardError where the new policy must not come into force."""

Accept = Callable[[Policy], None]
"""Raises GuardError for a policy that must not come into force."""


def change(edit: Edit, options: GuardOptions, *, takes_away: bool) -> Outcome:
    """Puts the edited policy in force, with the backend that runs.

    With ``takes_away`` somebody loses a right: the caller lets complete() look for connections that rest on it.
    """
    with one_at_a_time(options.cgroup):
        return _change(edit, options, takes_away)


def _change(edit: Edit, options: GuardOptions, takes_away: bool) -> Outcome:
    backend, policy = active_policy(options.cgroup)
    wanted = edit(policy)
    if wanted == policy:
        said = ["the policy says so already"]
        return Outcome(backend.name, policy, said, [], difference=Difference(), dry_run=options.dry_run)
    before = review.held_by(backend.name, policy, options.cgroup)
    found = review.compare(before, wanted, _forwarded(wanted, options))
    options.agree(found)
    if options.dry_run:
        return nothing_done(backend, wanted, found)
    done = backend.change(wanted)
    done = done.then(Change(warnings=tuple(trail.record(options.command, options.cgroup, found))))
    if options.cgroup is None:
        done = done.then(forwarded().change(wanted))
    return outcome_of(backend, wanted, done, options, look=takes_away)._replace(difference=found)


def _forwarded(policy: Policy, options: GuardOptions) -> str | None:
    return review.forwarded_of(policy, review.option_in_force(options.cgroup), options.cgroup)


def allow(who: Identities, endpoint: Endpoint | None, options: GuardOptions, accept: Accept) -> Outcome:
    """Adds ``who`` to the allowlist of the policy in force; with ``endpoint`` there alone. Then call complete()."""
    from imds_guard.policy import edit  # noqa: PLC0415

    def edited(policy: Policy) -> Policy:
        wanted = edit.allow(policy, who, endpoint)
        _check_not_denied(wanted, who)
        accept(wanted)
        return wanted

    return change(edited, options, takes_away=False)


def _check_not_denied(policy: Policy, who: Identities) -> None:
    for lock in policy.locks:
        for kind, both, asked in (
            ("user", lock.deny.users & lock.allow.users, who.users),
            ("group", lock.deny.groups & lock.allow.groups, who.groups),
        ):
            if both & asked:
                raise BadPolicy(
                    f"allowing {kind} {min(both & asked)}: it is on the deny list of lock {lock.name!r}, and deny "
                    "lists win; start again without it there"
                )


def revoke(who: Identities, endpoint: Endpoint | None, options: GuardOptions, accept: Accept) -> Outcome:
    """Takes ``who`` off the allowlist of the policy in force; with ``endpoint`` there alone. Then call complete()."""
    from imds_guard.policy import edit  # noqa: PLC0415

    def edited(policy: Policy) -> Policy:
        wanted = edit.revoke(policy, who, endpoint)
        accept(wanted)
        return wanted

    return change(edited, options, takes_away=True)


def ip_lockdown(ip: str, users: list[int], options: GuardOptions, progress: Progress) -> Outcome:
    """Locks one address: adds to the policy in force, or starts a new one with the best backend."""
    from imds_guard.policy.lockdown import lockdown  # noqa: PLC0415

    with one_at_a_time(options.cgroup):
        if choose.running(options.cgroup):
            outcome = _change(lambda policy: lockdown(policy, ip, users), options, takes_away=True)
        else:
            outcome = start_locked(lockdown(None, ip, users), options, progress)
    if options.dry_run:
        return outcome
    outcome = complete(outcome, progress)
    if outcome.policy.mode is Mode.AUDIT:
        outcome.warnings.append("the policy in force is in audit mode, which denies nobody")
    return outcome


def set_mode(mode: Mode, options: GuardOptions, accept: Accept) -> Outcome:
    """Enforces, or counts alone. The lists stay as they are. Then call complete()."""

    def edited(policy: Policy) -> Policy:
        if is_emergency(policy) and mode is Mode.AUDIT:
            raise BadPolicy(
                "the emergency lock is in force, and audit mode would open it: correct the configuration, then run "
                "imds-guard start"
            )
        wanted = policy._replace(mode=mode)
        accept(wanted)
        return wanted

    return change(edited, options, takes_away=mode is Mode.ENFORCE)
