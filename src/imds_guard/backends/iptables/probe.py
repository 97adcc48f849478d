# SPDX-License-Identifier: Apache-2.0
"""Whether owner rules work here. It is tried in a temporary network namespace: a listener, two callers, one rule.

To ask iptables is not enough: a kernel that lacks ``--suppl-groups`` stores the flag, shows it and ignores it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from imds_guard.backends.iptables import marks
from imds_guard.backends.iptables.form import FILTER, MANGLE, Form
from imds_guard.backends.iptables.programs import Program
from imds_guard.backends.iptables.render import DENY, HEAD, Chains
from imds_guard.backends.iptables.rules import ACCEPT, DENIED_MARK, LOG, MARK, REJECT, RETURN, Rule
from imds_guard.backends.iptables.tables import LOCK_WAIT_S, Anchor, LockHeld, replace, rule_texts
from imds_guard.errors import GuardError, system_text
from imds_guard.kernel import credentials, netns
from imds_guard.kernel.children import run_in_child
from imds_guard.kernel.run import find_program

_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

_MEMBER_GID, _OTHER_ID = 64_321, 64_322
_CONNECT_TIMEOUT_S = 5.0


class ProbeResult(NamedTuple):
    """Whether rules by owner and by supplementary group work. ``reason`` says what failed, or why nothing was tried.

    ``conclusive`` is False when nothing could be tried.
    """

    owner: bool
    supplementary: bool
    reason: str = ""
    conclusive: bool = True
    form: Form = Form.NFT
    """The best one that works."""


def probe(programs: Sequence[Program], audit: bool, lock_wait_s: int = LOCK_WAIT_S) -> ProbeResult:
    """Applies rules like ours in a new namespace and connects as two callers. Raises LockHeld."""
    if os.geteuid() != 0:
        return ProbeResult(False, False, "owner rules can be tried by root only", conclusive=False)
    try:
        netns_error = run_in_child(_can_unshare)
        if netns_error:
            return ProbeResult(
                False, False, f"no network namespace could be made to try them: {netns_error}", conclusive=False
            )
        return _best(programs, audit, lock_wait_s)
    except LockHeld:
        raise
    except GuardError as error:
        return ProbeResult(False, False, str(error), conclusive=False)


def _best(programs: Sequence[Program], audit: bool, lock_wait_s: int) -> ProbeResult:
    """With supplementary groups in some form, else without them. The first reason counts for the message."""
    forms = [form for form in Form if form is not Form.NFT or find_program("nft") is not None]
    failed: list[str] = []
    for supplementary in (True, False):
        for form in forms:
            reasons = _try(programs, form, supplementary, audit, lock_wait_s)
            if not reasons:
                return ProbeResult(True, supplementary, "" if supplementary else failed[-1], form=form)
            failed += reasons[:1]
    return ProbeResult(False, False, failed[-1])


def _can_unshare() -> str:
    try:
        netns.unshare_network([])
    except OSError as error:
        return system_text(error)
    return ""


def _try(programs: Sequence[Program], form: Form, supplementary: bool, audit: bool, lock_wait_s: int) -> list[str]:
    """What failed with each program. Empty when the member of the group got through and the other caller did not."""

    def inside() -> list[str]:
        netns.unshare_network([])
        try:
            if form is Form.NFT:
                marks.put("")
            for program in programs:
                for anchor, chains in _chains(form, supplementary, audit).items():
                    replace(program, anchor, rule_texts(chains), lock_wait_s)
        except LockHeld:
            raise
        except GuardError as error:
            return [str(error)]
        return [reason for program in programs for reason in _try_program(program, supplementary)]

    return run_in_child(inside, timeout_s=60)


def _chains(form: Form, supplementary: bool, audit: bool) -> dict[Anchor, Chains]:
    """Rules like ours, each kind of them once. Only a SYN is denied: the reset of a REJECT passes OUTPUT, too."""
    allowed = Rule(RETURN, gids=(_MEMBER_GID, _MEMBER_GID), supplementary=supplementary, comment="probe")
    log = [Rule(LOG)] if audit else []
    if form is Form.FILTER:
        reject = Rule(REJECT, protocol="tcp", syn=True, reject_with="tcp-reset")
        return {FILTER: {HEAD: [allowed, reject], DENY: log}}
    denied = [allowed, Rule(DENY, goto=True, protocol="tcp", syn=True)]
    reject = Rule(REJECT, protocol="tcp", mark=DENIED_MARK, reject_with="tcp-reset")
    # Where nft is to reject, filter has the rule in a chain that nothing leads to.
    behind = {HEAD: [reject]} if form is Form.MANGLE else {HEAD: [], DENY: [reject]}
    return {MANGLE: {HEAD: denied, DENY: [*log, Rule(MARK, mark=DENIED_MARK), Rule(ACCEPT)]}, FILTER: behind}


def _try_program(program: Program, supplementary: bool) -> list[str]:
    with socket.socket(_FAMILY[program.version], socket.SOCK_STREAM) as listener:
        listener.bind((_LOOPBACK[program.version], 0))
        listener.listen()
        to = listener.getsockname()
        by_group = (_OTHER_ID, [_MEMBER_GID]) if supplementary else (_MEMBER_GID, [])
        member = run_in_child(lambda: _connect(program.version, to, *by_group))
        other = run_in_child(lambda: _connect(program.version, to, _OTHER_ID, []))
    return _complaints(program, supplementary, member, other)


def _complaints(program: Program, supplementary: bool, member: int, other: int) -> list[str]:
    what = "--gid-owner with --suppl-groups" if supplementary else "--gid-owner"
    if other != errno.ECONNREFUSED:
        return [f"{program.title}: a REJECT in OUTPUT did not stop a connect ({_name(other)})"]
    if member != 0:
        return [f"{program.title}: {what} did not match a member of the group ({_name(member)})"]
    return []


def _connect(version: int, to: Any, gid: int, groups: Iterable[int]) -> int:
    """The errno of a connect by a user with this primary group and these supplementary groups."""
    credentials.become((_OTHER_ID,) * 3, (gid,) * 3, groups)
    with socket.socket(_FAMILY[version], socket.SOCK_STREAM) as one:
        one.settimeout(_CONNECT_TIMEOUT_S)
        return one.connect_ex(to)


def _name(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "it got through"
