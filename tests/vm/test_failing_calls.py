# SPDX-License-Identifier: Apache-2.0
"""On doubt a locked endpoint is denied: each call of a helper fails in turn, alone and with all calls after it.

Where a failure lets through what the policy denies all the same, the table says why it can't happen, or what it means.
The argument at the head of bpf/imds_guard.bpf.c ("What can't be read is a denial") rests on this table.
"""

from __future__ import annotations

import ipaddress
from random import Random

import pytest

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.policy.decide import MAX_WALKED_GROUPS
from imds_guard.policy.filter_numbers import assigned, listeners_of
from imds_guard.policy.filters import FILTER_PORT, Filter
from imds_guard.policy.model import NOBODY, Endpoint, Identities, Lock, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS
from tests.vm import test_egress
from tests.vm.decisions import Scene, scene_of
from tests.vm.egress import EgressScene, egress_scene
from tests.vm.failing import Failures, Weak
from tests.vm.machine import Machine
from tests.vm.programs import ADDRESS_HOOKS, GUARDING_HOOKS
from tests.vm.values import ETH_P_IP, LISTEN, Attempt, Socket, Task, packed

SEED = 17
IPV4, IPV6 = "169.254.169.254", "fd00:ec2::254"
ALLOWED, DENIED = 5000, 6000
SCENES, TASKS, ATTEMPTS = 12, 6, 16
EGRESS_SCENES, PACKETS = 20, 200

Reasons = dict[tuple[str, "Map | None"], str]

_OPENS: Reasons = {
    ("map_lookup_elem", Map.CONFIG): (
        "The only record of an array: its look-up has no way to fail (array_map_lookup_elem() in "
        "kernel/bpf/arraymap.c)."
    ),
    ("map_lookup_elem", Map.ENDPOINTS): (
        "NULL is how the trie says that no endpoint covers the address; it has no other error (trie_lookup_elem() in "
        "kernel/bpf/lpm_trie.c). To deny then would deny addresses that are not locked."
    ),
    ("map_lookup_elem", Map.MEMBERS): (
        "NULL is how the hash says that nobody listed this user or group; it has no other error "
        "(__htab_map_lookup_elem() in kernel/bpf/hashtab.c). A denied member whose entry is not there is like anybody."
    ),
}
"""A failure lets through what the policy denies, at every hook."""

_OPENS_AT_EGRESS: Reasons = {
    ("skb_load_bytes", None): (
        "The first one, of the destination: it fails only beyond the end of the packet (bpf_skb_load_bytes() in "
        "net/core/filter.c), and what is shorter than its header is no IP packet. All others are denials."
    ),
}

_SHUTS: Reasons = {
    ("map_lookup_elem", Map.SETTINGS): (
        "Without settings nobody knows that the policy only audits. They are an array's record: no way to fail."
    ),
}
"""A failure denies what is not locked, or denies under audit, at every hook."""

_SHUTS_AT_EGRESS: Reasons = {
    ("skb_load_bytes", None): (
        "A packet whose ports can't be read counts as one for every port of its address, so for a locked one."
    ),
}

_ADDRESS_CALLS = {
    *(("map_lookup_elem", number) for number in (Map.CONFIG, Map.SETTINGS, Map.ADDRESS_BITMAP, Map.ENDPOINTS)),
    *(("map_lookup_elem", number) for number in (Map.LISTS, Map.MEMBERS, Map.GROUPS)),
    *(("map_lookup_elem", number) for number in (Map.COUNTERS, Map.REPORT, Map.SHARES, Map.WATCH)),
    *(("map_update_elem", number) for number in (Map.REPORT, Map.SHARES)),
    ("ringbuf_output", Map.EVENTS),
    *(("sk_storage_get", number) for number in (Map.MARKS, Map.EARLIER)),
    *((name, None) for name in ("get_current_comm", "loop", "probe_read_kernel")),
}
_REDIRECT_CALLS = {
    ("map_lookup_elem", Map.FILTERS),
    ("sk_lookup_tcp", None),
    ("sk_storage_get", Map.FILTER_MARKS),
}
_EGRESS_CALLS = {
    *(("map_lookup_elem", number) for number in (Map.CONFIG, Map.SETTINGS, Map.ADDRESS_BITMAP, Map.ENDPOINTS)),
    *(("map_lookup_elem", number) for number in (Map.LISTS, Map.MEMBERS, Map.COUNTERS, Map.REPORT, Map.SHARES)),
    *(("map_update_elem", number) for number in (Map.REPORT, Map.SHARES)),
    ("ringbuf_output", Map.EVENTS),
    *(("sk_storage_get", number) for number in (Map.MARKS, Map.EARLIER)),
    *((name, None) for name in ("skb_load_bytes", "sk_fullsock", "tcp_sock", "sk_lookup_tcp", "skc_lookup_tcp")),
}
"""Every call of a hook that can fail. One that is new belongs here, and where needed in a table above."""


def at(hooks: tuple[str, ...], calls: set[tuple[str, Map | None]] | Reasons) -> set[Weak]:
    return {(hook, helper, number) for hook in hooks for helper, number in calls}


def with_very_many_groups(deny: Identities) -> Scene:
    """Callers in more groups than are compared one by one: they are searched for those of the list."""
    endpoints = tuple(Endpoint(ipaddress.ip_network(one), ALL_PORTS, ALL_PORTS) for one in (IPV4, IPV6))
    allow = Identities(groups=frozenset({ALLOWED, ALLOWED + 1}))
    some = tuple(range(10_000, 10_000 + MAX_WALKED_GROUPS))
    return Scene(
        make_policy([Lock("imds", endpoints, allow, deny)], strict=True),
        generation=1,
        serial=SEED,
        log_allowed=True,
        tasks=tuple(Task(1000, 1000, (group, *some)) for group in (ALLOWED, DENIED, 1)),
        attempts=tuple(Attempt(one, packed(IPV4 if one.endswith("4") else IPV6), 80) for one in ADDRESS_HOOKS),
    )


