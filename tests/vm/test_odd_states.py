# SPDX-License-Identifier: Apache-2.0
"""States that should not be: records of zeros or junk, tasks without credentials, loads that fault, full maps.

On doubt a locked endpoint is denied. Where a state is one that has a meaning, the test says which.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest

from imds_guard.backends.ebpf import abi, program
from imds_guard.backends.ebpf.abi import Map
from imds_guard.policy.decide import MAX_WALKED_GROUPS
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS
from tests.vm.machine import CRED, GROUP_INFO, NOTHING, PID, TASK, USER_NS, Controls, Machine
from tests.vm.programs import FORMS, reads_directly
from tests.vm.values import PF_KTHREAD, Attempt, Outcome, Task, packed

ADDRESS = "169.254.169.254"
CONNECT = Attempt("connect4", packed(ADDRESS), 80)
BESIDE = Attempt("connect4", packed("169.254.169.253"), 80)
USER, GROUPS = 1000, tuple(range(7, 107))
STRANGER = Task(5, 5, (6,))
SERIAL = 9

DENIED_WITHOUT_SETTINGS = (0, "no-settings")
UNREADABLE = (0, "unreadable")
PASSES = (1, None)


def locked(mode: Mode = Mode.ENFORCE, *, default: Verdict = Verdict.DENY, containers: Verdict = Verdict.DENY) -> Policy:
    """The fake service, locked for all but user 1000 and 100 groups."""
    endpoint = Endpoint(ipaddress.ip_network(ADDRESS), ALL_PORTS, ALL_PORTS)
    allowed = Identities(frozenset({USER}), frozenset(GROUPS))
    return make_policy([Lock("imds", (endpoint,), allowed, default=default)], mode, containers, strict=True)


def verdict(outcome: Outcome) -> tuple[int, str | None]:
    return outcome.returned, outcome.reason


# --- tasks ------------------------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """A member of a kernel struct that the hooks read."""

    which: int
    struct: str
    member: str
    size: int

    @property
    def offset(self) -> int:
        """Where it is, on the running kernel."""
        return dict(program.kernel_offsets())[f"IG_OFF_{self.struct}_{self.member}".upper()]

    def set(self, machine: Machine, value: int) -> None:
        """Gives task 0 another value there."""
        machine.poke(0, self.which, self.offset, (value & (1 << 8 * self.size) - 1).to_bytes(self.size, "little"))


TASK_CRED, CRED_GROUP_INFO = Field(TASK, "task_struct", "cred", 8), Field(CRED, "cred", "group_info", 8)
CRED_USER_NS, THREAD_PID = Field(CRED, "cred", "user_ns", 8), Field(TASK, "task_struct", "thread_pid", 8)
FSUID, FSGID = Field(CRED, "cred", "fsuid", 4), Field(CRED, "cred", "fsgid", 4)
FLAGS, LEVEL = Field(TASK, "task_struct", "flags", 4), Field(USER_NS, "user_namespace", "level", 4)
PID_LEVEL, NGROUPS = Field(PID, "pid", "level", 4), Field(GROUP_INFO, "group_info", "ngroups", 4)
FIRST_GID = Field(GROUP_INFO, "group_info", "gid", 4)

LISTED_USER, IN_A_GROUP = Task(USER, 5), Task(5, 5, (7,))
WALKED, SEARCHED = Task(5, 5, tuple(range(500, 1500))), Task(5, 5, tuple(range(500, 500 + MAX_WALKED_GROUPS + 100)))
WILD = 0x0000_DEAD_BEEF_0000


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("field", "value", "task", "expected"),
    [
        (TASK_CRED, 0, LISTED_USER, UNREADABLE),
        (CRED_USER_NS, 0, LISTED_USER, UNREADABLE),
        (THREAD_PID, 0, LISTED_USER, UNREADABLE),
        (CRED_GROUP_INFO, 0, IN_A_GROUP, UNREADABLE),
        (CRED_GROUP_INFO, WILD, IN_A_GROUP, UNREADABLE),
        (FSUID, -1, LISTED_USER, (0, "not-listed")),
        (FSGID, -1, LISTED_USER, (1, "allowed-user")),
        (LEVEL, -1, LISTED_USER, (0, "container")),
        (PID_LEVEL, -1, LISTED_USER, (0, "container")),
        (NGROUPS, 65_537, WALKED, UNREADABLE),
        (NGROUPS, -1, WALKED, UNREADABLE),
        (NGROUPS, 1_010, WALKED, UNREADABLE),  # more than there are: what lies behind them can't be read
        (NGROUPS, 65_536, SEARCHED, UNREADABLE),
        (NGROUPS, 0, IN_A_GROUP, (0, "not-listed")),
        (FIRST_GID, -1, IN_A_GROUP, (0, "not-listed")),
    ],
    ids=lambda one: f"{one.struct}.{one.member}" if isinstance(one, Field) else None,
)
def test_what_a_task_should_not_have(
    machine: Machine, form: str, field: Field, value: int, task: Task, expected: tuple[int, str]
) -> None:
    machine.load(locked(), serial=SERIAL)
    machine.set_tasks([task])
    field.set(machine, value)
    outcome = machine.attempt(form, CONNECT)
    assert verdict(outcome) == expected
    assert outcome.traps <= {"kernel_read"}  # the helper says -EFAULT


@pytest.mark.parametrize("form", FORMS)
def test_a_user_namespace_that_cannot_be_read_is_not_the_initial_one(machine: Machine, form: str) -> None:
    """Also where containers are allowed: the default is for the initial namespace alone."""
    machine.load(locked(default=Verdict.ALLOW, containers=Verdict.ALLOW))
    machine.set_tasks([STRANGER])
    assert verdict(machine.attempt(form, CONNECT)) == (1, "default-allow")
    CRED_USER_NS.set(machine, 0)
    assert verdict(machine.attempt(form, CONNECT)) == UNREADABLE


_PLAIN_LOADS = {
    TASK_CRED: "NULL is no credentials: denied.",
    CRED_USER_NS: "NULL is no namespace: denied.",
    THREAD_PID: "NULL is a task that is gone: denied.",
    **dict.fromkeys(
        (FSUID, FSGID, FLAGS, LEVEL, PID_LEVEL),
        "0 is a value: root, no kernel thread, the initial namespace. These loads can't fault: the pointer was tested, "
        "and the running task holds references to its credentials, to their namespace and to its thread_pid.",
    ),
}
"""What the 0 means that a plain load gives where it faults (BPF_PROBE_MEM). Decided for each load. group_info, ngroups
and the groups are always read by the helper, which says -EFAULT."""

_OF_EVERYBODY = (TASK_CRED, FSUID, FSGID, FLAGS)
_ROOT, _THREAD = Task(0, 0), Task(USER, 5, flags=PF_KTHREAD)
_ANYWHERE = locked(default=Verdict.ALLOW, containers=Verdict.ALLOW)


@pytest.mark.parametrize("form", [form for form in FORMS if reads_directly(form)])
@pytest.mark.parametrize(
    ("policy", "task", "fields"),
    [
        (locked(), LISTED_USER, tuple(_PLAIN_LOADS)),
        (locked(), IN_A_GROUP, tuple(_PLAIN_LOADS)),
        (locked(), STRANGER, tuple(_PLAIN_LOADS)),
        (locked(), _ROOT, tuple(_PLAIN_LOADS)),
        (locked(), _THREAD, _OF_EVERYBODY),
        (locked(), LISTED_USER._replace(user_ns_level=1), tuple(_PLAIN_LOADS)),
        (locked(), LISTED_USER._replace(pid_level=1), tuple(_PLAIN_LOADS)),
        (_ANYWHERE, LISTED_USER, _OF_EVERYBODY),
        (_ANYWHERE, STRANGER, (*_OF_EVERYBODY, CRED_USER_NS, LEVEL)),
        (_ANYWHERE, STRANGER._replace(user_ns_level=1), (*_OF_EVERYBODY, CRED_USER_NS, LEVEL)),
    ],
    ids=[
        *("user", "group", "stranger", "root", "kernel-thread", "user-namespace", "pid-namespace"),
        *("user-anywhere", "stranger-anywhere", "user-namespace-anywhere"),
    ],
)  # fmt: skip
def test_a_plain_load_that_faults_is_a_zero(
    machine: Machine, form: str, policy: Policy, task: Task, fields: tuple[Field, ...]
) -> None:
    """These members are loaded, no others, and a load that faults does what a 0 in one of them does."""
    machine.load(policy, serial=SERIAL, log_allowed=True)
    machine.set_tasks([task])
    count = machine.attempt(form, CONNECT).loads
    faults = [Controls(fail_load=number) for number in range(1, count + 1)]
    faulting = Counter(machine.attempt_bytes(form, CONNECT, controls=one) for one in faults)
    assert faulting == Counter(with_zero(machine, form, task, field) for field in fields)


def with_zero(machine: Machine, form: str, task: Task, field: Field) -> bytes:
    """A struct outcome. Without a pointer the caller is denied."""
    machine.set_tasks([task])
    field.set(machine, 0)
    raw = machine.attempt_bytes(form, CONNECT)
    if field.size == 8:
        assert verdict(machine.attempt(form, CONNECT)) == UNREADABLE, field
    return raw


# --- records ----------------------------------------------------------------------------------------------------------

Change = Callable[[Machine], None]
LIST_0 = abi.list_key(1, 0)


def put(number: Map, key: bytes, value: bytes) -> Change:
    return lambda machine: machine.map_update(number, key, value)


def ranges(count: int, *packed_ranges: bytes) -> Change:
    """The locked address has these ranges, and says that there are so many."""
    value = (abi.ENDPOINT_HEAD.pack(count) + b"".join(packed_ranges)).ljust(abi.ENDPOINT_BYTES, b"\0")

    def change(machine: Machine) -> None:
        (key,) = (key for key, _ in machine.map_items(Map.ENDPOINTS) if key.endswith(packed(ADDRESS)))
        machine.map_update(Map.ENDPOINTS, key, value)

    return change


def a_range(low: int, high: int, lists: int = 0) -> bytes:
    return abi.RANGE.pack(low, high, 0, lists, abi.TCP | abi.UDP, 0)


def in_force(generation: int) -> Change:
    return put(Map.CONFIG, abi.ARRAY_KEY.pack(0), abi.CONFIG.pack(generation))


def searched(denied: int, length: int) -> Change:
    return put(Map.GROUPS, abi.SMALL_KEY.pack(1, 0), abi.GROUPS.pack(denied, length, *GROUPS, *bytes(28)))


ZERO_SETTINGS = put(Map.SETTINGS, abi.ARRAY_KEY.pack(1), bytes(abi.SETTINGS.size))
IN_MANY_GROUPS = Task(5, 5, tuple(range(100, 100 + MAX_WALKED_GROUPS + 100)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    ("change", "task", "expected"),
    [
        (ZERO_SETTINGS, LISTED_USER, DENIED_WITHOUT_SETTINGS),
        (put(Map.LISTS, LIST_0, bytes(abi.LIST.size)), LISTED_USER, UNREADABLE),
        (in_force(0), STRANGER, PASSES),  # nothing is locked
        (in_force(2), STRANGER, PASSES),  # a policy without locks, as far as a hook can see
        (in_force(3), STRANGER, PASSES),  # its bitmap is not there, and the trie has nothing of it
        (ranges(0), STRANGER, PASSES),  # an endpoint that keeps a shorter prefix from its address
        (ranges(2**32 - 1, *[a_range(0, 65535)] * abi.RANGES), STRANGER, (0, "not-listed")),
        (ranges(abi.RANGES, *[a_range(1, 2)] * (abi.RANGES - 1), a_range(80, 80)), STRANGER, (0, "not-listed")),
        (ranges(2**32 - 1, *[a_range(1, 2)] * abi.RANGES), STRANGER, PASSES),
        (ranges(1, a_range(0, 65535, lists=5000)), LISTED_USER, UNREADABLE),  # of the other generation: not valid
        (ranges(1, a_range(0, 65535, lists=2 * abi.LISTS)), LISTED_USER, UNREADABLE),
        (ranges(1, a_range(0, 65535, lists=abi.NO_LIST)), LISTED_USER, (0, "unspecified-destination")),
        (searched(0, 100), IN_MANY_GROUPS, (1, "allowed-group")),
        (searched(100, 100), IN_MANY_GROUPS, (0, "denied-group")),
        (searched(0, 0), IN_MANY_GROUPS, (0, "not-listed")),
        (searched(0, 129), IN_MANY_GROUPS, UNREADABLE),
        (lambda machine: machine.map_delete(Map.GROUPS, abi.SMALL_KEY.pack(1, 0)), IN_MANY_GROUPS, UNREADABLE),
    ],
    ids=[
        *("zero-settings", "zero-list", "nothing-in-force", "empty-generation", "generation-3", "no-ranges"),
        *("countless-ranges", "the-last-range", "countless-other-ranges", "list-5000", "list-8192", "no-list"),
        *("searched", "searched-denied", "searched-none", "searched-129", "no-groups-to-search"),
    ],
)  # fmt: skip
def test_a_record_that_should_not_be(
    machine: Machine, form: str, mode: Mode, change: Change, task: Task, expected: tuple[int, str | None]
) -> None:
    """Under audit the reason is the same and the connect passes, except without settings: nobody knows the mode."""
    machine.load(locked(mode), serial=SERIAL)
    machine.set_tasks([task])
    with machine.rollback():
        change(machine)
        outcome = machine.attempt(form, CONNECT)
        beside = machine.attempt(form, BESIDE)
    audited = mode is Mode.AUDIT and expected != DENIED_WITHOUT_SETTINGS
    assert verdict(outcome) == ((1, expected[1]) if audited else expected)
    assert (outcome.traps, verdict(beside), beside.traps) == (frozenset(), PASSES, frozenset())
    if not outcome.allowed:
        assert outcome.mark in (None, bytes(abi.MARK.size))


# --- full maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_full_report_and_a_full_ring_buffer_change_no_verdict(machine: Machine, form: str) -> None:
    machine.load(locked())
    machine.set_tasks([STRANGER, LISTED_USER])
    try:
        machine.map_limit(Map.REPORT, 0)
        denied = machine.attempt(form, CONNECT, controls=Controls(ring_full=True))
        allowed = machine.attempt(form, CONNECT, 1, Controls(ring_full=True))
    finally:
        machine.map_limit(Map.REPORT, abi.SHAPES[Map.REPORT].max_entries)
    assert (denied.returned, denied.events, denied.rows) == (0, 0, 0)
    assert denied.counts == {"not-listed": (1, 0), "lost-events": (1, 0), "report-overflow": (1, 0)}
    assert (allowed.returned, allowed.counts) == (1, {"allowed-user": (1, 0)})
    assert machine.attempt(form, CONNECT, controls=NOTHING).counts == {"not-listed": (1, 0)}
