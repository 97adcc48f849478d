# SPDX-License-Identifier: Apache-2.0
"""The command line: options to actions, errors to one sentence and an exit status. The only module that knows click."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Callable, Iterable, List, NoReturn, Optional, Sequence, Tuple, TypeVar

import click

from imds_guard import __version__, actions, identity
from imds_guard.actions import Outcome, Place
from imds_guard.config import CONFIG_PATH, load_config, parse_endpoint, policy_from_words
from imds_guard.errors import BadPolicy, GuardError, UsageError, system_words
from imds_guard.kernel.dmi import dmi_words
from imds_guard.policy import Endpoint, Identities, Mode, Policy, PolicyError, Verdict

F = TypeVar("F", bound=Callable[..., Any])

STATUS_ACTIVE, STATUS_DEGRADED, STATUS_INACTIVE, STATUS_UNKNOWN = 0, 1, 3, 4
"""As systemctl status has them (LSB: 0 running, 3 not running, 4 unknown)."""


# --- printing -------------------------------------------------------------------------------------------------------


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(f"warning: {line}", err=True)


def _say_json(values: object) -> None:
    click.echo(json.dumps(values, indent=2, sort_keys=True))


def _tell(line: str) -> None:
    """For someone who waits: only where a terminal shows it."""
    if sys.stderr.isatty():
        click.echo(line, err=True)


def _report(outcome: Outcome, as_json: bool) -> None:
    from imds_guard import present  # noqa: PLC0415

    if as_json:
        _say_json(present.outcome_values(outcome))
        return
    _say(present.outcome_lines(outcome))
    _warn(present.outcome_warnings(outcome))


# --- options that several commands share ----------------------------------------------------------------------------


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_cgroup_option = click.option("--cgroup", metavar="PATH", help="Guard this cgroup2 subtree, not the whole machine.")
_config_option = click.option("--config", metavar="FILE", help=f"Configuration file (default {CONFIG_PATH}).")
_backend_option = click.option(
    "--backend", type=click.Choice(["auto", "ebpf", "iptables"]), help="What enforces (default auto: eBPF if it can)."
)
_resolve_option = click.option(
    "--resolve-groups",
    is_flag=True,
    help="iptables without --suppl-groups: use the user IDs of the groups' present members.",
)

_policy_options = _options(
    click.option("--group", "groups", multiple=True, metavar="G", help="Allow this group (name or ID; repeatable)."),
    click.option("--user", "users", multiple=True, metavar="U", help="Allow this user (name or ID; repeatable)."),
    click.option(
        "--deny-group", "deny_groups", multiple=True, metavar="G", help="Deny this group, whoever is allowed."
    ),
    click.option("--deny-user", "deny_users", multiple=True, metavar="U", help="Deny this user, whoever is allowed."),
    click.option("--nobody", is_flag=True, help="Allow nobody at all, root included."),
    click.option("--ip", "ips", multiple=True, metavar="ENDPOINT", help="Lock ADDR[/LEN][:PORTS][,tcp|udp|any]."),
    click.option("--preset", "presets", multiple=True, metavar="NAME", help="Lock a built-in set of endpoints."),
    click.option("--mode", type=click.Choice(["enforce", "audit"]), help="audit counts denials and denies nobody."),
    click.option("--containers", type=click.Choice(["deny", "allow"]), help="Containers: denied, or judged by ID."),
    _config_option,
)

_change_options = _options(
    click.option("--group", "groups", multiple=True, metavar="G", help="This group (name or ID; repeatable)."),
    click.option("--user", "users", multiple=True, metavar="U", help="This user (name or ID; repeatable)."),
    click.option("--ip", "ip", metavar="ENDPOINT", help="Only at this endpoint; its lock is split if it has more."),
    click.option("--save", is_flag=True, help="Write the policy to the configuration file, too."),
    click.option("--without-root", is_flag=True, help="Save even if an installed metadata client is shut out."),
    _config_option,
    _cgroup_option,
    _json_option,
)


class Words:
    """The policy options of one call, as they were given."""

    def __init__(self, given: Any) -> None:
        self.groups: Tuple[str, ...] = given.pop("groups")
        self.users: Tuple[str, ...] = given.pop("users")
        self.deny_groups: Tuple[str, ...] = given.pop("deny_groups")
        self.deny_users: Tuple[str, ...] = given.pop("deny_users")
        self.nobody: bool = given.pop("nobody")
        self.ips: Tuple[str, ...] = given.pop("ips")
        self.presets: Tuple[str, ...] = given.pop("presets")
        self.mode: Optional[str] = given.pop("mode")
        self.containers: Optional[str] = given.pop("containers")
        self.config: Optional[str] = given.pop("config")

    @property
    def describe_policy(self) -> bool:
        """True when the options themselves say who or where."""
        who = self.groups or self.users or self.deny_groups or self.deny_users or self.nobody
        return bool(who or self.ips or self.presets)

    def policy(self, place: Place, create_groups: bool) -> Tuple[Policy, Place, List[str]]:
        """The policy, the place, and warnings: from the options if they describe one, else from the file."""
        if not self.describe_policy:
            return self._from_file(place)
        if self.config is not None:
            raise UsageError("--config contradicts options that say who or where: give one or the other")
        policy = policy_from_words(
            users=self.users,
            groups=self.groups,
            deny_users=self.deny_users,
            deny_groups=self.deny_groups,
            ips=self.ips,
            presets=self.presets,
            nobody=self.nobody,
            mode=Mode(self.mode or "enforce"),
            containers=Verdict(self.containers or "deny"),
            dmi_words=dmi_words(),
            create_groups=create_groups,
        )
        return policy, place, []

    def _from_file(self, place: Place) -> Tuple[Policy, Place, List[str]]:
        path = CONFIG_PATH if self.config is None else self.config
        if self.config is None and not os.path.exists(path):
            raise UsageError(
                f"nothing says who is allowed: name a --group or a --user, or write {path} "
                "(imds-guard start --group canAccessIP --create-group)"
            )
        config = load_config(path)
        policy = Policy(
            config.policy.locks,
            Mode(self.mode) if self.mode else config.policy.mode,
            Verdict(self.containers) if self.containers else config.policy.containers,
        )
        chosen = Place(
            config.backend if place.backend == "auto" else place.backend,
            place.cgroup or config.cgroup,
            place.resolve_groups,
            place.forwarded,
        )
        return policy, chosen, list(config.warnings)


# --- commands -------------------------------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, no_args_is_help=False)
@click.version_option(__version__, prog_name="imds-guard")
def cli() -> None:
    """Only the right users and groups reach the instance metadata service."""


@cli.command()
@_policy_options
@_backend_option
@_cgroup_option
@_resolve_option
@click.option("--forwarded", type=click.Choice(["drop", "leave"]), help="Packets that this machine forwards.")
@click.option("--create-group", is_flag=True, help="Make groups that do not exist (system groups).")
@click.option("--save", is_flag=True, help="Write the policy to the configuration file, too.")
@click.option("--without-root", is_flag=True, help="Save even if an installed metadata client is shut out.")
@_json_option
def start(
    backend: Optional[str],
    cgroup: Optional[str],
    resolve_groups: bool,
    forwarded: Optional[str],
    create_group: bool,
    save: bool,
    without_root: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Lock the metadata endpoints for everyone but those named.

    On a running guard this changes the policy, in one step.
    """
    words = Words(given)
    actions.require_root("start")
    place = Place(backend or "auto", cgroup, resolve_groups, forwarded)
    policy, place, warnings = words.policy(place, create_group)
    if save:
        actions.check_saving(policy, without_root)
    outcome = actions.start(policy, place, _tell)
    if save:
        actions.save(policy, place, CONFIG_PATH if words.config is None else words.config)
    outcome.warnings.extend(warnings)
    _report(outcome, as_json)


