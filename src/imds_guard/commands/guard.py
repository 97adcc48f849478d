# SPDX-License-Identifier: Apache-2.0
"""The commands that put the guard in place and take it away: start, stop. Others change the policy (change.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable, NamedTuple

from imds_guard.backends import Backend, Change, choose
from imds_guard.commands import review, temporary, trail, turn
from imds_guard.commands.look import active_policy, forwarded, reading_tables_once, split_known
from imds_guard.commands.options import GuardOptions, Progress
from imds_guard.commands.outcome import Outcome, Pending
from imds_guard.commands.turn import MACHINE_LOCK, lock_name, lock_name_of_id
from imds_guard.errors import GuardError, Unsupported, UsageError
from imds_guard.kernel import lockfile
from imds_guard.policy.difference import Difference
from imds_guard.policy.model import Policy


@contextmanager
def one_at_a_time(cgroup: str | None, wait_s: float | None = None) -> Iterator[None]:
    """Holds the commands' lock: commands that change something wait for each other."""
    name = lock_name(cgroup)
    with lockfile.exclusive(name, wait_s), reading_tables_once(cgroup):
        try:
            yield
        finally:
            if name != MACHINE_LOCK:
                lockfile.forget(name)


def complete(outcome: Outcome, progress: Progress) -> Outcome:
    """Looks for open connections and metadata clients. Nobody holds one_at_a_time(): it takes up to 9 s."""
    from imds_guard.commands import followup  # noqa: PLC0415 -- start-up time

    if outcome.pending is not None and outcome.pending.look:
        progress(f"imds-guard is active ({outcome.backend}); looking for open connections ...")
    return followup.complete(outcome)


# --- start and stop -------------------------------------------------------------------------------------------------


def start(policy: Policy, options: GuardOptions, progress: Progress) -> Outcome:
    """Puts ``policy`` in force with the first backend that can hold it, then removes any other backend's rules."""
    return complete(start_alone(policy, options, progress), progress)


def start_alone(policy: Policy, options: GuardOptions, progress: Progress) -> Outcome:
    """start() without complete()."""
    with one_at_a_time(options.cgroup):
        return start_locked(policy, options, progress)


def start_locked(policy: Policy, options: GuardOptions, progress: Progress) -> Outcome:
    """start_alone() for a caller that holds one_at_a_time(). It calls complete() when it has released that."""
    if options.cgroup is not None and options.forwarded is not None:
        raise UsageError("--forwarded is about the packets of the whole machine: it does not go with --cgroup")
    running = choose.running(options.cgroup)
    before = review.held(running, options.cgroup)
    if options.cgroup is None:
        forwarded().check(policy, options.forwarded)
    refused: list[choose.BackendCheck] = []
    for name in choose.candidates(options.backend, options.cgroup):
        checked = choose.examine(policy, [name], options.cgroup, options.resolve_groups)[0]
        if checked.refusal is None:
            found = review.compare(before, policy, review.forwarded_of(policy, options.forwarded, options.cgroup))
            options.agree(found)
            if options.dry_run:
                return nothing_done(checked.backend, policy, found)
            progress(_progress_line(checked.backend, running))
            try:
                change = checked.backend.apply(policy)
            except Unsupported as error:
                refused.append(choose.BackendCheck(checked.backend, error))
                continue
            if not options.keep_temporary:
                temporary.forget_all(lock_name(options.cgroup))
            logged = trail.record(options.command, options.cgroup, found)
            change = change.then(Change(warnings=tuple(logged))).then(_remove_others(running, name))
            if options.cgroup is None:
                change = change.then(forwarded().enforce(policy, options.forwarded))
            change = change.then(remove_orphans())
            change = change.then(_neighbours(checked.backend, options))
            why = tuple(f"{other.backend.name} can't be used: {other.refusal}" for other in refused)
            why += () if found is not None else (_UNREADABLE,)
            change = Change(warnings=why).then(change)
            return outcome_of(checked.backend, policy, change, options, look=True)._replace(difference=found)
        refused.append(checked)
    raise choose.refused(refused)


_UNREADABLE = "what was in force before could not be read, so nothing tells what differs"
_NOT_COMPARED = "what is in force can't be read, so nothing tells what would differ"


def nothing_done(backend: Backend, policy: Policy, found: Difference | None) -> Outcome:
    """The outcome of a dry run."""
    warnings = [] if found is not None else [_NOT_COMPARED]
    return Outcome(backend.name, policy, [], warnings, difference=found, dry_run=True)


def _progress_line(backend: Backend, running: dict[str, Backend]) -> str:
    if backend.name == "ebpf" and "ebpf" not in running:
        return "compiling the eBPF programs and attaching them ..."
    return f"putting the policy in force ({backend.name}) ..."


def _remove_others(running: dict[str, Backend], name: str) -> Change:
    """Called when the new backend holds: for a moment both enforce, and there is no moment without either."""
    change = Change()
    for other, backend in running.items():
        if other != name:
            try:
                change = change.then(backend.remove())
            except GuardError as error:
                raise type(error)(f"{name} enforces the policy now, beside what {other} has left: {error}") from error
    return change


def _neighbours(backend: Backend, options: GuardOptions) -> Change:
    """Warns of what others have beside ours. The policy is in force, so a failure is a warning, too."""
    try:
        unknown, _ = split_known(backend.neighbours(), also=options.known_programs)
    except GuardError as error:
        return Change(warnings=(str(error),))
    return Change(warnings=tuple(one.fault for one in unknown))


