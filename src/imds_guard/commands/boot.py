# SPDX-License-Identifier: Apache-2.0
"""``start --boot``: the configuration's policy, or the emergency lock where the configuration can't be used.

Where nothing is in force, the emergency lock is put on before the configuration is read, and its policy takes the
lock's place by an ordinary change. So whatever happens in between, an error, a deadline, SIGKILL, or no memory, the
built-in endpoints are locked. A configuration that says ``mode = "audit"`` denies nobody: there the emergency lock
comes only after an error.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext, suppress
from typing import NamedTuple

from imds_guard.backends import choose
from imds_guard.backends.ebpf import other_guards
from imds_guard.commands import guard, look, own_files
from imds_guard.commands.guard import TAKING_THE_LOCK, Steps, holding_the_lock
from imds_guard.commands.options import GuardOptions, Progress
from imds_guard.commands.outcome import Outcome
from imds_guard.commands.sub_ids import sub_id_warnings
from imds_guard.config.boot_file import BootFile, says_audit
from imds_guard.config.read import Config
from imds_guard.errors import BadPolicy, GuardError, NotPermitted, Unsupported, UsageError
from imds_guard.kernel.deadline import Deadline, within
from imds_guard.kernel.dmi import dmi_text
from imds_guard.policy.emergency import emergency_policy, is_emergency
from imds_guard.policy.model import Policy

DEADLINE_S = 120.0
"""For the configuration and its policy. imds-guard.service has TimeoutStartSec=300, for this and the emergency lock."""


class BootResult(NamedTuple):
    """The result of start --boot."""

    outcome: Outcome | None = None
    """What was put in force; None when nothing was changed."""
    error: GuardError | None = None
    """Why the configuration's policy is not in force, or what is wrong with it."""


def start(file: BootFile, options: GuardOptions, progress: Progress, steps: Steps = TAKING_THE_LOCK) -> BootResult:
    """Puts the policy of the configuration ``file`` in force. ``options`` win over the file.

    With holding_the_lock() it leaves complete() to the caller. Raises GuardError when nothing could be locked that
    should be.
    """
    result = _Boot(file, options, progress, steps).run()
    if result.outcome is None or steps is not TAKING_THE_LOCK:
        return result
    try:
        return result._replace(outcome=guard.complete(result.outcome, progress))
    except Exception as error:  # noqa: BLE001 - the first error is the one to report, and something is locked
        said = _extended(
            _as_guard_error(error), "open connections were not all looked at; what was put in force stays so"
        )
        return result._replace(error=result.error or said)


