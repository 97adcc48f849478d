# SPDX-License-Identifier: Apache-2.0
"""The commands that change the guard: start, stop, allow, revoke, ip-lockdown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Callable, NamedTuple

from imds_guard.backends import Backend, Change, choose
from imds_guard.commands.look import active_policy, forwarded, reading_tables_once
from imds_guard.commands.options import GuardOptions, Progress
from imds_guard.errors import BadPolicy, GuardError, Unsupported, UsageError
from imds_guard.kernel import lockfile
from imds_guard.policy.model import Endpoint, Identities, Mode, Policy
from imds_guard.text import count_of

# The rest is imported where it is used: start-up time, few commands need any of it.
if TYPE_CHECKING:
    from imds_guard.commands.preflight import Preflight
    from imds_guard.connections.values import CutResult


class Outcome(NamedTuple):
    """The result of a command that changed the guard. ``done`` and ``warnings`` are sentences."""

    backend: str
    policy: Policy
    done: list[str]
    warnings: list[str]
    shut_out: Preflight
    existing: CutResult | None = None
    """Connections that are older than the policy; None where nobody lost a right."""

    @property
    def done_in_short(self) -> list[str]:
        """What was done; of the connections that were cut only the number."""
        cut = len(self.existing.cut) if self.existing is not None else 0
        return [*self.done, f"cut {count_of(cut, 'open connection')}"] if cut else list(self.done)


@contextmanager
def one_at_a_time(cgroup: str | None) -> Iterator[None]:
    """Holds the commands' lock: commands that change something wait for each other."""
    name = machine_lock = "command"
    if cgroup is not None:
        # A cgroup that can't be used is an error of the backend.
        with suppress(OSError):
            name = f"command-{os.stat(cgroup).st_ino}"
    with lockfile.exclusive(name), reading_tables_once(cgroup):
        try:
            yield
        finally:
            if name != machine_lock:
                lockfile.forget(name)


# --- start and stop -------------------------------------------------------------------------------------------------


def start(policy: Policy, options: GuardOptions, progress: Progress) -> Outcome:
    """Puts ``policy`` in force with the first backend that can hold it, then removes any other backend's rules."""
    with one_at_a_time(options.cgroup):
        return start_locked(policy, options, progress)


def start_locked(policy: Policy, options: GuardOptions, progress: Progress) -> Outcome:
    """Does the work of start(). The caller holds one_at_a_time()."""
    if options.cgroup is not None and options.forwarded is not None:
        raise UsageError("--forwarded is about the packets of the whole machine: it does not go with --cgroup")
    running = choose.running(options.cgroup)
    if options.cgroup is None:
        forwarded().check(policy, options.forwarded)
    refused: list[choose.BackendCheck] = []
    for name in choose.candidates(options.backend, options.cgroup):
        checked = choose.examine(policy, [name], options.cgroup, options.resolve_groups)[0]
        if checked.refusal is None:
            progress(_progress_line(checked.backend, running))
            try:
                change = checked.backend.apply(policy)
            except Unsupported as error:
                refused.append(choose.BackendCheck(checked.backend, error))
                continue
            change = change.then(_remove_others(running, name))
            if options.cgroup is None:
                change = change.then(forwarded().enforce(policy, options.forwarded))
            change = change.then(remove_orphans())
            why = tuple(f"{other.backend.name} can't be used: {other.refusal}" for other in refused)
            change = Change(warnings=why).then(change)
            return _outcome(checked.backend, policy, change, _cut_connections(checked.backend, policy, options))
        refused.append(checked)
    raise choose.refused(refused)


def _progress_line(backend: Backend, running: dict[str, Backend]) -> str:
    if backend.name == "ebpf" and "ebpf" not in running:
        return "compiling the eBPF programs and attaching them ..."
    return f"putting the policy in force ({backend.name}) ..."


def _remove_others(running: dict[str, Backend], name: str) -> Change:
    """Called when the new backend holds: for a moment both enforce, and there is no moment without either."""
    change = Change()
    for other, backend in running.items():
        if other != name:
            change = change.then(backend.remove())
    return change


def remove_orphans() -> Change:
    """Removes the pins of guards whose cgroup is gone. They lock nothing, so a failure is a warning."""
    from imds_guard.backends.ebpf import other_guards  # noqa: PLC0415 -- start-up time

    try:
        return other_guards.remove_orphans()
    except GuardError as error:
        return Change(warnings=(str(error),))


def _cut_connections(backend: Backend, policy: Policy, options: GuardOptions) -> CutResult:
    """Called when the policy is in force: a connection that is cut can't be made again.

    iptables judges one network namespace, eBPF all of them.
    """
    from imds_guard.connections.cut import cut_denied  # noqa: PLC0415
    from imds_guard.connections.find import Scope  # noqa: PLC0415
    from imds_guard.connections.values import WhyOpen  # noqa: PLC0415

    scope = Scope(options.cgroup, every_namespace=backend.name == "ebpf")
    keep = WhyOpen.KEPT if options.keep_existing else None
    return cut_denied(policy, scope, WhyOpen.AUDIT if policy.mode is Mode.AUDIT else keep)


