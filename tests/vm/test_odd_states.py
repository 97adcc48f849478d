# SPDX-License-Identifier: Apache-2.0
"""States that should not be: records of zeros or junk, tasks without credentials, loads that fault, full maps.

On doubt a locked endpoint is denied. Where a state is one that has a meaning, the test says which.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from imds_guard.backends.ebpf import abi, program
from imds_guard.backends.ebpf.abi import Map
from imds_guard.policy.decide import MAX_WALKED_GROUPS
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS
from tests import packets
from tests.packets import Ipv4, Ipv6
from tests.vm import decisions, egress
from tests.vm.decisions import Scene
from tests.vm.egress import EgressScene, egress_forms
from tests.vm.machine import CRED, GROUP_INFO, NOTHING, PID, TASK, USER_NS, Controls, Machine, failing
from tests.vm.packets import PacketCase
from tests.vm.programs import ADDRESS_HOOKS, FORMS, reads_directly
from tests.vm.structs import OutcomeC
from tests.vm.values import (
    ESTABLISHED,
    ETH_P_IPV6,
    IPPROTO_MPTCP,
    IPPROTO_TCP,
    IPPROTO_UDP,
    PF_KTHREAD,
    Attempt,
    Outcome,
    Packet,
    Socket,
    Task,
    packed,
)

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


TASK_ROWS: dict[str, tuple[Field, int, Task, tuple[int, str]]] = {
    "no-credentials": (TASK_CRED, 0, LISTED_USER, UNREADABLE),
    "no-user-namespace": (CRED_USER_NS, 0, LISTED_USER, UNREADABLE),
    "no-thread-pid": (THREAD_PID, 0, LISTED_USER, UNREADABLE),
    "no-groups": (CRED_GROUP_INFO, 0, IN_A_GROUP, UNREADABLE),
    "groups-elsewhere": (CRED_GROUP_INFO, WILD, IN_A_GROUP, UNREADABLE),
    "user-minus-1": (FSUID, -1, LISTED_USER, (0, "not-listed")),
    "group-minus-1": (FSGID, -1, LISTED_USER, (1, "allowed-user")),
    "user-namespace-level-minus-1": (LEVEL, -1, LISTED_USER, (0, "container")),
    "pid-level-minus-1": (PID_LEVEL, -1, LISTED_USER, (0, "container")),
    "65537-groups": (NGROUPS, 65_537, WALKED, UNREADABLE),
    "minus-1-groups": (NGROUPS, -1, WALKED, UNREADABLE),
    "more-groups-than-there-are": (NGROUPS, 1_010, WALKED, UNREADABLE),
    "more-groups-than-there-are-to-search": (NGROUPS, 65_536, SEARCHED, UNREADABLE),
    "0-groups": (NGROUPS, 0, IN_A_GROUP, (0, "not-listed")),
    "supplementary-group-minus-1": (FIRST_GID, -1, IN_A_GROUP, (0, "not-listed")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", TASK_ROWS)
def test_what_a_task_should_not_have(machine: Machine, form: str, row: str) -> None:
    field, value, task, expected = TASK_ROWS[row]
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
    faulting = Counter(_without_who(machine.attempt_bytes(form, CONNECT, controls=one)) for one in faults)
    assert faulting == Counter(_without_who(with_zero(machine, form, task, field)) for field in fields)


def _without_who(raw: bytes) -> bytes:
    """Whom the row is about is read once more, by the helper."""
    outcome = OutcomeC.from_buffer_copy(raw)
    outcome.row_key[:] = bytes(len(outcome.row_key))
    return bytes(outcome)


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
    return abi.RANGE.pack(low, high, 0, lists, abi.TCP | abi.UDP, 0, 0)


def in_force(generation: int) -> Change:
    return put(Map.CONFIG, abi.ARRAY_KEY.pack(0), abi.CONFIG.pack(generation))


def searched(denied: int, length: int) -> Change:
    return put(Map.GROUPS, abi.SMALL_KEY.pack(1, 0), abi.GROUPS.pack(denied, length, *GROUPS, *bytes(28)))


def without_groups_to_search(machine: Machine) -> None:
    machine.map_delete(Map.GROUPS, abi.SMALL_KEY.pack(1, 0))


ZERO_SETTINGS = put(Map.SETTINGS, abi.ARRAY_KEY.pack(1), bytes(abi.SETTINGS.size))
IN_MANY_GROUPS = Task(5, 5, tuple(range(100, 100 + MAX_WALKED_GROUPS + 100)))


_OTHER_RANGES, _ITS_RANGE = [a_range(1, 2)] * (abi.RANGES - 1), a_range(80, 80)
RECORD_ROWS: dict[str, tuple[Change, Task, tuple[int, str | None]]] = {
    "zero-settings": (ZERO_SETTINGS, LISTED_USER, DENIED_WITHOUT_SETTINGS),
    "zero-list": (put(Map.LISTS, LIST_0, bytes(abi.LIST.size)), LISTED_USER, UNREADABLE),
    "nothing-in-force": (in_force(0), STRANGER, PASSES),
    "empty-generation": (in_force(2), STRANGER, PASSES),  # a policy without locks, as far as a hook can see
    "generation-3": (in_force(3), STRANGER, PASSES),  # it has no bitmap, and the trie has nothing of it
    "no-ranges": (ranges(0), STRANGER, PASSES),  # an endpoint that keeps a shorter prefix from its address
    "countless-ranges": (ranges(2**32 - 1, *[a_range(0, 65535)] * abi.RANGES), STRANGER, (0, "not-listed")),
    "the-last-range": (ranges(abi.RANGES, *_OTHER_RANGES, _ITS_RANGE), STRANGER, (0, "not-listed")),
    "countless-other-ranges": (ranges(2**32 - 1, *_OTHER_RANGES, a_range(1, 2)), STRANGER, PASSES),
    "list-5000": (ranges(1, a_range(0, 65535, lists=5000)), LISTED_USER, UNREADABLE),  # of generation 2: not valid
    "list-8192": (ranges(1, a_range(0, 65535, lists=2 * abi.LISTS)), LISTED_USER, UNREADABLE),
    "no-list": (ranges(1, a_range(0, 65535, lists=abi.NO_LIST)), LISTED_USER, (0, "unspecified-destination")),
    "searched": (searched(0, 100), IN_MANY_GROUPS, (1, "allowed-group")),
    "searched-denied": (searched(100, 100), IN_MANY_GROUPS, (0, "denied-group")),
    "searched-none": (searched(0, 0), IN_MANY_GROUPS, (0, "not-listed")),
    "searched-128": (searched(0, 128), SEARCHED, (0, "not-listed")),
    "searched-129": (searched(0, 129), IN_MANY_GROUPS, UNREADABLE),
    "nothing-to-search": (without_groups_to_search, IN_MANY_GROUPS, UNREADABLE),
}


def test_a_strict_policy_approves_no_socket_of_mptcp(machine: Machine, bare: Machine) -> None:
    for one in (machine, bare):
        mptcp_under_strict(one)


def mptcp_under_strict(machine: Machine) -> None:
    """In each form and mode, for an allowed caller and another one."""
    for form, mode in itertools.product(machine.forms, Mode):
        machine.load(locked(mode), serial=SERIAL)
        machine.set_tasks([LISTED_USER, STRANGER])
        tried = CONNECT._replace(protocol=IPPROTO_MPTCP)
        passes = int(mode is Mode.AUDIT)
        assert verdict(machine.attempt(form, tried, 0)) == (passes, "unapproved-socket")
        assert verdict(machine.attempt(form, tried, 1)) == (passes, "not-listed")


CALLS_BEFORE_THE_RECORD = 8


@pytest.mark.parametrize("form", FORMS)
def test_without_settings_the_record_still_names_the_caller(machine: Machine, form: str) -> None:
    without_settings(machine, form)


def without_settings(machine: Machine, form: str) -> None:
    """A caller that can't be read either is denied all the same."""
    machine.load(locked(), serial=SERIAL)
    machine.set_tasks([LISTED_USER])
    ZERO_SETTINGS(machine)
    outcome = machine.attempt(form, CONNECT)
    assert (verdict(outcome), outcome.traps) == (DENIED_WITHOUT_SETTINGS, frozenset())
    found = outcome.record
    assert found is not None
    assert (found.fsuid, found.fsgid, found.comm) == (USER, LISTED_USER.fsgid, LISTED_USER.comm)
    for number in range(5, CALLS_BEFORE_THE_RECORD + 1):  # those before find the settings
        outcome = machine.attempt(form, CONNECT, controls=failing(number))
        assert (outcome.returned, outcome.traps) == (0, frozenset())
    TASK_CRED.set(machine, 0)
    outcome = machine.attempt(form, CONNECT)
    assert (verdict(outcome), outcome.traps) == (DENIED_WITHOUT_SETTINGS, frozenset())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("row", RECORD_ROWS)