@cli.command()
@_cgroup_option
def stop(cgroup: Optional[str]) -> None:
    """Open the locks and remove everything of ours from the kernel."""
    actions.require_root("stop")
    _say(actions.stop(cgroup) or ["imds-guard was not active: nothing to remove"])


@cli.command()
@_cgroup_option
@_json_option
def status(cgroup: Optional[str], as_json: bool) -> None:
    """Show what the kernel enforces.

    Exit status: 0 active and whole, 1 degraded, 3 not active, 4 could not tell.
    """
    from imds_guard import present  # noqa: PLC0415

    actions.require_root("status")
    try:
        found = actions.status(cgroup)
    except GuardError as error:
        _fail(error, STATUS_UNKNOWN)
    if as_json:
        _say_json(present.status_values(found))
    else:
        _say(present.status_lines(found))
    word = present.status_word(found)
    sys.exit({"active": STATUS_ACTIVE, "degraded": STATUS_DEGRADED, "inactive": STATUS_INACTIVE}[word])


def _who(groups: Sequence[str], users: Sequence[str]) -> Identities:
    if not groups and not users:
        raise UsageError("name a --group or a --user")
    return Identities(frozenset(map(identity.user_id, users)), frozenset(map(identity.group_id, groups)))


def _change(
    change: Callable[[Identities, Optional[Endpoint], Optional[str], Callable[[Policy], None]], Outcome],
    groups: Sequence[str],
    users: Sequence[str],
    ip: Optional[str],
    save: bool,
    without_root: bool,
    config: Optional[str],
    cgroup: Optional[str],
    as_json: bool,
) -> None:
    who, endpoint = _who(groups, users), None if ip is None else parse_endpoint(ip)

    def accept(policy: Policy) -> None:
        if save:
            actions.check_saving(policy, without_root)

    outcome = change(who, endpoint, cgroup, accept)
    if save:
        actions.save(outcome.policy, Place(cgroup=cgroup), CONFIG_PATH if config is None else config)
    else:
        outcome.lines.append("this holds until the next boot; --save keeps it")
    _report(outcome, as_json)