def _outcome(backend: Backend, policy: Policy, change: Change, existing: CutResult | None) -> Outcome:
    from imds_guard.commands import preflight  # noqa: PLC0415

    warnings = [*change.warnings, *backend.notes(policy)]
    return Outcome(backend.name, policy, list(change.done), warnings, preflight.shut_out(policy), existing)


def stop(cgroup: str | None) -> list[str]:
    """Removes everything of ours from the kernel. Returns what was done.

    Raises Unsupported when nothing was found and eBPF could not be asked: then something may still be in the kernel.
    """
    with one_at_a_time(cgroup):
        return stop_locked(cgroup)


def stop_locked(cgroup: str | None) -> list[str]:
    """Does the work of stop(). The caller holds one_at_a_time()."""
    change = Change()
    not_asked: Unsupported | None = None
    for name in choose.candidates(choose.AUTO, cgroup):
        try:
            change = change.then(choose.make(name, cgroup).remove())
        except Unsupported as error:
            not_asked = error if name == "ebpf" else not_asked
    if cgroup is None:
        change = change.then(forwarded().remove())
    if not_asked is not None and not change.done:
        raise not_asked
    return list(change.done)


class Steps(NamedTuple):
    """start() and stop(), for a caller that has to do either."""

    start: Callable[[Policy, GuardOptions, Progress], Outcome]
    stop: Callable[[str | None], list[str]]


TAKING_THE_LOCK = Steps(start, stop)
HOLDING_THE_LOCK = Steps(start_locked, stop_locked)
"""For a caller that holds one_at_a_time()."""


def stop_all() -> list[str]:
    """stop() for the machine's guard, and for the guard of every cgroup, also of one that is gone."""
    from imds_guard.backends.ebpf import other_guards  # noqa: PLC0415 -- start-up time

    done = stop(None)
    with one_at_a_time(None):
        return [*done, *other_guards.remove_all().done]


# --- changes to the policy in force ---------------------------------------------------------------------------------

Edit = Callable[[Policy], Policy]
"""Makes the new policy from the one in force. Raises GuardError where the new policy must not come into force."""

Accept = Callable[[Policy], None]
"""Raises GuardError for a policy that must not come into force."""


def change(edit: Edit, options: GuardOptions, *, takes_away: bool) -> Outcome:
    """Puts the edited policy in force, with the backend that runs.

    With ``takes_away`` somebody loses a right: connections that rest on it are looked for.
    """
    with one_at_a_time(options.cgroup):
        return _change(edit, options, takes_away)


def _change(edit: Edit, options: GuardOptions, takes_away: bool) -> Outcome:
    backend, policy = active_policy(options.cgroup)
    wanted = edit(policy)
    if wanted == policy:
        from imds_guard.commands.preflight import Preflight  # noqa: PLC0415

        return Outcome(backend.name, policy, ["the policy says so already"], [], Preflight())
    done = backend.change(wanted)
    if options.cgroup is None:
        done = done.then(forwarded().change(wanted))
    return _outcome(backend, wanted, done, _cut_connections(backend, wanted, options) if takes_away else None)


def allow(who: Identities, endpoint: Endpoint | None, cgroup: str | None, accept: Accept) -> Outcome:
    """Adds ``who`` to the allowlist of the policy in force; with ``endpoint`` there alone."""
    from imds_guard.policy import edit  # noqa: PLC0415

    def edited(policy: Policy) -> Policy:
        wanted = edit.allow(policy, who, endpoint)
        _check_not_denied(wanted, who)
        accept(wanted)
        return wanted

    return change(edited, GuardOptions(cgroup=cgroup), takes_away=False)


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


def revoke(
    who: Identities, endpoint: Endpoint | None, cgroup: str | None, accept: Accept, keep_existing: bool = False
) -> Outcome:
    """Takes ``who`` off the allowlist of the policy in force; with ``endpoint`` there alone."""
    from imds_guard.policy import edit  # noqa: PLC0415

    def edited(policy: Policy) -> Policy:
        wanted = edit.revoke(policy, who, endpoint)
        accept(wanted)
        return wanted

    return change(edited, GuardOptions(cgroup=cgroup, keep_existing=keep_existing), takes_away=True)


def ip_lockdown(ip: str, users: list[int], options: GuardOptions, progress: Progress) -> Outcome:
    """Locks one address: adds to the policy in force, or starts a new one with the best backend."""
    from imds_guard.policy.lockdown import lockdown  # noqa: PLC0415

    with one_at_a_time(options.cgroup):
        if choose.running(options.cgroup):
            outcome = _change(lambda policy: lockdown(policy, ip, users), options, takes_away=True)
        else:
            outcome = start_locked(lockdown(None, ip, users), options, progress)
    if outcome.policy.mode is Mode.AUDIT:
        outcome.warnings.append("the policy in force is in audit mode, which denies nobody")
    return outcome