def test_a_record_that_should_not_be(machine: Machine, form: str, mode: Mode, row: str) -> None:
    """Under audit the reason is the same and the connect passes, except without settings: nobody knows the mode."""
    change, task, expected = RECORD_ROWS[row]
    machine.load(locked(mode), serial=SERIAL)
    machine.set_tasks([task])
    change(machine)
    outcome = machine.attempt(form, CONNECT)
    beside = machine.attempt(form, BESIDE)
    audited = mode is Mode.AUDIT and expected != DENIED_WITHOUT_SETTINGS
    assert verdict(outcome) == ((1, expected[1]) if audited else expected)
    assert (outcome.traps, verdict(beside), beside.traps) == (frozenset(), PASSES, frozenset())
    if not outcome.allowed:
        assert outcome.mark in (None, bytes(abi.MARK.size))


# --- packets ----------------------------------------------------------------------------------------------------------

_TO_SERVICE = Ipv4(packed("10.0.0.1"), packed(ADDRESS), packets.TCP)
PACKET = Packet(_TO_SERVICE.packet(packets.tcp(40_000, 80, packets.ACK)), interface=1, socket=0)
_ANSWER = Ipv4(packed(ADDRESS), packed(ADDRESS), packets.TCP).packet(packets.tcp(80, 40_000, packets.ACK))
ANSWER, CLIENT = (
    Packet(_ANSWER, interface=1, socket=0),
    Socket(packed(ADDRESS), packed(ADDRESS), 40_000, 80, ESTABLISHED),
)
UNREADABLE_PACKET = Packet(_TO_SERVICE._replace(words=4).packet(packets.tcp(40_000, 80)), socket=0)
APPROVED = abi.MARK.pack(SERIAL, USER, 0, 0, abi.MARK_USER, 0)
UNAPPROVED = (0, "unapproved-socket")
_Verdict = tuple[int, "str | None"]
PACKET_ROWS: dict[str, tuple[Change, _Verdict, _Verdict, _Verdict]] = {
    "zero-settings": (ZERO_SETTINGS, DENIED_WITHOUT_SETTINGS, DENIED_WITHOUT_SETTINGS, DENIED_WITHOUT_SETTINGS),
    "zero-list": (put(Map.LISTS, LIST_0, bytes(abi.LIST.size)), UNAPPROVED, UNAPPROVED, UNAPPROVED),
    "nothing-in-force": (in_force(0), PASSES, PASSES, PASSES),
    "empty-generation": (in_force(2), PASSES, PASSES, PASSES),
    "generation-3": (in_force(3), PASSES, PASSES, PASSES),
    "no-ranges": (ranges(0), PASSES, PASSES, PASSES),
    "countless-other-ranges": (ranges(2**32 - 1, *_OTHER_RANGES, a_range(1, 2)), PASSES, PASSES, UNAPPROVED),
    "another-last-range": (ranges(abi.RANGES, *_OTHER_RANGES, a_range(40_000, 40_000)), PASSES, PASSES, UNAPPROVED),
    "list-8192": (ranges(1, a_range(0, 65535, lists=2 * abi.LISTS)), UNAPPROVED, UNAPPROVED, UNAPPROVED),
    "no-list": (ranges(1, a_range(0, 65535, lists=abi.NO_LIST)), UNAPPROVED, UNAPPROVED, UNAPPROVED),
}
"""A packet of an approved socket, of one without a mark, and an unreadable packet of an approved socket."""


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("row", PACKET_ROWS)
def test_a_packet_under_a_record_that_should_not_be(machine: Machine, mode: Mode, row: str) -> None:
    change, *expected = PACKET_ROWS[row]
    machine.load(locked(mode), serial=SERIAL)
    change(machine)
    for mark, packet, wanted in zip((APPROVED, None, APPROVED), (PACKET, PACKET, UNREADABLE_PACKET), expected):
        machine.set_sockets([Socket(mark=mark)])
        audited = mode is Mode.AUDIT and wanted == UNAPPROVED
        for form in egress_forms(machine):
            outcome = machine.packet(form, packet)
            assert (verdict(outcome), outcome.traps) == ((1, wanted[1]) if audited else wanted, frozenset())


