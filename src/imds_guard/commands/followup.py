# SPDX-License-Identifier: Apache-2.0
"""What follows a change of the policy when the commands' lock is released: filters, connections, metadata clients.

All of it reads what processes chose themselves. So nobody waits for it but the command itself, and it has a deadline:
5 s for the connections, 3 s for the clients, 1 s for connections that were being made while the policy changed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from imds_guard.backends.ebpf.filter_listeners import listeners_under
from imds_guard.commands import preflight
from imds_guard.connections.cut import SWEEP_S, Sweep
from imds_guard.connections.find import Scope
from imds_guard.connections.values import WhyOpen
from imds_guard.errors import GuardError
from imds_guard.kernel import lockfile
from imds_guard.policy.filters import FILTER_SOCKET
from imds_guard.policy.model import Mode

if TYPE_CHECKING:
    from imds_guard.commands.outcome import Outcome, Pending
    from imds_guard.policy.filter_address import Listener
    from imds_guard.policy.model import Policy

PREFLIGHT_S = 3.0
EXTRA_S = 1.0


def complete(outcome: Outcome) -> Outcome:
    """Looks for open connections, if the change asks for it, and for clients that are shut out.

    A connect that the policy before has allowed becomes a connection some time after the change: the hook is past, and
    a port is still being looked for. So a second look follows behind the first one and the clients.
    """
    pending = outcome.pending
    if pending is None:
        return outcome
    outcome.warnings.extend(tell_filter(outcome.policy, pending.cgroup))
    sweep = _sweep(outcome, pending) if pending.look else None
    if sweep is not None:
        sweep.look(outcome.policy, SWEEP_S)
    limits = preflight.LIMITS._replace(total_s=PREFLIGHT_S)
    shut_out = preflight.shut_out(outcome.policy, limits) if pending.clients else None
    if sweep is None:
        return outcome._replace(shut_out=shut_out, pending=None)
    if pending.clients:
        sweep.look(outcome.policy, EXTRA_S, extra=True)
    pending.turn.finish()
    return outcome._replace(existing=sweep.result(), shut_out=shut_out, pending=None)


def tell_filter(policy: Policy | None, cgroup: str | None) -> list[str]:
    """Brings the service of the filters in line with the policy in force, if it has filters or the service runs.

    Returns warnings.
    """
    has_filters = policy is not None and bool(policy.filters)
    if not has_filters and not os.path.exists(os.path.join(lockfile.FOLDER, FILTER_SOCKET)):
        return []
    from imds_guard.commands import filter_service  # noqa: PLC0415 -- start-up time: most policies have no filters

    return filter_service.after_change(cgroup)


def _sweep(outcome: Outcome, pending: Pending) -> Sweep:
    """iptables judges one network namespace, eBPF all of them."""
    scope = Scope(pending.cgroup, every_namespace=outcome.backend == "ebpf")
    why = WhyOpen.AUDIT if outcome.policy.mode is Mode.AUDIT else WhyOpen.KEPT if pending.keep else None
    by_nat = outcome.backend == "iptables"
    listeners = _led_by_nat(outcome.policy) if by_nat else listeners_under(outcome.policy, pending.cgroup)
    return Sweep(scope, why, pending.turn.is_last, cut=why is None, listeners=listeners, by_nat=by_nat)


def _led_by_nat(policy: Policy) -> list[Listener]:
    """What listens for the filters under iptables. Where that can't be read, their connections count as direct."""
    if not policy.filters:
        return []
    from imds_guard.backends.iptables import IptablesBackend  # noqa: PLC0415 -- start-up time

    with suppress(GuardError):
        held = IptablesBackend().wanted()
        return [] if held is None else held[1]
    return []