def with_some_groups(deny: Identities) -> Scene:
    """Callers in few groups. The one that is allowed has each place among those that are read together."""
    scene = with_very_many_groups(deny)
    placed = [tuple(range(1, before + 1)) for before in range(6)]
    tasks = [Task(1000, 1000, (*before, ALLOWED, *after)) for before in placed for after in ((), (ALLOWED + 2,))]
    return scene._replace(tasks=(Task(1000, ALLOWED), Task(1000, 1000, (1, DENIED)), *tasks))


def with_a_denied_user() -> Scene:
    """A caller that only the deny list stops, and one whose socket another list has approved before."""
    scene = with_very_many_groups(NOBODY)
    (lock,) = scene.policy.locks
    denying = lock._replace(allow=NOBODY, deny=Identities(frozenset({DENIED})), default=Verdict.ALLOW)
    mark = abi.MARK.pack(SEED, 1000, 0, 1, abi.MARK_USER, 0)
    return scene._replace(
        policy=make_policy([denying], strict=True),
        tasks=(Task(DENIED, 1), Task(ALLOWED, 1)),
        attempts=tuple(one._replace(mark=mark) for one in scene.attempts),
    )


def with_filters() -> Scene:
    """Callers that a filter names, by user, by group, and as one of everyone. Others are let through by default."""
    scene = with_very_many_groups(NOBODY)
    (lock,) = scene.policy.locks
    named = [Identities(frozenset({ALLOWED})), Identities(groups=frozenset({DENIED}))]
    filters = [Filter(f"{number}", ("imds",), one) for number, one in enumerate(named)]
    some = scene.policy._replace(locks=(lock._replace(allow=NOBODY, default=Verdict.ALLOW),), filters=tuple(filters))
    listeners = listeners_of(some, assigned(some))
    attempts = [
        one._replace(
            others=tuple(
                Socket(found.address.packed, local_port=FILTER_PORT, state=LISTEN, filter_mark=found.digest)
                for found in listeners
                if found.target.address.version == (4 if one.is_ipv4 else 6)
            )
        )
        for one in scene.attempts
    ]
    return scene._replace(
        policy=some, tasks=(Task(ALLOWED, 1), Task(1, DENIED), Task(1, 1, (DENIED,))), attempts=tuple(attempts)
    )


def packets_of_a_denied_user() -> EgressScene:
    """The default let it through under an earlier policy."""
    policy = test_egress.strict(
        Lock("imds", test_egress.endpoints(ALL_PORTS, ()), NOBODY, Identities(frozenset({DENIED})), Verdict.ALLOW)
    )
    mark = abi.MARK.pack(SEED - 1, DENIED, 0, 0, abi.MARK_DEFAULT, 0)
    earlier = mark * abi.EARLIER_MARKS
    sockets = ((Socket(mark=mark),), (Socket(mark=mark, earlier=earlier),))
    return EgressScene(
        policy, 1, SEED, tuple(test_egress.plain(test_egress.TO_SERVICE, ETH_P_IP, one) for one in sockets)
    )


def all_failures(machine: Machine, r: Random) -> Failures:
    """All failures, in all forms, on every path that some thousands of cases take."""
    made = Failures(machine, r)
    for number in range(SCENES):
        made.connects(scene_of(SEED, number, filters=machine.has_filters), TASKS, ATTEMPTS)
    for deny in (NOBODY, Identities(groups=frozenset({DENIED}))):
        made.connects(with_very_many_groups(deny), 3, len(ADDRESS_HOOKS))
        made.connects(with_some_groups(deny), 14, len(ADDRESS_HOOKS))
    made.connects(with_a_denied_user(), 2, len(ADDRESS_HOOKS))
    if machine.has_filters:
        made.connects(with_filters(), 3, len(ADDRESS_HOOKS))
    for number in range(EGRESS_SCENES):
        made.packets(egress_scene(SEED, number), PACKETS)
    made.packets(packets_of_a_denied_user(), PACKETS)
    early = test_egress.data_before_the_handshake_is_over()
    made.packets(EgressScene(test_egress.ALL_OF_IT, 1, SEED, (early,)), 1)
    return made


@pytest.fixture(scope="module")
def failures(machine: Machine) -> Failures:
    """For all tests of this file."""
    return all_failures(machine, Random(SEED))


def test_every_call_that_can_fail_has_failed(failures: Failures) -> None:
    redirecting = at(("connect4", "connect6"), _REDIRECT_CALLS)
    assert failures.found.tried == at(ADDRESS_HOOKS, _ADDRESS_CALLS) | redirecting | at((abi.EGRESS,), _EGRESS_CALLS)


def test_a_failing_call_lets_nothing_through_that_is_denied(failures: Failures) -> None:
    """But for the calls of the tables."""
    assert failures.found.opens == at(GUARDING_HOOKS, _OPENS) | at((abi.EGRESS,), _OPENS_AT_EGRESS)


def test_a_failing_call_denies_nothing_that_is_not_locked(failures: Failures) -> None:
    """And nothing under audit, but for the calls of the tables."""
    assert failures.found.shuts == at(GUARDING_HOOKS, _SHUTS) | at((abi.EGRESS,), _SHUTS_AT_EGRESS)


def test_a_failing_call_breaks_nothing(failures: Failures) -> None:
    """No trap; a denial still shows in two of counter, record and report; a denied socket is not marked."""
    assert failures.found.wrong == []
