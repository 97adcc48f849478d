# SPDX-License-Identifier: Apache-2.0
"""Whether owner rules work here, tried in a throw-away network namespace: a listener, two callers, one rule.

Asking iptables does not do: where the kernel lacks ``--suppl-groups`` the flag is stored, shown and ignored.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from imds_guard.backends.iptables.render import DENY, HEAD
from imds_guard.backends.iptables.rules import LOG, REJECT, RETURN, Rule
from imds_guard.backends.iptables.tables import LOCK_WAIT_S, Anchor, LockHeld, Program, replace, rule_texts
from imds_guard.errors import GuardError, system_text
from imds_guard.kernel import credentials, netns
from imds_guard.kernel.children import run_in_child

_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

_MEMBER_GID, _OTHER_ID = 64_321, 64_322
_CONNECT_TIMEOUT_S = 5.0


class Probed(NamedTuple):
    """What was seen. ``told`` is False when nothing could be tried; ``reason`` says what did not work, or why not."""

    owner: bool
    supplementary: bool
    reason: str = ""
    told: bool = True


def probe(programs: Sequence[Program], audit: bool, lock_wait_s: int = LOCK_WAIT_S) -> Probed:
    """Applies rules such as ours in a namespace of its own and connects as two callers. Raises LockHeld."""
    if os.geteuid() != 0:
        return Probed(False, False, "owner rules can be tried by root only", told=False)
    try:
        netns_error = run_in_child(_can_unshare)
        if netns_error:
            return Probed(False, False, f"no network namespace could be made to try them: {netns_error}", told=False)
        reasons = _try(programs, True, audit, lock_wait_s)
        if not reasons:
            return Probed(True, True)
        plain = _try(programs, False, audit, lock_wait_s)
    except LockHeld:
        raise
    except GuardError as error:
        return Probed(False, False, str(error), told=False)
    if plain:
        return Probed(False, False, plain[0])
    return Probed(True, False, reasons[0])


def _can_unshare() -> str:
    try:
        netns.unshare_network([])
    except OSError as error:
        return system_text(error)
    return ""


def _try(programs: Sequence[Program], supplementary: bool, audit: bool, lock_wait_s: int) -> list[str]:
    """What went wrong with each program; nothing when the member got through and nobody else did."""

    def inside() -> list[str]:
        netns.unshare_network([])
        return [reason for program in programs for reason in _try_program(program, supplementary, audit, lock_wait_s)]

    return run_in_child(inside, timeout_s=60)


def _try_program(program: Program, supplementary: bool, audit: bool, lock_wait_s: int) -> list[str]:
    chains: dict[str, list[Rule]] = {
        HEAD: [
            Rule(RETURN, gids=(_MEMBER_GID, _MEMBER_GID), supplementary=supplementary, comment="probe"),
            # Only a SYN: the reset that a REJECT sends passes OUTPUT too.
            Rule(REJECT, protocol="tcp", syn=True, reject_with="tcp-reset"),
        ],
        DENY: [Rule(LOG)] if audit else [],
    }
    try:
        replace(program, Anchor("OUTPUT", HEAD), rule_texts(chains), lock_wait_s)
    except LockHeld:
        raise
    except GuardError as error:
        return [str(error)]
    with socket.socket(_FAMILY[program.version], socket.SOCK_STREAM) as listener:
        listener.bind((_LOOPBACK[program.version], 0))
        listener.listen()
        there = listener.getsockname()
        member = run_in_child(lambda: _connect(there, _OTHER_ID, [_MEMBER_GID] if supplementary else [], supplementary))
        stranger = run_in_child(lambda: _connect(there, _OTHER_ID, [], True))
    return _complaints(program, supplementary, member, stranger)


def _complaints(program: Program, supplementary: bool, member: int, stranger: int) -> list[str]:
    what = "--gid-owner with --suppl-groups" if supplementary else "--gid-owner"
    if stranger != errno.ECONNREFUSED:
        return [f"{program.title}: a REJECT in OUTPUT did not stop a connect ({_name(stranger)})"]
    if member != 0:
        return [f"{program.title}: {what} did not match a member of the group ({_name(member)})"]
    return []


def _connect(there: object, gid: int, groups: Iterable[int], other: bool) -> int:
    """The errno of a connect with the group as a supplementary one, or, without ``other``, as the primary one."""
    primary = gid if other else _MEMBER_GID
    credentials.become((_OTHER_ID,) * 3, (primary,) * 3, groups)
    family = socket.AF_INET if len(there) == 2 else socket.AF_INET6  # type: ignore[arg-type]
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.settimeout(_CONNECT_TIMEOUT_S)
        return one.connect_ex(there)  # type: ignore[arg-type]


def _name(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "it got through"