@cli.command()
@_change_options
def allow(**given: Any) -> None:
    """Add a user or a group to what is running, in one step."""
    actions.require_root("allow")
    _change(actions.allow, **given)


@cli.command()
@_change_options
def revoke(**given: Any) -> None:
    """Take a user or a group off what is running, in one step."""
    actions.require_root("revoke")
    _change(actions.revoke, **given)


@cli.command()
@_policy_options
@_backend_option
@_cgroup_option
@_resolve_option
@_json_option
def check(backend: Optional[str], cgroup: Optional[str], resolve_groups: bool, as_json: bool, **given: Any) -> None:
    """Say what this machine can do, which backend would be taken, and why not the others. Changes nothing."""
    from imds_guard import present  # noqa: PLC0415

    words = Words(given)
    actions.require_root("check")
    policy = None
    place = Place(backend or "auto", cgroup, resolve_groups)
    if words.describe_policy or words.config is not None:
        policy, place, _ = words.policy(place, create_groups=False)
    found = actions.check(policy, place)
    if as_json:
        _say_json(present.checked_values(found))
    else:
        _say(present.checked_lines(found))
    sys.exit(0 if found.taken else actions.UNSUPPORTED)


@cli.command()
@click.option("--pid", type=click.IntRange(min=1), metavar="N", help="Ask for a running process.")
@click.option("--user", metavar="U", help="Ask for a user as after a fresh login.")
@click.argument("endpoint")
@_cgroup_option
@_json_option
def explain(pid: Optional[int], user: Optional[str], endpoint: str, cgroup: Optional[str], as_json: bool) -> None:
    """Say whether a connect to ENDPOINT (ADDRESS[:PORT]) would be allowed, and by which rule."""
    from imds_guard import present  # noqa: PLC0415

    actions.require_root("explain")
    if (pid is None) == (user is None):
        raise UsageError("name either --pid or --user")
    caller = identity.caller_of_pid(pid) if pid is not None else identity.caller_of_user(str(user))
    decision, destination = actions.explain(caller, parse_endpoint(endpoint), cgroup)
    if as_json:
        _say_json(present.decision_values(caller, destination, decision))
    else:
        _say(present.decision_lines(caller, destination, decision))


@cli.command()
@_json_option
def endpoints(as_json: bool) -> None:
    """List the built-in endpoints with their sources."""
    from imds_guard import present  # noqa: PLC0415

    rows = present.endpoint_rows(dmi_words())
    if as_json:
        _say_json(rows)
    else:
        _say(present.endpoint_lines(rows))


