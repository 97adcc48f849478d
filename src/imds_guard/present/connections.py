# SPDX-License-Identifier: Apache-2.0
"""What is said of connections that were there before: text for people, and the same as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imds_guard.connections.values import AUDIT, COME_BACK, KEPT, REFUSED, UNABLE
from imds_guard.kernel.processes import process_name
from imds_guard.text import escaped

if TYPE_CHECKING:
    from imds_guard.connections.values import Connection, Sweep
    from imds_guard.kernel.namespaces import Namespace
    from imds_guard.policy.model import Address

MANY = 12

_ADVICE = {
    KEPT: "kept as asked (--keep-existing); who holds them goes on using them",
    UNABLE: "this kernel can't end them (CONFIG_INET_DIAG_DESTROY): end the processes, or start with --strict",
    REFUSED: "the kernel did not end them: end the processes, or start with --strict",
    COME_BACK: "new ones appeared as often as they were cut: look at the processes, or start with --strict",
}
_ADVICE_STRICT = "their packets are dropped all the same (--strict)"


def connection_lines(sweep: Sweep) -> list[str]:
    """What was cut, or would have been, and where it was looked for."""
    where = f"looked into {_namespaces(sweep.looked_into)}"
    if not sweep.cut and not sweep.left:
        return [f"no open connection had to be cut ({where})"]
    lines = _listed(f"cut {_count(sweep.cut)} ({where}):", sweep.cut)
    if sweep.why_left == AUDIT:
        lines += _listed(f"would have cut {_count(sweep.left)} ({where}):", sweep.left)
    return lines or [f"no open connection was cut ({where})"]


def would_cut_lines(sweep: Sweep) -> list[str]:
    """The same for ``check``, which touches nothing."""
    audited = ", were it not for audit mode" if sweep.why_left == AUDIT else ""
    return _listed(f"start would cut {_count(sweep.left)}{audited}:", sweep.left) + _not_seen(sweep)


def connection_warnings(sweep: Sweep, strict: bool) -> list[str]:
    """What was left open, and what could not be looked into."""
    warnings = _not_seen(sweep)
    if sweep.why_left in _ADVICE:
        names = "; ".join(connection_text(one) for one in sweep.left[:MANY])
        more = f"; and {len(sweep.left) - MANY} more" if len(sweep.left) > MANY else ""
        advice = _ADVICE_STRICT if strict else _ADVICE[sweep.why_left]
        warnings.insert(0, f"left {_count(sweep.left)} that the policy does not allow, {advice}: {names}{more}")
    return warnings


def _not_seen(sweep: Sweep) -> list[str]:
    return [f"open connections could not be looked for everywhere: {'; '.join(sweep.unseen)}"] if sweep.unseen else []


def connection_text(one: Connection) -> str:
    """``curl (pid 4711, user www-data): tcp 10.0.0.5:40000 -> 169.254.169.254:80``."""
    held = ", ".join(f"{holder.name or '?'} (pid {holder.pid}, user {holder.user})" for holder in one.holders)
    who = held or f"no process that could be found (made by user {one.user})"
    return f"{who}: {one.protocol.value} {_place(*one.local)} -> {_place(*one.remote)}"


def _listed(title: str, several: Sequence[Connection]) -> list[str]:
    if not several:
        return []
    more = [f"  and {len(several) - MANY} more (--json has them all)"] if len(several) > MANY else []
    return [title, *(f"  {connection_text(one)}" for one in several[:MANY]), *more]


def _count(several: Sequence[Connection]) -> str:
    return f"{len(several)} open connection{'' if len(several) == 1 else 's'}"


def _place(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _namespaces(several: tuple[Namespace, ...]) -> str:
    """The first is the one that the command runs in."""
    return "this network namespace" if len(several) < 2 else f"{len(several)} network namespaces"


# --- values ---------------------------------------------------------------------------------------------------------


def connections_values(sweep: Sweep) -> dict[str, Any]:
    """A sweep for JSON."""
    return {
        "looked_into": [_namespace_values(one) for one in sweep.looked_into],
        "not_seen": list(sweep.unseen),
        "cut": [_values(one) for one in sweep.cut],
        "left": [_values(one) for one in sweep.left],
        "why_left": sweep.why_left or None,
    }


def _namespace_values(one: Namespace) -> dict[str, Any]:
    name = None if one.pid is None else escaped(process_name(one.pid))
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
    }
