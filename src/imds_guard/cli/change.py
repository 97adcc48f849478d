# SPDX-License-Identifier: Apache-2.0
"""The commands that change the guard that runs: stop, allow, revoke, mode."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Callable, Optional

import click

from imds_guard import CONFIG_PATH, identity
from imds_guard.cli.consent import Consent
from imds_guard.cli.group import cli
from imds_guard.cli.options import cgroup_option, change_options, keep_existing_option, save_options, yes_option
from imds_guard.cli.output import print_done, print_json, print_outcome, print_progress, print_warnings
from imds_guard.commands import change, guard, temporary, which
from imds_guard.commands import save as saving
from imds_guard.commands.capabilities import require_root
from imds_guard.commands.change import Accept
from imds_guard.commands.options import GuardOptions
from imds_guard.commands.outcome import Outcome
from imds_guard.errors import UsageError
from imds_guard.policy.endpoint_syntax import doubts_about, parse_endpoint
from imds_guard.policy.model import Endpoint, Identities, Mode, Policy


@cli.command(short_help="Open the locks and leave nothing in the kernel.")
@click.option(
    "--service",
    metavar="UNIT",
    help="As this unit's ExecStop=: leave the lock alone unless systemd stops the unit for good.",
)
@click.option("--all", "everywhere", is_flag=True, help="Also open the locks of all cgroups.")
@cgroup_option
def stop(service: str | None, everywhere: bool, cgroup: str | None) -> None:
    """Open the locks and remove everything of imds-guard from the kernel."""
    from imds_guard.commands import all_guards  # noqa: PLC0415
    from imds_guard.commands.service import may_unlock, repairs_itself  # noqa: PLC0415
    from imds_guard.kernel.systemd import is_active, is_booted  # noqa: PLC0415
    from imds_guard.present.guards import left_warnings  # noqa: PLC0415

    require_root("stop")
    if everywhere and (service is not None or cgroup is not None):
        raise UsageError("--all is about every guard: neither --cgroup nor --service goes with it")
    if service is not None and not may_unlock(service):
        print_done([f"the lock stays in force: {service} is restarted, or the machine goes down"])
        return
    done = guard.stop_all() if everywhere or service is not None else _stop(cgroup)
    print_done(done or ["imds-guard was not active: nothing to remove"])
    if service is None and cgroup is None:
        print_warnings(left_warnings(all_guards.found()))
    if service is None and cgroup is None and repairs_itself():
        print_warnings(["imds-guard-verify.timer runs and will lock again; systemctl stop imds-guard stops it, too"])
    elif service is None and cgroup is None and is_booted() and is_active("imds-guard.service"):
        print_warnings(["imds-guard.service counts as started all the same: systemctl restart imds-guard locks again"])


def _stop(cgroup: str | None) -> list[str]:
    where = which.configured(cgroup)
    if cgroup is None and where is not None and not os.path.isdir(where):
        return []  # the configuration names a cgroup that is not there: nothing is locked in it
    return guard.stop(where)


def _identities(groups: Sequence[str], users: Sequence[str]) -> Identities:
    if not groups and not users:
        raise UsageError("name a --group or a --user")
    return Identities(frozenset(map(identity.user_id, users)), frozenset(map(identity.group_id, groups)))


class _Saving:
    """``--save`` of a command: checked before the change, done after it."""

    def __init__(self, save: bool, without_root: bool, config: str | None) -> None:
        self.asked = save
        self.ends = False
        """The change ends by itself, and says so."""
        self._without_root = without_root
        self._path = CONFIG_PATH if config is None else config

    def accept(self, policy: Policy) -> None:
        if self.asked:
            saving.check_saving(policy, self._without_root, self._path)

    def finish(self, outcome: Outcome, cgroup: str | None) -> None:
        """Saves, and says so. Always says how long the change holds."""
        if outcome.dry_run:
            outcome.done.extend([f"would save the policy to {self._path}"] if self.asked else [])
        elif self.asked:
            outcome.done.append(saving.save(outcome.policy, GuardOptions(cgroup=cgroup), self._path))
        else:
            outcome.done.extend([] if self.ends else [saving.not_saved(self._path)])


Change = Callable[[Identities, Optional[Endpoint], GuardOptions, Accept], Outcome]


def _change(
    change: Change,
    options: GuardOptions,
    groups: Sequence[str],
    users: Sequence[str],
    ip: str | None,
    save: _Saving,
    as_json: bool,
) -> None:
    who, endpoint = _identities(groups, users), None if ip is None else parse_endpoint(ip)
    outcome = change(who, endpoint, options, save.accept)
    outcome.warnings.extend(identity.notes_on_digits(users, groups))
    outcome.warnings.extend(doubts_about([] if ip is None else [ip]))
    save.finish(outcome, options.cgroup)
    print_outcome(guard.complete(outcome, print_progress), as_json)


def _taken(given: dict[str, Any], command: str) -> tuple[GuardOptions, _Saving]:
    """Takes the options of every change out of ``given``."""
    config = given.pop("config")
    cgroup = which.in_force(given.pop("cgroup"), config)
    options = GuardOptions(cgroup=cgroup, command=command, dry_run=given.pop("dry_run"))
    return options, _Saving(given.pop("save"), given.pop("without_root"), config)


@cli.command(short_help="Let a user or a group through, from now on.")
@change_options
@click.option("--for", "span", metavar="SPAN", help="Take it back after this time: 90s, 15m, 1h30m, 2d.")
def allow(span: str | None, **given: Any) -> None:
    """Add a user or a group to the policy in force, in one step."""
    require_root("allow")
    options, save = _taken(given, "allow" if span is None else f"allow --for {span}")
    if span is None:
        _change(change.allow, options, save=save, **given)
        return
    seconds = temporary.seconds_of(span)
    if save.asked:
        raise UsageError("--for is for a time, and --save for good: leave one of them out")
    save.ends = True

    def allow_for(who: Identities, endpoint: Endpoint | None, options: GuardOptions, _: Accept) -> Outcome:
        return change.allow_for(who, endpoint, options, seconds)

    _change(allow_for, options, save=save, **given)


@cli.command(short_help="Take a user or a group off the list.")
@change_options
@keep_existing_option
@click.option("--timer", metavar="NAME", help="Take back what one allow --for has added: its timer runs this.")
def revoke(keep_existing: bool, timer: str | None, **given: Any) -> None:
    """Take a user or a group off the policy in force, in one step."""
    require_root("revoke")
    exactly = given["cgroup"]
    options, save = _taken(given, "revoke" if timer is None else f"revoke --timer {timer}")
    options = options._replace(keep_existing=keep_existing)
    if timer is None:
        _change(change.revoke, options, save=save, **given)
        return
    if given["groups"] or given["users"] or given["ip"] or save.asked:
        raise UsageError("--timer says by itself what to revoke: no --group, --user, --ip or --save goes with it")
    # The configuration may name another cgroup than when the timer was started.
    outcome = change.take_back(timer, options._replace(cgroup=exactly), change.TIMER_WAIT_S)
    nothing = ["nothing is left to take back"]
    if outcome is None and given["as_json"]:
        print_json({"done": nothing})
    elif outcome is None:
        print_done(nothing)
    else:
        print_outcome(guard.complete(outcome, print_progress), given["as_json"])


@cli.command(short_help="Enforce, or only count denials; the lists stay.")
@click.argument("mode", type=click.Choice(["enforce", "audit"]))
@save_options
@keep_existing_option
@yes_option
def mode(mode: str, keep_existing: bool, yes: bool, as_json: bool, **given: Any) -> None:
    """Switch the policy in force between enforce and audit, and keep its lists.

    In audit mode denials are counted, and nobody is denied.
    """
    require_root("mode")
    consent = Consent(may_ask=not as_json and not yes and not given["dry_run"], name_taken=False)
    options, save = _taken(given, f"mode {mode}")
    options = options._replace(keep_existing=keep_existing, agree=consent)

    def switch(options: GuardOptions) -> Outcome:
        return change.set_mode(Mode(mode), options, save.accept)

    consent.ask(lambda: switch(options._replace(dry_run=True)))
    outcome = switch(options)
    save.finish(outcome, options.cgroup)
    print_outcome(guard.complete(outcome, print_progress), as_json)