@cli.command()
@_backend_option
@_json_option
def demo(backend: Optional[str], as_json: bool) -> None:
    """Show who gets through before and after locking, in a network namespace and a cgroup of its own."""
    from imds_guard import demo as stage  # noqa: PLC0415
    from imds_guard import present  # noqa: PLC0415

    actions.require_root("demo")
    _tell("making a network namespace with a fake metadata service, and trying to reach it ...")
    result = actions.demo(backend or "auto")
    if as_json:
        _say_json(present.demo_values(result))
    else:
        click.echo(stage.render(result.rows))
        click.echo(stage.LEGEND)
    if not result.whole:
        raise GuardError("showing what the lock does: the kernel did not do what the policy says, see AFTER and WHY")


@cli.command()
@_policy_options
@_cgroup_option
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["iptables", "nftables", "pf", "ipfw", "windows", "systemd"]),
    help="Whose words.",
)
@click.option("--force", is_flag=True, help="Export even what that format can only say more weakly.")
def export(form: str, force: bool, cgroup: Optional[str], **given: Any) -> None:
    """Print the policy in another tool's words: the one in force, unless options or --config name another."""
    words = Words(given)
    actions.require_root("export")
    if words.describe_policy or words.config is not None:
        policy, _, _ = words.policy(Place(cgroup=cgroup), create_groups=False)
    else:
        policy = actions.the_running(cgroup)[1]
    exported = actions.export(policy, form)
    if exported.weakenings and not force:
        raise BadPolicy(
            f"exporting to {form}: it would let through what the policy denies ({'; '.join(exported.weakenings)}); "
            "--force prints it all the same"
        )
    _warn(exported.weakenings)
    click.echo(exported.text, nl=False)


# --- ip-lockdown ----------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("ip")
@click.argument("users", nargs=-1)
@_backend_option
@_cgroup_option
def lock_down(ip: str, users: Tuple[str, ...], backend: Optional[str], cgroup: Optional[str]) -> None:
    """Deny IP to everyone but USERS, beside those whom earlier calls let through.

    Locks of other addresses are not touched. The same call again changes nothing.
    """
    actions.require_root("ip-lockdown")
    place = Place(backend or "auto", cgroup)
    _report(actions.lock_down(ip, [identity.user_id(user) for user in users], place, _tell), as_json=False)


# --- the top --------------------------------------------------------------------------------------------------------


def _fail(error: BaseException, status: int) -> NoReturn:
    click.echo(f"imds-guard: {error}", err=True)
    sys.exit(status)


def _run(command: click.Command, arguments: Optional[Sequence[str]], name: str) -> NoReturn:
    """Every way a command can end, as an exit status."""
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False)
        sys.exit(0)
    except GuardError as error:
        _fail(error, error.exit_status)
    except PolicyError as error:
        _fail(error, BadPolicy.exit_status)
    except click.ClickException as error:
        _fail(GuardError(_click_sentence(error, name)), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail(GuardError("interrupted: the state is the old one or the new one, imds-guard status tells"), 130)
    except OSError as error:
        _fail(GuardError(f"the system refused something that no message covers: {system_words(error)}; {_please()}"), 1)
    except Exception as error:
        if os.environ.get("IMDS_GUARD_TRACEBACK"):
            raise
        _fail(GuardError(f"a fault in imds-guard itself ({type(error).__name__}: {error}); {_please()}"), 1)


def _click_sentence(error: click.ClickException, name: str) -> str:
    """click's words, which may be several lines, as one sentence, and where to read on."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    words = " ".join(error.format_message().split()).rstrip(".")
    return f"{words} (see {context.command_path if context else name} --help)"


def _please() -> str:
    return "please report it with what IMDS_GUARD_TRACEBACK=1 prints"


def main(arguments: Optional[Sequence[str]] = None) -> NoReturn:
    """The ``imds-guard`` command."""
    _run(cli, arguments, "imds-guard")


def ip_lockdown(arguments: Optional[Sequence[str]] = None) -> NoReturn:
    """The ``ip-lockdown`` command, in place of the script of that name."""
    _run(lock_down, arguments, "ip-lockdown")
