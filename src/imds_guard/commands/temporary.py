# SPDX-License-Identifier: Apache-2.0
"""``allow --for``: rights that end by themselves. A transient systemd timer takes them back (systemd-run(1)).

A file beside the commands' lock says what each ``allow --for`` has added. Only that is taken back: not what was on the
list before, and not what another command has put there for good since.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from imds_guard.commands.turn import UNTIL
from imds_guard.errors import GuardError, NotPermitted, Unsupported, UsageError, system_text
from imds_guard.kernel import files, lockfile, systemd
from imds_guard.kernel.run import find_program
from imds_guard.policy.endpoint_syntax import format_endpoint, parse_endpoint
from imds_guard.policy.lockdown import divide
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy

if TYPE_CHECKING:
    from imds_guard.policy.difference import Difference

PREFIX = "imds-guard-allow-"
"""Of the timer's name."""

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SPAN = re.compile(rf"(?:[0-9]{{1,6}}(?:{'|'.join(sorted(_UNITS, key=len, reverse=True))}))+")
MAX_S = 30 * 86400
_LAST_YEAR = 253402300799  # of datetime: the end of 9999


class Right(NamedTuple):
    """What one ``allow --for`` has added at some endpoints."""

    timer: str
    until: float
    """Seconds since the epoch, to show. Who sets the clock moves this, and not the end."""
    endpoints: tuple[Endpoint, ...]
    who: Identities
    ends: float = 0.0
    """The same in seconds of CLOCK_BOOTTIME (clock_gettime(2)), which nobody sets and which counts suspended time.

    No boot ID stands beside it. The file is in /run, which a reboot empties. Where it does not, nothing is in force
    after a reboot, and the start that puts a policy in force forgets the file (forget_all()).
    """


class End(NamedTuple):
    """When a right ends, as in Right."""

    until: float
    ends: float


def seconds_of(span: str) -> int:
    """The seconds of ``90s``, ``15m``, ``1h30m``, ``2d``. Raises UsageError."""
    found = 0
    if _SPAN.fullmatch(span):
        for number, unit in re.findall(r"([0-9]+)([a-z]+)", span):
            found += int(number) * _UNITS[unit]
    if not 1 <= found <= MAX_S:
        raise UsageError(f"{span!r} is not a time from 1s to 30d: write it like 90s, 15m, 1h30m or 2d")
    return found


# --- the timer --------------------------------------------------------------------------------------------------------


def require_timers() -> None:
    """Raises Unsupported where nothing could take the right back, NotPermitted where others could change what does."""
    if not systemd.is_booted() or find_program("systemd-run") is None:
        raise Unsupported(
            "allowing for a time only: systemd would take the right back, and is not the init of this machine; use "
            "allow, and revoke later"
        )
    from imds_guard.commands import own_files  # noqa: PLC0415 -- start-up time

    program = _program()
    where = own_files.program_open_to_others(program)
    if where is not None:
        raise NotPermitted(f"allowing for a time only: {where} can be changed by others than root")


def _program() -> str:
    path = os.path.abspath(sys.argv[0])
    if os.path.basename(path) != "imds-guard" or not os.access(path, os.X_OK):
        raise Unsupported(
            f"allowing for a time only: {path} may be gone when the time is over; install imds-guard, and use that one"
        )
    return path


def start_timer(seconds: int, cgroup: str | None) -> str:
    """Starts a timer, which will call take_back() by ``revoke --timer``, and returns its name. Raises GuardError."""
    name = os.urandom(6).hex()
    arguments = [_program(), "revoke", "--timer", name, *([] if cgroup is None else ["--cgroup", cgroup])]
    systemd.run_in(f"{PREFIX}{name}", seconds, "Takes back what imds-guard allow --for has allowed", arguments)
    return name


def stop_timer(name: str) -> None:
    """Failure is ignored: a timer that finds nothing to take back is harmless."""
    with suppress(GuardError):
        systemd.systemctl("stop", f"{PREFIX}{name}.timer")


# --- the file ---------------------------------------------------------------------------------------------------------


