# SPDX-License-Identifier: Apache-2.0
"""The commands that change the policy in force: allow, revoke, ip-lockdown, mode."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Callable

from imds_guard.backends import Change, choose
from imds_guard.commands import review, temporary, trail
from imds_guard.commands.guard import complete, nothing_done, one_at_a_time, outcome_of, start_locked
from imds_guard.commands.look import active_policy, forwarded
from imds_guard.commands.options import GuardOptions, Progress
from imds_guard.commands.outcome import Outcome
from imds_guard.commands.turn import lock_name
from imds_guard.errors import BadPolicy, GuardError
from imds_guard.identity import group_name, user_name
from imds_guard.policy.difference import Difference
from imds_guard.policy.emergency import is_emergency
from imds_guard.policy.model import Endpoint, Identities, Mode, Policy
from imds_guard.text import escaped
from imds_guard.watch.timestamps import utc_text

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
    """Adds ``who`` to the allowlist of the policy in force; with ``endpoint`` there alone. Then call complete().

    What ``allow --for`` has allowed of that is for good now.
    """
    with one_at_a_time(options.cgroup):
        outcome = _change(_allowing(who, endpoint, accept), options, takes_away=False)
        return _end_earlier(outcome, who, endpoint, options, "what allow --for had allowed of that is for good now")


def _allowing(who: Identities, endpoint: Endpoint | None, accept: Accept) -> Edit:
    from imds_guard.policy import edit  # noqa: PLC0415

    def edited(policy: Policy) -> Policy:
        wanted = edit.allow(policy, who, endpoint)
        _check_not_denied(wanted, who)
        accept(wanted)
        return wanted

    return edited


def allow_for(who: Identities, endpoint: Endpoint | None, options: GuardOptions, seconds: int) -> Outcome:
    """allow() for a time. A timer takes back what this call adds, and what an earlier one has added for a time."""
    temporary.require_timers()
    if options.dry_run:
        return allow(who, endpoint, options, lambda _: None)
    temporary.rights(lock_name(options.cgroup))  # what is there must be known, before anything is done
    timer_runs_until = time.monotonic() + seconds
    timer = temporary.start_timer(seconds, options.cgroup)
    end = temporary.end_after(seconds)
    try:
        with one_at_a_time(options.cgroup):
            _require_before(timer_runs_until)
            outcome, ends = _allow_until(end, timer, (who, endpoint), options)
    except BaseException:
        # Once the file has the rights, they may be in force: then the timer has to run.
        with suppress(GuardError):
            if not any(one.timer == timer for one in temporary.rights(lock_name(options.cgroup))):
                temporary.stop_timer(timer)
        raise
    if not ends:
        temporary.stop_timer(timer)
    said = f"this ends at {utc_text(end.until)}" if ends else "they were allowed for good: nothing ends"
    outcome.done.append(said)
    return outcome


def _require_before(end: float) -> None:
    """Raises GuardError once a timer may have found nothing to take back. From now on it waits for our lock."""
    if time.monotonic() >= end:
        raise GuardError("the time was over before anybody was allowed: nothing was changed, try again with more time")


def _allow_until(
    end: temporary.End, timer: str, asked: tuple[Identities, Endpoint | None], options: GuardOptions
) -> tuple[Outcome, bool]:
    """The outcome, and whether something ends. The caller holds one_at_a_time()."""
    name = lock_name(options.cgroup)
    before = temporary.rights(name)
    wanted: list[Policy] = []
    allowing = _allowing(*asked, wanted.append)

    def noted(found: Difference | None) -> None:
        """Right before the change, so that whatever comes after it, nothing stays that does not end."""
        options.agree(found)
        if found is None:
            raise GuardError("allowing for a time only: nothing tells what is in force, and so what to take back")
        temporary.write(name, [*before, *temporary.added_by(found, wanted[-1], timer, end)])

    outcome = _change(allowing, options._replace(agree=noted), takes_away=False)
    theirs, others = temporary.split(temporary.rights(name), *asked)
    temporary.write(name, [*others, *(one._replace(timer=timer, until=end.until, ends=end.ends) for one in theirs)])
    return outcome, bool(theirs)


TIMER_WAIT_S = 3600.0
"""How long a timer's command waits for others: it runs once, and nobody runs it again by hand."""


def take_back(timer: str, options: GuardOptions, wait_s: float | None = None) -> Outcome | None:
    """What the timer of one ``allow --for`` does. None where nothing of it is left. Then call complete()."""
    name = lock_name(options.cgroup)
    with one_at_a_time(options.cgroup, wait_s):
        held = temporary.rights(name)
        ours = [one for one in held if one.timer == timer]
        if not ours or not choose.running(options.cgroup):  # where nothing is locked nobody has a right
            return None
        outcome = _change(lambda policy: temporary.without(policy, ours), options, takes_away=True)
        temporary.write(name, [one for one in held if one.timer != timer])
        return outcome


def take_back_overdue(options: GuardOptions) -> Outcome | None:
    """take_back() for timers that did not run: systemd may have been told to stop them. For verify --repair."""
    latest = temporary.end_after(-OVERDUE_S).ends
    timers = dict.fromkeys(one.timer for one in temporary.rights(lock_name(options.cgroup)) if one.ends < latest)
    outcomes = [outcome for outcome in (take_back(timer, options) for timer in timers) if outcome is not None]
    return outcomes[-1] if outcomes else None


OVERDUE_S = 60.0
"""A timer whose command is running may take that long."""


def _end_earlier(
    outcome: Outcome, who: Identities, endpoint: Endpoint | None, options: GuardOptions, said: str
) -> Outcome:
    """Forgets what ``allow --for`` has allowed ``who``: somebody has decided otherwise. Its timer will find nothing."""
    if options.dry_run:
        return outcome
    name = lock_name(options.cgroup)
    try:
        theirs, others = temporary.split(temporary.rights(name), who, endpoint)
    except GuardError as error:  # what was asked for is done
        outcome.warnings.append(str(error))
        return outcome
    if theirs:
        temporary.write(name, others)
        outcome.done.append(said)
    return outcome


def _check_not_denied(policy: Policy, who: Identities) -> None:
    for lock in policy.locks:
        for kind, both, asked, name_of in (
            ("user", lock.deny.users & lock.allow.users, who.users, user_name),
            ("group", lock.deny.groups & lock.allow.groups, who.groups, group_name),
        ):
            if both & asked:
                name = escaped(name_of(min(both & asked)))
                raise BadPolicy(
                    f"{kind} {name} is on the deny list of lock {lock.name!r}, which wins: take it out of deny_{kind}s "
                    f"and reload, or start again without --deny-{kind} {name}"
                )


def revoke(who: Identities, endpoint: Endpoint | None, options: GuardOptions, accept: Accept) -> Outcome:
    """Takes ``who`` off the allowlist of the policy in force; with ``endpoint`` there alone. Then call complete()."""
    from imds_guard.policy import edit  # noqa: PLC0415

    def edited(policy: Policy) -> Policy:
        wanted = edit.revoke(policy, who, endpoint)
        accept(wanted)
        return wanted

    with one_at_a_time(options.cgroup):
        outcome = _change(edited, options, takes_away=True)
        return _end_earlier(outcome, who, endpoint, options, "what allow --for had allowed of that has ended")


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