class _Boot:
    """One start --boot."""

    def __init__(self, file: BootFile, options: GuardOptions, progress: Progress, steps: Steps) -> None:
        self._file = file
        self._options = options
        self._progress = progress
        self._steps = steps
        self._emergency: Outcome | None = None
        """The emergency lock, if this call put it on."""
        self._not_locked: list[str] = []
        """Why it could not, as a warning."""

    def run(self) -> BootResult:
        try:
            # What another command changes is read again: one_at_a_time() begins anew.
            with look.reading_tables_once(self._options.cgroup):
                self._lock_first()
                with within(DEADLINE_S):
                    return self._put_configuration_in_force()
        except Deadline:
            sentence = f"starting with {self._file.path} took more than {DEADLINE_S:.0f} s and was given up"
            return self._without_the_policy(GuardError(sentence), may_open=False)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the machine is to be locked
            return self._without_the_policy(_as_guard_error(error), may_open=True)

    def _lock_first(self) -> None:
        """The emergency lock, where nothing is in force. Nobody can put a policy in force between look and lock."""
        if _something_in_force(self._options.cgroup) or says_audit(self._file.path):
            return
        taking = self._steps is TAKING_THE_LOCK
        try:
            with guard.one_at_a_time(self._options.cgroup) if taking else nullcontext():
                if not _something_in_force(self._options.cgroup):  # a command that ended while this one waited
                    self._emergency = self._emergency_lock(
                        False, holding_the_lock(self._options.cgroup) if taking else self._steps
                    )
        except Exception as error:  # noqa: BLE001 - the configuration may name a backend that works
            self._not_locked.append(f"the emergency lock could not be put on first: {_as_guard_error(error)}")

    def _emergency_lock(self, cut: bool, steps: Steps) -> Outcome:
        options = self._options if cut else self._options._replace(keep_existing=True)
        return put_emergency_lock_on(options, self._progress, steps)

    # --- the configuration ------------------------------------------------------------------------------------------

    def _put_configuration_in_force(self) -> BootResult:
        """No name service stands before the lock.

        But a policy in force, other than the emergency lock, is worth more than a part of the new one: it stays until
        all names have an ID.
        """
        _require_own_files()
        config = self._file.load()
        held = _policies_in_force(with_config(self._options, config).cgroup)
        replaces = not all(map(_is_emergency, held))
        if self._file.has_questions:
            if not replaces:
                self._start(config, cut=False)
            self._file.ask()
            config = self._file.load()
        changed = self._file.changed_names()
        if replaces:
            self._file.require_answers()
            if changed is not None:
                raise changed
        outcome = self._start(config, cut=True)
        outcome.warnings.extend([*self._not_locked, *config.warnings, *sub_id_warnings(config.policy)])
        outcome.done.extend(self._remove_machine_emergency(config))
        return BootResult(outcome, None if changed is None else _extended(changed, "the saved IDs are in force"))

    def _start(self, config: Config, cut: bool) -> Outcome:
        options = with_config(self._options, config)
        if not cut:
            options = options._replace(keep_existing=True)
        return put_in_force(config.policy, options, self._progress, self._steps)

    def _remove_machine_emergency(self, config: Config) -> list[str]:
        return remove_machine_emergency(with_config(self._options, config).cgroup, self._steps)

    # --- without it -------------------------------------------------------------------------------------------------

    def _without_the_policy(self, error: GuardError, may_open: bool) -> BootResult:
        """A policy that is in force is worth more than the emergency lock, and stays.

        That may be the configuration's: something can go wrong, or take too long, after it was put in force.
        """
        held = self._held()
        if self._emergency is None and held:
            return BootResult(error=_extended(error, "what was in force stays so"))
        if any(map(_is_another, held)):
            return BootResult(error=_extended(error, "the policy that was put in force before that stays so"))
        if may_open and self._file.string("on_error") == "open":
            return self._opened(error)
        sentence = "until that is corrected the built-in endpoints are locked for everyone but root (emergency lock)"
        return BootResult(self._emergency_lock_instead(error), _extended(error, sentence))

    def _held(self) -> list[Policy | None]:
        """What is in force where the emergency lock would be put on, and where the configuration's policy would be."""
        places = dict.fromkeys((self._options.cgroup, self._options.cgroup or self._file.string("cgroup")))
        return [policy for cgroup in places for policy in _policies_in_force(cgroup)]

    def _opened(self, error: GuardError) -> BootResult:
        sentence = 'nothing is locked, since the configuration says on_error = "open"'
        if self._emergency is not None:
            try:
                self._steps.stop(self._options.cgroup)
            except Exception as other:  # noqa: BLE001 - the first error is the one to report
                sentence = f"the emergency lock could not be taken off: {_as_guard_error(other)}"
        return BootResult(error=_extended(error, sentence))

    def _emergency_lock_instead(self, error: GuardError) -> Outcome:
        """Once more where it is on already: now the connections that it denies are cut."""
        try:
            return self._emergency_lock(True, self._steps)
        except Exception as failure:  # noqa: BLE001 - whatever it is, what is locked is to be reported
            if self._emergency is not None:
                return self._emergency
            other = _as_guard_error(failure)
            raise type(other)(
                f"{error}; the emergency lock could not be put on either, nothing is locked: {other}"
            ) from error


def _require_own_files() -> None:
    """Raises NotPermitted where others than root can change what runs as root here."""
    where = own_files.program_open_to_others(sys.argv[0]) or own_files.package_open_to_others()
    if where is not None:
        raise NotPermitted(
            f"starting at boot: {where} can be changed by others than root, who would be root then; install imds-guard "
            "in a folder that only root can write to"
        )


