# SPDX-License-Identifier: Apache-2.0
"""The report of denials: nobody can fill it, and the rows of others stay in it."""

from __future__ import annotations

import ipaddress
from collections import Counter

import pytest

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
from tests.vm.machine import Controls, Machine
from tests.vm.programs import FORMS
from tests.vm.test_odd_states import CONNECT, PACKET, SERIAL, locked
from tests.vm.values import Attempt, Socket, Task

FIRST = int(ipaddress.ip_address("10.1.0.0"))
LOCKS = 300
SUB_IDS = range(231_072, 231_072 + 65_536)
"""Of one user, as useradd assigns them: in two blocks."""
BLOCKS = 196_608, 262_144
STRANGER, ANOTHER, OWNER = 1001, 1002, 1000
_TASKS = 2000


def policy() -> Policy:
    """Locks for nobody, of an address each."""
    return make_policy(
        [
            Lock(f"lock-{n}", (Endpoint(ipaddress.ip_network(FIRST + n), tcp=((80, 80),)),), Identities(frozenset({5})))
            for n in range(LOCKS)
        ]
    )


def connect(lock: int) -> Attempt:
    return Attempt("connect4", ipaddress.ip_address(FIRST + lock).packed, 80)


def denied(machine: Machine, form: str, tasks: list[Task], locks: range = range(1)) -> Counter[tuple[int, int, int]]:
    """Each task connects to each lock. The counts of the rows so far: (lock, who, ID) -> count."""
    for at in range(0, len(tasks), _TASKS):
        machine.set_tasks(tasks[at : at + _TASKS])
        for lock in locks:
            for number in range(len(tasks[at : at + _TASKS])):
                outcome = machine.attempt(form, connect(lock), number, Controls(keep_results=True))
                assert (outcome.returned, outcome.traps) == (0, frozenset())
    rows: Counter[tuple[int, int, int]] = Counter()
    for key, value in machine.map_items(Map.REPORT):
        _, _, lock, who, uid = abi.REPORT_KEY.unpack(key)
        rows[lock, who, uid] += abi.REPORT.unpack(value)[0]
    return rows


def rows_beyond_a_share_are_of_all_locks(machine: Machine) -> bool:
    """What an account has beyond its share is in one row. Another account has its own."""
    machine.load(policy())
    rows = denied(machine, machine.forms[0], [Task(STRANGER, 1)], range(LOCKS))
    beyond = LOCKS - abi.ROWS_OF_ACCOUNT
    last = denied(machine, machine.forms[0], [Task(ANOTHER, 1)])
    return (
        len(rows) == abi.ROWS_OF_ACCOUNT + 1
        and rows[abi.NO_LOCK, abi.WHO_OTHERS, STRANGER] == beyond
        and last[0, abi.WHO_USER, ANOTHER] == 1
    )


def test_rows_beyond_a_share_are_of_all_locks(machine: Machine) -> None:
    assert rows_beyond_a_share_are_of_all_locks(machine)


@pytest.mark.parametrize("form", FORMS)
def test_a_user_with_sub_ids_leaves_room_for_others(machine: Machine, form: str) -> None:
    """Outside of any user namespace, by set-user-ID programs that belong to the sub-IDs."""
    machine.load(policy())
    some = [SUB_IDS[n] for n in range(0, len(SUB_IDS), 32)]
    rows = denied(machine, form, [Task(uid, 1) for uid in some])
    assert len(rows) == 2 * abi.ROWS_OF_BLOCK + 2
    assert sum(rows.values()) == len(some)
    for block in BLOCKS:
        own = sum(abi.share_of(uid) == block for uid in some)
        assert rows[abi.NO_LOCK, abi.WHO_OTHERS, block] == own - abi.ROWS_OF_BLOCK
    rows = denied(machine, form, [Task(STRANGER, 1)])
    assert rows[0, abi.WHO_USER, STRANGER] == 1


@pytest.mark.parametrize("form", FORMS)
def test_callers_in_user_namespaces_are_one_row_of_the_owner(machine: Machine, form: str) -> None:
    machine.load(policy())
    tasks = [Task(uid, 1, user_ns_level=1 + uid % 3, user_ns_owner=OWNER) for uid in SUB_IDS[:600]]
    assert denied(machine, form, tasks) == {(0, abi.WHO_NAMESPACES, OWNER): 600}
    (key, _), *others = machine.map_items(Map.REPORT)
    assert (abi.REPORT_KEY.unpack(key)[1], others) == (Reason.CONTAINER, [])


def test_sub_ids_that_own_namespaces_share_like_sub_ids(machine: Machine) -> None:
    """A user namespace can be made inside another one, by each of its IDs."""
    machine.load(policy())
    tasks = [Task(uid, 1, user_ns_level=2, user_ns_owner=uid) for uid in range(BLOCKS[1], BLOCKS[1] + 600)]
    rows = denied(machine, "plain", tasks)
    assert len(rows) == abi.ROWS_OF_BLOCK + 1
    assert rows[abi.NO_LOCK, abi.WHO_OTHERS, BLOCKS[1]] == 600 - abi.ROWS_OF_BLOCK


def try_full_shares(machine: Machine) -> None:
    """Each form, and egress, for callers whose share is used up: all of it goes into one row."""
    for uid, most in ((STRANGER, abi.ROWS_OF_ACCOUNT), (SUB_IDS[0], abi.ROWS_OF_BLOCK)):
        for form in machine.forms:
            for hook in ("connect4", abi.EGRESS):
                machine.load(locked(), serial=SERIAL)
                machine.set_tasks([Task(uid, 1)])
                machine.set_sockets([Socket()])
                share = abi.SHARE_KEY.pack(1, abi.share_of(uid))
                machine.map_update(Map.SHARES, share, abi.SHARE.pack(most))
                for _ in range(2):
                    if hook == abi.EGRESS:
                        outcome = machine.packet(form, PACKET._replace(uid=uid), Controls(keep_results=True))
                    else:
                        outcome = machine.attempt(form, CONNECT, 0, Controls(keep_results=True))
                    assert (outcome.returned, outcome.traps, outcome.rows) == (0, frozenset(), 1)
                ((key, value),) = machine.map_items(Map.REPORT)
                assert abi.REPORT_KEY.unpack(key)[2:] == (abi.NO_LOCK, abi.WHO_OTHERS, abi.share_of(uid))
                assert abi.REPORT.unpack(value)[0] == 2
                assert machine.map_lookup(Map.SHARES, share) == abi.SHARE.pack(most)


def test_what_is_beyond_a_full_share_is_one_row(machine: Machine) -> None:
    try_full_shares(machine)


def test_a_full_report_is_counted(machine: Machine) -> None:
    """Beyond what one user can do: neither a row nor the row of others finds room."""
    machine.load(policy())
    machine.map_limit(Map.REPORT, 2)
    rows = denied(machine, "plain", [Task(uid, 1) for uid in (1001, 1002, 1003)])
    machine.map_limit(Map.REPORT, abi.REPORT_ROWS)
    assert len(rows) == 2
    counted = machine.map_lookup(Map.COUNTERS, abi.ARRAY_KEY.pack(abi.REPORT_OVERFLOW))
    assert counted is not None
    assert abi.COUNTER.unpack(counted) == (1, 0)