_FOR_AN_OPEN_PORT = abi.MARK.pack(SERIAL, USER, 0, 0, abi.MARK_OPEN, 0)


def every_odd_packet(machine: Machine) -> Iterator[PacketCase]:
    """Each of these under each record, with and without a mark."""
    for mode, row, mark in itertools.product(Mode, PACKET_ROWS, (APPROVED, None)):
        for packet in (PACKET, UNREADABLE_PACKET, ANSWER):
            machine.load(locked(mode), serial=SERIAL)
            PACKET_ROWS[row][0](machine)
            yield PacketCase(packet, (Socket(mark=mark), CLIENT._replace(mark=mark)))


def try_odd_packets(machine: Machine) -> None:
    """Each of these once, and once more with a row in the report."""
    for row in PACKET_ROWS:
        test_a_packet_under_a_record_that_should_not_be(machine, Mode.ENFORCE, row)
    for row, mark in itertools.product(PACKET_ROWS, (APPROVED, None)):
        machine.load(locked(), serial=SERIAL)
        PACKET_ROWS[row][0](machine)
        machine.set_sockets([Socket(), CLIENT._replace(mark=mark)])
        assert not any(machine.packet(form, ANSWER).traps for form in egress_forms(machine))
        machine.set_sockets([Socket(mark=_FOR_AN_OPEN_PORT, earlier=APPROVED * abi.EARLIER_MARKS)])
        assert not any(machine.packet(form, PACKET).traps for form in egress_forms(machine))
    machine.load(locked(), serial=SERIAL)
    machine.set_sockets([Socket()])
    for form, keep_results in itertools.product(egress_forms(machine), (False, True)):
        assert not machine.packet(form, PACKET, Controls(keep_results=keep_results)).allowed


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


