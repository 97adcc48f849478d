# SPDX-License-Identifier: Apache-2.0
"""Connections that were opened before the policy: text for people, and plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imds_guard.connections.values import WhyOpen
from imds_guard.kernel.untrusted import name_of
from imds_guard.present.wrap import MAX_SHOWN
from imds_guard.text import and_more, count_of, host_port, some_of

if TYPE_CHECKING:
    from imds_guard.connections.values import Connection, CutResult
    from imds_guard.kernel.namespaces import Namespace

_ADVICE = {
    WhyOpen.KEPT: "as requested (--keep-existing): their processes can go on using them",
    WhyOpen.UNSUPPORTED: "since this kernel can't end connections (CONFIG_INET_DIAG_DESTROY): end the processes, or "
    "start with --strict",
    WhyOpen.REFUSED: "since the kernel did not end them: end the processes, or start with --strict",
    WhyOpen.HELD: "since a system call that does not end has locked the socket: end the processes, or start with "
    "--strict",
    WhyOpen.NO_PROCESS: "and never cuts, since root made them and no process holds them (the kernel's own, for a disk "
    "or a mount?): allow root, or start with --strict",
    WhyOpen.NO_TIME: "since the time was over or another command changed the policy: imds-guard verify --repair looks "
    "again, or start with --strict",
    WhyOpen.REOPENED: "since new ones were opened as fast as they were cut: look at the processes, or start with "
    "--strict",
}
"""Why connections were left open, and what to do about it."""
_ADVICE_STRICT = "but their packets are dropped (--strict)"


_MAX_HOLDERS = 3
"""Of one connection, in the text."""


def connection_lines(result: CutResult) -> list[str]:
    """What was cut, or would have been, and where it was searched for."""
    where = f"searched {_namespaces(result.searched)}"
    if not result.cut and not result.still_open:
        return [f"no open connection had to be cut ({where})"]
    lines = _listed(f"cut {_count(result.cut)} ({where}):", result.cut)
    audited = [one for one in result.still_open if one.why_open is WhyOpen.AUDIT]
    lines += _listed(f"would have cut {_count(audited)} ({where}):", audited)
    return lines or [f"no open connection was cut ({where})"]


def would_cut_lines(result: CutResult) -> list[str]:
    """What ``start`` would cut: for ``check``, which cuts nothing."""
    audit = ", if it were not for audit mode" if result.why_open is WhyOpen.AUDIT else ""
    return _listed(f"start would cut {_count(result.still_open)}{audit}:", result.still_open) + _errors(result)


def connection_warnings(result: CutResult, strict: bool) -> list[str]:
    """What was left open, by the reason, and what could not be searched."""
    left = []
    for why, advice in _ADVICE.items():
        several = [one for one in result.still_open if one.why_open is why]
        if several:
            connections = some_of([connection_text(one) for one in several], MAX_SHOWN, "; ")
            what = f"left {_count(several)} that the policy does not allow"
            left.append(f"{what}, {_ADVICE_STRICT if strict else advice}: {connections}")
    return [*left, *_errors(result)]


def _errors(result: CutResult) -> list[str]:
    return [f"not all open connections could be found or cut: {'; '.join(result.errors)}"] if result.errors else []


def connection_text(one: Connection) -> str:
    """``curl (pid 4711, user www-data): tcp 10.0.0.5:40000 -> 169.254.169.254:80``."""
    holders = [f"{holder.name or '?'} (pid {holder.pid}, user {holder.user})" for holder in one.holders]
    held = some_of(holders, _MAX_HOLDERS)
    who = held or f"no process that could be found (made by user {one.user})"
    return f"{who}: {one.protocol.value} {host_port(*one.local)} -> {host_port(*one.remote)}"


def _listed(title: str, several: Sequence[Connection]) -> list[str]:
    if not several:
        return []
    more = and_more(len(several), MAX_SHOWN, "")
    lines = [title, *(f"  {connection_text(one)}" for one in several[:MAX_SHOWN])]
    return [*lines, f"  {more} (--json has them all)"] if more else lines


def _count(several: Sequence[Connection]) -> str:
    return count_of(len(several), "open connection")


def _namespaces(several: tuple[Namespace, ...]) -> str:
    """The first one is the command's own."""
    return "this network namespace" if len(several) < 2 else count_of(len(several), "network namespace")


# --- values ---------------------------------------------------------------------------------------------------------


def connections_values(result: CutResult) -> dict[str, Any]:
    """The result for JSON."""
    return {
        "looked_into": [_namespace_values(one) for one in result.searched],
        "not_seen": list(result.errors),
        "cut": [_values(one) for one in result.cut],
        "left": [_values(one) for one in result.still_open],
        "why_left": None if result.why_open is None else result.why_open.value,
        "sweep": result.end.value,
    }


def _namespace_values(one: Namespace) -> dict[str, Any]:
    name = None if one.pid is None else name_of(one.pid)
    return {"inode": one.inode, "path": one.path, "pid": one.pid, "process": name}


def _values(one: Connection) -> dict[str, Any]:
    return {
        "protocol": one.protocol.value,
        "local": {"address": str(one.local[0]), "port": one.local[1]},
        "remote": {"address": str(one.remote[0]), "port": one.remote[1]},
        "processes": [{"pid": holder.pid, "name": holder.name, "user": holder.user} for holder in one.holders],
        "user": one.user,
        "network_namespace": one.namespace,
        "why": one.why,
        "why_left": None if one.why_open is None else one.why_open.value,
    }