def rights(lock_name: str) -> list[Right]:
    """The rights that end by themselves. Raises GuardError where the file can't be read: their end is not known."""
    import json  # noqa: PLC0415 -- start-up time: few machines have such a file

    path = _path(lock_name)
    try:
        return [_right(one) for one in json.loads(files.read_regular(path))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, GuardError) as error:
        raise GuardError(
            f"{path} can't be read: nothing tells what allow --for has allowed, or takes it back; run imds-guard start "
            "with the policy that is meant"
        ) from error


def _right(values: dict[str, Any]) -> Right:
    who = Identities(frozenset(map(int, values["users"])), frozenset(map(int, values["groups"])))
    endpoints = tuple(map(parse_endpoint, values["endpoints"]))
    until, ends = float(values["until"]), float(values["ends"])
    # Not a number is in no order with others: such a right would never be overdue.
    if not (0 <= until <= _LAST_YEAR and ends <= end_after(MAX_S).ends):
        raise ValueError("it ends later than --for can say")
    return Right(str(values["timer"]), until, endpoints, who, ends)


def write(lock_name: str, found: Iterable[Right]) -> None:
    """Replaces the file. The caller holds the commands' lock. Raises GuardError."""
    import json  # noqa: PLC0415

    values = [
        {
            "timer": one.timer,
            "until": one.until,
            "ends": one.ends,
            "endpoints": [text for endpoint in one.endpoints for text in format_endpoint(endpoint)],
            "users": sorted(one.who.users),
            "groups": sorted(one.who.groups),
        }
        for one in found
        if one.who and one.endpoints
    ]
    path = _path(lock_name)
    try:
        if values:
            files.replace(path, json.dumps(values).encode())
        else:
            with suppress(FileNotFoundError):
                os.unlink(path)
    except OSError as error:
        raise GuardError(f"writing {path}, which says what to take back: {system_text(error)}") from error


def forget_all(lock_name: str) -> None:
    """A whole policy has taken the place of the one before: what it allows, it allows for good."""
    with suppress(GuardError):
        write(lock_name, [])


def _path(lock_name: str) -> str:
    return os.path.join(lockfile.FOLDER, f"{lock_name}.{UNTIL}")


# --- what the rights are ----------------------------------------------------------------------------------------------


def added_by(found: Difference, policy: Policy, timer: str, end: End) -> list[Right]:
    """The rights that a change adds to the allow lists. ``policy`` is the one after it."""
    everywhere = tuple(endpoint for lock in policy.locks for endpoint in lock.endpoints)
    return [
        Right(timer, end.until, everywhere if one.endpoints is None else one.endpoints, one.who, end.ends)
        for one in found.lists
        if one.kind == "allow" and one.added
    ]


def split(found: Iterable[Right], who: Identities, endpoint: Endpoint | None) -> tuple[list[Right], list[Right]]:
    """The rights of ``who``, at ``endpoint`` or everywhere, and all others."""
    theirs: list[Right] = []
    others: list[Right] = []
    for one in found:
        both = Identities(one.who.users & who.users, one.who.groups & who.groups)
        everywhere: tuple[Endpoint, ...] = ()
        inside, outside = (one.endpoints, everywhere) if endpoint is None else divide(_as_lock(one), endpoint)
        theirs.append(one._replace(endpoints=inside, who=both))
        others.append(one._replace(endpoints=outside, who=both))
        others.append(one._replace(who=Identities(one.who.users - who.users, one.who.groups - who.groups)))
    return [one for one in theirs if one.who and one.endpoints], [one for one in others if one.who and one.endpoints]


def _as_lock(one: Right) -> Lock:
    return Lock(one.timer, one.endpoints)


def without(policy: Policy, found: Iterable[Right]) -> Policy:
    """The policy without these rights."""
    from imds_guard.policy.edit import take_back  # noqa: PLC0415 -- start-up time

    for one in found:
        policy = take_back(policy, one.endpoints, one.who)
    return policy


def end_after(seconds: float) -> End:
    """The end of a right that begins now. A negative number: how long ago it ended."""
    return End(time.time() + seconds, time.clock_gettime(time.CLOCK_BOOTTIME) + seconds)