def _as_guard_error(error: Exception) -> GuardError:
    """A usage error here is about the configuration file: the command line has only --boot."""
    if isinstance(error, UsageError):
        return BadPolicy(str(error))
    if isinstance(error, GuardError):
        return error
    return GuardError(f"starting at boot failed ({type(error).__name__}: {error})")


def _something_in_force(cgroup: str | None) -> bool:
    """True also for the guard of some cgroup: it may be the configuration's, which was not read yet."""
    try:
        return bool(_policies_in_force(cgroup)) or (cgroup is None and other_guards.are_in_force())
    except Exception:  # noqa: BLE001 - then the emergency lock is put on
        return False


def _policies_in_force(cgroup: str | None) -> list[Policy | None]:
    """What is in force: None for a policy that can't be read. Empty also where the cgroup does not exist."""
    return [policy for name in choose.candidates(choose.AUTO, cgroup) for policy in _policies_of(cgroup, name)]


def _policies_of(cgroup: str | None, backend: str) -> list[Policy | None]:
    """Empty where the backend can't be asked: that must not hide what the other one holds."""
    found: list[Policy | None] = []
    with suppress(Exception):
        for running in choose.running(cgroup, backend).values():
            found = [None]  # in force, whatever it is
            found = [running.read()]
    return found


def _is_emergency(policy: Policy | None) -> bool:
    return policy is not None and is_emergency(policy)


def _is_another(policy: Policy | None) -> bool:
    """True for a policy that can be read and is not the emergency lock."""
    return policy is not None and not is_emergency(policy)


def with_config(options: GuardOptions, config: Config) -> GuardOptions:
    """``options``, with the configuration's values where they say nothing."""
    backend = config.backend if options.backend == choose.AUTO else options.backend
    cgroup = options.cgroup or config.cgroup
    return options._replace(
        backend=backend,
        cgroup=cgroup,
        forwarded=options.forwarded or (config.forwarded if cgroup is None else None),
        resolve_groups=options.resolve_groups or config.resolve_groups,
        known_programs=options.known_programs or config.known_programs,
    )


def remove_machine_emergency(cgroup: str | None, steps: Steps) -> list[str]:
    """A policy for a cgroup does not replace an emergency lock on the whole machine: that is removed here."""
    lasts = cgroup is not None and any(map(_is_emergency, _policies_in_force(None)))
    return steps.stop(None) if lasts else []


def put_emergency_lock_on(options: GuardOptions, progress: Progress, steps: Steps) -> Outcome:
    """Puts the emergency lock on, with whatever backend can."""
    return put_in_force(emergency_policy(dmi_text()), options._replace(backend=choose.AUTO), progress, steps)


def put_in_force(policy: Policy, options: GuardOptions, progress: Progress, steps: Steps) -> Outcome:
    """Starts ``policy``. At boot a backend that fails, for whatever reason, makes way for the next.

    But eBPF does not where it holds a policy, be it this one: iptables rules hold less.
    """
    if options.backend == choose.AUTO and options.cgroup is None and any(map(_is_another, _policies_of(None, "ebpf"))):
        options = options._replace(backend="ebpf")
    try:
        return steps.start(policy, options, progress)
    except Unsupported:
        raise  # every backend was asked
    except Exception as error:
        if options.backend != choose.AUTO or options.cgroup is not None or policy in _policies_of(None, "ebpf"):
            raise
        return _with_iptables(policy, options, progress, steps, _as_guard_error(error))


def _with_iptables(
    policy: Policy, options: GuardOptions, progress: Progress, steps: Steps, failure: GuardError
) -> Outcome:
    try:
        outcome = steps.start(policy, options._replace(backend="iptables"), progress)
    except GuardError as error:
        raise type(failure)(f"{failure}; iptables: {error}") from error
    outcome.warnings.append(f"ebpf failed: {failure}")
    return outcome


def _extended(error: GuardError, more: str) -> GuardError:
    return type(error)(f"{error}; {more}")