# --- for coverage.py and mutate.py ------------------------------------------------------------------------------------

_IPV6 = "::ffff:" + ADDRESS
_ODD_SOURCES = (
    "1::",
    "0:1::",
    "0:0:1::",
    "0:0:0:1::",
    "::1:0:0",
    "::2:0",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:0:0",
    "::",
)
_TO = (bytes(16), packed(_IPV6))
TRIED = (
    CONNECT,
    CONNECT._replace(repeat=2),
    BESIDE,
    *(Attempt(hook, packed(_IPV6 if hook.endswith("6") else ADDRESS), 80, IPPROTO_UDP) for hook in ADDRESS_HOOKS),
    *(Attempt("sendmsg6", to, 80, IPPROTO_UDP, packed(_IPV6), packed(one)) for to in _TO for one in _ODD_SOURCES),
    *(Attempt("connect6", to, 80, source=packed(one)) for to in _TO for one in _ODD_SOURCES),
)
"""What is tried in each odd state."""


def odd_policy() -> Policy:
    """Locks the odd addresses but the unspecified ones."""
    endpoints = tuple(Endpoint(ipaddress.ip_network(one), ALL_PORTS, ALL_PORTS) for one in _ODD_SOURCES[:8])
    return make_policy([Lock("odd", endpoints)], strict=True)


def odd_addresses() -> Scene:
    """From each odd address to each: those in which one word alone is not zero."""
    attempts = [
        Attempt(hook, packed(to), 80, protocol, packed(source), packed(source), device)
        for hook, protocol in (("connect6", IPPROTO_TCP), ("sendmsg6", IPPROTO_UDP))
        for to, source in itertools.product(_ODD_SOURCES, _ODD_SOURCES)
        for device in (0, 1)
    ]
    return Scene(odd_policy(), 1, SERIAL, True, (STRANGER,), tuple(attempts))


def odd_packets() -> EgressScene:
    """The same, as packets."""
    cases = [
        PacketCase(
            Packet(Ipv6(packed(source), packed(to), packets.TCP).packet(packets.tcp(40_000, 80)), ETH_P_IPV6, socket=0),
            (Socket(),),
        )
        for to, source in itertools.product(_ODD_SOURCES, _ODD_SOURCES)
    ]
    return EgressScene(odd_policy(), 1, SERIAL, tuple(cases))


def test_odd_addresses(machine: Machine) -> None:
    assert next(decisions.differences(odd_addresses(), machine), None) is None
    assert next(egress.differences(odd_packets(), machine), None) is None


def every_odd_state(machine: Machine) -> Iterator[None]:
    """Puts the machine into each of them, one after the other."""
    machine.load(odd_policy())
    machine.set_tasks([STRANGER])
    yield
    machine.load(_ANYWHERE, serial=SERIAL)
    machine.set_tasks([STRANGER])
    yield
    CRED_USER_NS.set(machine, 0)
    yield
    for mode in Mode:
        for field, value, task, _ in TASK_ROWS.values():
            machine.load(locked(mode), serial=SERIAL)
            machine.set_tasks([task])
            field.set(machine, value)
            yield
        for change, task, _ in RECORD_ROWS.values():
            machine.load(locked(mode), serial=SERIAL)
            machine.set_tasks([task])
            change(machine)
            yield
