# SPDX-License-Identifier: Apache-2.0
"""Where filters listen, under iptables: who listens there now, and who could. Whether leading callers there works.

Rules can't ask whether the socket at an address is a filter's, as the hooks of eBPF can. These hold instead:

- Only root, or who has CAP_NET_BIND_SERVICE, can listen at port 169. Where anybody can, filters are refused.
- A number gets no new meaning while somebody listens at one of its addresses, and none that the policy in force uses
  (assigned_afresh()). A service that has just begun to listen looks once more whether the policy still wants that
  place (commands/filter_service.py). So either the one sees the listener, or the other sees the new policy.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imds_guard.backends.iptables import marks
from imds_guard.backends.iptables.form import Form
from imds_guard.backends.iptables.programs import Program
from imds_guard.backends.iptables.render import ResolvedPolicy, render
from imds_guard.backends.iptables.tables import LockHeld, replace, rule_texts
from imds_guard.errors import GuardError, Unsupported, trying
from imds_guard.kernel import credentials, netns
from imds_guard.kernel.children import run_in_child
from imds_guard.kernel.sock_diag import LISTEN, SockDiag
from imds_guard.policy.filter_address import listener_address, numbers_in
from imds_guard.policy.filter_numbers import Numbers
from imds_guard.policy.filters import FILTER_NETWORK, FILTER_PORT, Filter, Target
from imds_guard.policy.model import NOBODY, Endpoint, Lock, Mode, Policy, make_policy

if TYPE_CHECKING:
    from imds_guard.backends.iptables.probe import ProbeResult


def listening() -> set[tuple[int, int]]:
    """T and F of every address at which somebody listens in this network namespace. Raises GuardError."""
    with trying("looking who listens where filters do", "run the command again"), SockDiag() as diag:
        found = [
            ipaddress.IPv4Address(one.local)
            for one in diag.each_socket(socket.AF_INET, socket.IPPROTO_TCP, (LISTEN,))
            if one.local_port == FILTER_PORT
        ]
    return {numbers_in(address) for address in found if address in FILTER_NETWORK}


def fault_of_port() -> str:
    """A sentence when anybody can listen where filters do. "" otherwise."""
    first = netns.first_unprivileged_port()
    if first > FILTER_PORT:
        return ""
    return (
        f"net.ipv4.ip_unprivileged_port_start is {first}, so any process can listen at port {FILTER_PORT} in place of "
        f"a filter that is dead; set it above {FILTER_PORT}"
    )


def require(
    policy: Policy, programs: Sequence[Program], probed: ProbeResult, resolves_groups: bool, lock_wait_s: int
) -> None:
    """Raises Unsupported where filters need what lists don't, and it is not here."""
    grouped = sorted(one.name for one in policy.filters if one.who.groups)
    if grouped and (not probed.supplementary or resolves_groups):
        why = "leave --resolve-groups out" if probed.supplementary else probed.reason
        raise Unsupported(
            f"filter {grouped[0]!r} lists groups, and groups of filters are never put in the rules as users: {why}"
        )
    if probed.conclusive:
        require_form(probed.form)
    fault = fault_of_port()
    if not fault and probed.conclusive and policy.mode is Mode.ENFORCE:
        fault = _refusal(programs, probed.form, lock_wait_s)
    if fault:
        raise Unsupported(f"{_CAN_NOT_LEAD}: {fault}")


_CAN_NOT_LEAD = "iptables can't lead callers to filters here"


def require_form(form: Form) -> None:
    """Raises Unsupported for a form of the rules without marks."""
    if form is Form.FILTER:
        raise Unsupported(f"{_CAN_NOT_LEAD}: marks (the target MARK and the match mark) do not work, or can't be tried")


# --- does it work? ----------------------------------------------------------------------------------------------------

_LOCKED, _PORT = "127.0.0.2", 64_320
_USER = 64_321
_CONNECT_TIMEOUT_S = 5.0


def _refusal(programs: Sequence[Program], form: Form, lock_wait_s: int) -> str:
    """Why callers can't be led to a filter; "" where they can. Tried in a namespace of its own. Raises LockHeld."""
    programs = [program for program in programs if program.version == 4]
    return run_in_child(lambda: _try(programs, form, lock_wait_s), timeout_s=60)


def _try(programs: Sequence[Program], form: Form, lock_wait_s: int) -> str:
    """A policy with one filter for one user, and a listener at its place."""
    target, here = Target(ipaddress.ip_address(_LOCKED), _PORT), str(listener_address(1, 1))
    lock = Lock("probe", (Endpoint(ipaddress.ip_network(_LOCKED), ((_PORT, _PORT),)),))
    one = Filter("probe", ("probe",), NOBODY._replace(users=frozenset((_USER,))), port=_PORT)
    wanted = ResolvedPolicy(make_policy([lock], filters=[one]), None, Numbers({target: 1}, {"probe": 1}))
    netns.unshare_network([])
    try:
        if form is Form.NFT:
            marks.put("")
        for program in programs:
            for anchor, part in form.parts.items():
                replace(program, anchor, rule_texts(render(wanted, 4, part)), lock_wait_s)
    except LockHeld:
        raise
    except GuardError as error:
        return str(error)
    with socket.socket() as listener:
        try:
            listener.bind((here, FILTER_PORT))
        except PermissionError:
            return "listening at port 169 to try it takes CAP_NET_BIND_SERVICE"
        listener.listen()
        if not run_in_child(lambda: _connects(_LOCKED, _PORT)):
            return "a caller that DNAT leads to a filter did not get there"
        if run_in_child(lambda: _connects(here, FILTER_PORT)):
            return "a connect to the address of a filter, past DNAT, was not denied"
    return ""


def _connects(address: str, port: int) -> bool:
    credentials.become((_USER,) * 3, (_USER,) * 3, [])
    with socket.socket() as one:
        one.settimeout(_CONNECT_TIMEOUT_S)
        return one.connect_ex((address, port)) == 0
