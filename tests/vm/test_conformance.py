# SPDX-License-Identifier: Apache-2.0
"""Rows of the conformance table that are only about who connects where, in every form: kernel threads, too."""

from __future__ import annotations

import ipaddress
import itertools

import pytest

from imds_guard.policy.decide import Reason
from imds_guard.policy.filter_numbers import assigned, listeners_of
from imds_guard.policy.filters import FILTER_PORT
from imds_guard.policy.model import Policy
from tests.conformance.bench import sorted_by_policy
from tests.conformance.cases import MODEL_CASES
from tests.conformance.model import Case, Setting, model_caller
from tests.conformance.witness import DEAD, FOREIGN, OTHER_RULES
from tests.vm.machine import Machine
from tests.vm.values import IPPROTO_MPTCP, IPPROTO_TCP, IPPROTO_UDP, LISTEN, PF_KTHREAD, Attempt, Socket, Task

WAYS = {
    "connect": ("connect", IPPROTO_TCP),
    "mptcp": ("connect", IPPROTO_MPTCP),
    "udp-connect": ("connect", IPPROTO_UDP),
    "udp-sendto": ("sendmsg", IPPROTO_UDP),
    "udp-sendmsg-pktinfo": ("sendmsg", IPPROTO_UDP),
}
"""Form of an attempt -> hook and protocol. In the other forms the kernel does something before or after the hook."""

ROWS = [case for case in MODEL_CASES if case.attempt.form in WAYS]
POLICIES = [(policy, list(rows)) for policy, rows in itertools.groupby(sorted_by_policy(ROWS), lambda one: one.policy)]


def task_of(case: Case) -> Task:
    """The task as the kernel has it."""
    caller, groups = model_caller(case), case.who.groups
    offset = caller.fsuid - (case.who.uids[1] if case.who.fsuid is None else case.who.fsuid)
    return Task(
        caller.fsuid,
        caller.fsgid,
        tuple(sorted(offset + group for group in groups)),
        pid_level=int(not caller.pid_namespace_is_initial),
        user_ns_level=int(not caller.user_namespace_is_initial),
        flags=PF_KTHREAD if case.who.setting is Setting.KERNEL_THREAD else 0,
    )


def attempt_of(case: Case) -> Attempt:
    """What the hook sees of it."""
    attempt = case.attempt
    kind, protocol = WAYS[attempt.form]
    to = ipaddress.ip_address(attempt.to)
    own = None if attempt.bind is None else ipaddress.ip_address(attempt.bind).packed
    message = own
    if attempt.packet_info is not None:
        given = attempt.packet_info.source
        message = None if given is None else ipaddress.ip_address(given).packed
    return Attempt(
        f"{kind}{to.version}",
        to.packed,
        attempt.port,
        protocol,
        own,
        message,
        device=int(attempt.device),
        others=listeners(case),
    )


def listeners(case: Case) -> tuple[Socket, ...]:
    """What listens where the caller's filter should, as the row says."""
    if case.filter == DEAD or case.who.setting is Setting.NETWORK_NAMESPACE:
        return ()
    found = [one for one in listeners_of(case.policy, assigned(case.policy)) if one.filter == case.filter]
    return tuple(
        Socket(
            one.address.packed,
            local_port=FILTER_PORT,
            state=LISTEN,
            filter_mark=None if case.filter == FOREIGN else one.digest ^ (case.filter == OTHER_RULES),
        )
        for one in found
    )


@pytest.mark.parametrize(("policy", "rows"), POLICIES, ids=[rows[0].name for _, rows in POLICIES])
def test_rows(machine: Machine, bare: Machine, policy: Policy, rows: list[Case]) -> None:
    """A policy without filters has programs without their code."""
    for one in (machine,) if policy.filters else (machine, bare):
        try_rows(one, policy, rows)


def try_rows(machine: Machine, policy: Policy, rows: list[Case]) -> None:
    machine.load(policy)
    machine.set_tasks([task_of(case) for case in rows])
    for number, case in enumerate(rows):
        reason = None if case.expected is Reason.NOT_LOCKED else case.expected.label
        for form in machine.forms:
            outcome = machine.attempt(form, attempt_of(case), number)
            found = outcome.allowed, outcome.reason, outcome.to is not None, set(outcome.traps)
            assert found == (case.allowed, reason, case.attempt.greeted, set()), (case.id, form)