def remove_orphans() -> Change:
    """Removes pins and files of guards whose cgroup is gone. They lock nothing, so a failure is a warning."""
    from imds_guard.backends.ebpf import other_guards  # noqa: PLC0415 -- start-up time
    from imds_guard.commands.stale_files import remove_stale_files  # noqa: PLC0415

    remove_stale_files()
    try:
        return other_guards.remove_orphans()
    except GuardError as error:
        return Change(warnings=(str(error),))


def outcome_of(backend: Backend, policy: Policy, change: Change, options: GuardOptions, *, look: bool) -> Outcome:
    """Called when the policy is in force: a connection that is cut can't be made again.

    A command that has not to ``look`` for open connections does so all the same where the one before it has not ended.
    """
    name = lock_name(options.cgroup)
    look = look or turn.last_duty(name) is turn.Duty.LOOK
    duty = turn.Duty.KEEP if options.keep_existing else turn.Duty.LOOK if look else turn.last_duty(name)
    pending = Pending(turn.take(name, duty), options.cgroup, look, options.keep_existing)
    warnings = [*change.warnings, *backend.notes(policy)]
    return Outcome(backend.name, policy, list(change.done), warnings, pending=pending)


def look_again(cgroup: str | None) -> Outcome | None:
    """The policy in force, for complete() to look once more for open connections; it says nothing of clients.

    None where these stay (--keep-existing). Raises GuardError where nothing is in force. The caller holds
    one_at_a_time().
    """
    if keeps_existing(cgroup):
        return None
    backend, policy = active_policy(cgroup)
    last = turn.last(lock_name(cgroup))
    return Outcome(backend.name, policy, [], [], pending=Pending(last, cgroup, clients=False))


def keeps_existing(cgroup: str | None) -> bool:
    """Whether the last change was to leave open connections alone (--keep-existing)."""
    return turn.last_duty(lock_name(cgroup)) is turn.Duty.KEEP


def stop(cgroup: str | None) -> list[str]:
    """Removes everything of ours from the kernel. Returns what was done.

    Raises Unsupported when nothing was found and eBPF could not be asked: then something may still be in the kernel.
    """
    with one_at_a_time(cgroup):
        done = stop_locked(cgroup)
    from imds_guard.commands import followup  # noqa: PLC0415 -- start-up time

    followup.tell_filter(None, cgroup)
    return done


def stop_locked(cgroup: str | None, command: str = "stop") -> list[str]:
    """Does the work of stop(). The caller holds one_at_a_time(). What can't be removed keeps nothing else."""
    before = _held_before(cgroup)
    change = Change()
    not_asked: Unsupported | None = None
    failures: list[GuardError] = []
    for name in choose.candidates(choose.AUTO, cgroup):
        try:
            change = change.then(choose.make(name, cgroup).remove())
        except Unsupported as error:
            not_asked = error if name == "ebpf" else not_asked
        except GuardError as error:
            failures.append(error)
    if cgroup is None:
        try:
            change = change.then(forwarded().remove())
        except GuardError as error:
            failures.append(error)
    if failures:
        raise type(failures[0])("; ".join(dict.fromkeys([*map(str, failures), *change.done])))
    turn.forget(lock_name(cgroup))
    temporary.forget_all(lock_name(cgroup))
    if not_asked is not None and not change.done:
        raise not_asked
    logged = trail.record(command, cgroup, review.compare(before, None)) if change.done else []
    return [*change.done, *logged]


def _held_before(cgroup: str | None) -> review.Held:
    """For the log alone: whatever is wrong with it, stop goes on."""
    try:
        return review.held(choose.running(cgroup), cgroup)
    except Exception:  # noqa: BLE001
        return review.Held(readable=False)


class Steps(NamedTuple):
    """start_alone() and stop(), for a caller that has to do either. It calls complete() for the last start."""

    start: Callable[[Policy, GuardOptions, Progress], Outcome]
    stop: Callable[[str | None], list[str]]


TAKING_THE_LOCK = Steps(start_alone, stop)


def holding_the_lock(cgroup: str | None) -> Steps:
    """For a caller that holds one_at_a_time(cgroup). A step for another guard takes the lock of that one."""
    held = lock_name(cgroup)

    def start(policy: Policy, options: GuardOptions, progress: Progress) -> Outcome:
        step = start_locked if lock_name(options.cgroup) == held else start_alone
        return step(policy, options, progress)

    def stop_one(other: str | None) -> list[str]:
        return stop_locked(other) if lock_name(other) == held else stop(other)

    return Steps(start, stop_one)


def stop_all() -> list[str]:
    """stop() for the machine's guard, and for the guard of every cgroup, also of one that is gone."""
    from imds_guard.backends.ebpf import other_guards  # noqa: PLC0415 -- start-up time
    from imds_guard.commands.stale_files import remove_stale_files  # noqa: PLC0415

    done: list[str] = []
    failures: list[GuardError] = []
    try:
        done += stop(None)
    except GuardError as error:  # guards of cgroups do not stay because of it
        failures.append(error)
    with one_at_a_time(None):
        names = [lock_name_of_id(one.cgroup_id) for one in other_guards.found()]
        removed = other_guards.remove_all().done
        for name in names:
            turn.forget(name)
            temporary.forget_all(name)
        if removed:
            done += trail.record("stop --all", "all cgroups", Difference(), "; ".join(removed))
        remove_stale_files()
    if failures and not (removed and isinstance(failures[0], Unsupported)):
        raise type(failures[0])("; ".join([str(failures[0]), *removed]))
    return [*done, *removed]
