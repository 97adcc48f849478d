# SPDX-License-Identifier: Apache-2.0
"""Who was denied, or would have been in audit mode, and the policy that would let them through."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.report import Report, Row, Who, read_report
from imds_guard.commands.filter_refusals import Refusals, read_refusals
from imds_guard.commands.look import active_policy, forwarded
from imds_guard.config.read import Config
from imds_guard.config.spelling import known_presets
from imds_guard.config.write import dump_config
from imds_guard.errors import BadPolicy, GuardError
from imds_guard.identity import user_id, user_name
from imds_guard.kernel.abandonable import Unanswered, Worker
from imds_guard.policy.edit import are_alike
from imds_guard.policy.endpoint_syntax import endpoint_argument
from imds_guard.policy.model import Identities, Lock, Mode, Policy, Protocol, make_policy
from imds_guard.watch.advice import HELPED_BY_ALLOW, note, place
from imds_guard.watch.options import require_ebpf

if TYPE_CHECKING:
    from imds_guard.backends.forwarded import ForwardingState


class Suggestion(NamedTuple):
    """What would let the denied users through. Empty when an allowlist helps none of them."""

    commands: tuple[tuple[str, int], ...]
    """(command, how many of the denials it would have prevented), most denials first. They work in this order."""
    config: str
    """The whole policy as TOML, with all these users on its allowlists."""


class ReportResult(NamedTuple):
    """The report, and what would let the callers in it through."""

    report: Report
    suggestion: Suggestion
    notes: tuple[str, ...]
    """Advice for the reasons that an allowlist does not change, and for rows that are not about one user."""
    forwarded: ForwardingState | None = None
    """Forwarded packets, whose users nobody knows; None for the guard of a cgroup."""
    enforce: str | None = None
    """In audit mode: the command that enforces, when all who need access are allowed."""
    refusals: Refusals | None = None
    """Of the service of the filters; None where it does not run."""


def require_config(result: ReportResult) -> str:
    """The configuration that lets everybody in the report through. Raises GuardError where nobody is helped by one."""
    if not result.suggestion.config:
        raise GuardError("the report has nobody whom an allowlist would let through, so there is no configuration")
    return result.suggestion.config


_ABOUT_ROWS = {
    Who.USER_NAMESPACES: "user namespaces: a process in one has any of its IDs, so the row is about the user who made "
    "it; the lines of watch have the ID of each caller",
    Who.OTHERS: "more of: a user or a block of IDs has only so many rows; these are all other denials, of every lock",
}


SUGGESTION_S = 10.0
"""For the names of all users in the report: 16,384 rows, each asked for three times."""
_NO_SUGGESTION = (
    f"the names of these users took more than {SUGGESTION_S:.0f} s, so no command is suggested: the name service may "
    "not answer; allow them by their IDs, or try again"
)


def report(cgroup: str | None) -> ReportResult:
    """Reads the report of the policy in force. Raises Unsupported under iptables, GuardError when nothing is active."""
    require_ebpf(cgroup, "reading the report")
    found = read_report(PinLocation.of(cgroup))
    if found is None:
        raise GuardError("nothing is locked, so there is no report: run imds-guard start first")
    _, policy = active_policy(cgroup)
    notes = [note(reason) for reason in sorted({row.reason for row in found.rows} - HELPED_BY_ALLOW)]
    notes += [text for who, text in _ABOUT_ROWS.items() if any(row.who is who for row in found.rows)]
    suggestion = _suggest_in_time(policy, found.rows, cgroup)
    if suggestion is None:
        notes.append(_NO_SUGGESTION)
    forwarding = forwarded().describe(policy) if cgroup is None else None
    enforce = f"imds-guard mode enforce{place(None, cgroup)}" if found.mode is Mode.AUDIT else None
    return ReportResult(found, suggestion or Suggestion((), ""), tuple(notes), forwarding, enforce, read_refusals())


def _suggest_in_time(policy: Policy, rows: tuple[Row, ...], cgroup: str | None) -> Suggestion | None:
    """_suggest() by a child. None where the names of the users in the rows, who chose their IDs, took too long."""

    def work(_: None) -> Suggestion:
        return _suggest(policy, rows, cgroup)

    with Worker(work) as worker:
        answer = worker.ask(None, SUGGESTION_S)
    return None if isinstance(answer, Unanswered) else answer


def _suggest(policy: Policy, rows: tuple[Row, ...], cgroup: str | None) -> Suggestion:
    """Commands and a policy that let through every user in ``rows`` whom an allowlist helps."""
    helped = [row for row in rows if row.who is Who.USER and row.reason in HELPED_BY_ALLOW and row.lock is not None]
    if not helped:
        return Suggestion((), "")
    alike = are_alike(policy)
    arguments = {row.uid: _user_argument(row.uid) for row in helped}
    counts: Counter[str] = Counter()
    for row in helped:
        endpoint = None if alike else endpoint_argument(row.address, row.port, row.protocol or Protocol.TCP)
        counts[_command(arguments[row.uid], place(endpoint, cgroup))] += row.count
    config = Config(_with_users(policy, helped), cgroup=cgroup)
    return Suggestion(tuple(counts.most_common()), dump_config(config, known_presets()).partition("\n\n")[2])


def _with_users(policy: Policy, rows: list[Row]) -> Policy:
    users: dict[str, set[int]] = {}
    for row in rows:
        users.setdefault(row.lock or "", set()).add(row.uid)
    locks = [_lock_with_users(lock, users.get(lock.name, set())) for lock in policy.locks]
    return policy._replace(locks=make_policy(locks).locks)


def _lock_with_users(lock: Lock, users: set[int]) -> Lock:
    return lock._replace(allow=Identities(lock.allow.users | users, lock.allow.groups))


def _command(user: str, where: str) -> str:
    return f"imds-guard allow --user {shlex.quote(user)}{where}"


def _user_argument(uid: int) -> str:
    """The user's name if it is printable and means this ID again, else the ID."""
    name = user_name(uid)
    try:
        return name if user_id(name) == uid and name.isprintable() else str(uid)
    except BadPolicy:
        return str(uid)
