# SPDX-License-Identifier: Apache-2.0
"""Filters under iptables: the rules, the service, and callers of each kind, in a namespace with a metadata service."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import struct
import time
from functools import partial
from pathlib import Path

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.backends.iptables.filter_listeners import listening
from imds_guard.backends.iptables.form import Form
from imds_guard.backends.iptables.probe import ProbeResult
from imds_guard.commands import filter_places, filter_refusals, filter_service
from imds_guard.connections.cut import find_denied
from imds_guard.connections.find import Scope
from imds_guard.errors import GuardError, Unsupported
from imds_guard.kernel.credentials import become
from imds_guard.kernel.run import run
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.kernel.sock_diag import ESTABLISHED, SockDiag
from imds_guard.policy.filters import FILTER_PORT, Filter, FilterRules
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
from imds_guard.policy.ports import ALL_PORTS
from tests.filter.scene import (
    ACCOUNT,
    ALLOWED,
    BY_GROUP,
    BY_USER,
    GROUP,
    METADATA,
    POLICY,
    REGION,
    RESET,
    SECRET,
    STRANGER,
    FallbackScene,
    policy_of,
    serve_metadata,
    wait_until,
)
from tests.kernel import guards
from tests.kernel.rules_in_a_sandbox import V6, Machine
from tests.tools import need

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="writes rules in a namespace of its own")

DENIED = "ECONNREFUSED"
FIRST_FILTER = "127.169.1.1"
SECOND = FilterRules(("GET /latest/**",))


@pytest.fixture
def scene(by_iptables: FallbackScene) -> FallbackScene:
    return by_iptables


def test_who_gets_what(scene: FallbackScene) -> None:
    """The allowed user is not filtered, and nobody else gets anything. The service knows the callers."""
    assert scene.ask(BY_USER, REGION) == DENIED, "without the service"
    scene.start()
    rows = {
        "allowed": [scene.ask(ALLOWED, path) for path in (REGION, SECRET)],
        "by user": [scene.ask(BY_USER, path) for path in (REGION, SECRET)],
        "by supplementary group": [scene.ask(BY_GROUP, path, GROUP) for path in (REGION, SECRET)],
        "stranger": [scene.ask(STRANGER, path) for path in (REGION, SECRET)],
        "the filter's user": [scene.ask(ACCOUNT.uid, path) for path in (REGION, SECRET)],
        "another port": [scene.ask(user, REGION, to=(METADATA, 443)) for user in (BY_USER, STRANGER)],
    }
    assert rows == {
        "allowed": ["200", "200"],
        "by user": ["200", "403"],
        "by supplementary group": ["200", "403"],
        "stranger": [DENIED, DENIED],
        "the filter's user": ["200", "200"],
        "another port": [DENIED, DENIED],
    }
    refusals = scene.machine.call(filter_refusals.read_refusals)
    assert refusals is not None
    assert [(row.uid, row.path, row.times) for row in refusals.rows] == [(BY_USER, SECRET, 1), (BY_GROUP, SECRET, 1)]


def test_nobody_connects_to_a_filter_directly(scene: FallbackScene) -> None:
    """Neither its own callers, nor allowed users, nor root."""
    scene.start()
    users = (BY_USER, ALLOWED, STRANGER, ACCOUNT.uid, 0)
    assert [scene.ask(user, REGION, GROUP, (FIRST_FILTER, FILTER_PORT)) for user in users] == [DENIED] * len(users)


def test_the_policy_is_read_back(scene: FallbackScene) -> None:
    """Also the order of the filters, and what they allow. A rule that somebody has removed is noticed."""
    lock = POLICY.locks[0]
    more = (
        *POLICY.filters,
        Filter("second", ("default",), Identities(frozenset((STRANGER,))), rules=SECOND),
        Filter("all", ("default",), Identities(), everyone=True, rules=FilterRules(("GET /a",), ("/b",), audit=True)),
    )
    policy = make_policy([lock], filters=more, filter_uid=ACCOUNT.uid)
    scene.change(policy)

    def held() -> tuple[Policy | None, Policy | None, list[str]]:
        backend = scene.machine.backend()
        return backend.read(), backend.unaltered(), backend.faults()

    assert scene.machine.call(held) == (policy, policy, [])
    scene.machine.iptables(
        *("-t", "mangle", "-D", "IMDS-GUARD-R0", "-m", "owner", "--uid-owner", str(STRANGER), "-g", "IMDS-GUARD-R0-F1")
    )
    _, unaltered, faults = scene.machine.call(held)
    assert unaltered is None
    assert "someone changed the rules in our chains of table mangle" in faults[0]


def test_a_changed_rule_has_a_new_listener(scene: FallbackScene) -> None:
    """Until a command has made it, the caller is denied: nobody leads it to the old one."""
    scene.start()
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET)) == ("200", "403")
    scene.change(policy_of("GET /**", deny=("/*/meta-data/placement/**",)))
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET)) == (DENIED, DENIED)
    assert "the filter does not serve 'region'" in scene.faults()[0]
    assert scene.reload() == []
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET), scene.faults()) == ("403", "200", [])


def test_a_listener_with_old_rules_is_never_reached(scene: FallbackScene) -> None:
    """A service that hangs goes on listening. Its numbers get no other meaning, however often the policy changes."""
    scene.start()
    os.kill(scene.service, signal.SIGSTOP)
    for number in range(3):
        scene.change(policy_of(f"GET /{number}"))
        assert scene.ask(BY_USER, REGION) == DENIED
    os.kill(scene.service, signal.SIGCONT)
    assert scene.reload() == []
    assert (scene.ask(BY_USER, "/2"), scene.ask(BY_USER, REGION), scene.faults()) == ("200", "403", [])


def test_a_place_that_was_given_up_meanwhile_is_not_served(scene: FallbackScene) -> None:
    """The service has read the policy, and binds when another one is in force."""

    def listen() -> tuple[int, int]:
        old = filter_places.wanted_places(None)
        scene.machine.backend().change(policy_of("GET /**"))
        stale, _ = filter_service._listen(None, old, old.places)
        new = filter_places.wanted_places(None)
        fresh, _ = filter_service._listen(None, new, new.places)
        return len(stale), len(fresh)

    assert scene.machine.call(listen) == (0, 1)


def test_open_connections_to_a_filter_stay(machine: Machine) -> None:
    """Their sockets look like direct ones. One that is direct, and one of a caller of another filter now, are found."""
    scene = FallbackScene(machine)
    scene.sandbox.spawn(serve_metadata)
    wait_until(lambda: scene.ask(ALLOWED, SECRET) == "200")
    scene.sandbox.spawn(partial(_hold, 40_011))
    wait_until(lambda: _are_open(machine, {40_011}))
    machine.apply(POLICY)
    scene.start()
    scene.sandbox.spawn(partial(_hold, 40_012))
    wait_until(lambda: _are_open(machine, {40_011, 40_012}))
    second = Filter("second", ("default",), Identities(frozenset((BY_USER,))), rules=SECOND)
    other = make_policy(POLICY.locks, filters=(second, *POLICY.filters), filter_uid=ACCOUNT.uid)

    def find(policy: Policy) -> list[int]:
        held = machine.backend().wanted()
        assert held is not None
        found = find_denied(policy, Scope(every_namespace=False), held[1], by_nat=True)
        return sorted(one.local[1] for one in found.still_open if one.local[1] in (40_011, 40_012))

    assert machine.call(lambda: [find(POLICY), find(other)]) == [[40_011], [40_011, 40_012]]


def _hold(port: int) -> None:
    """A connection of a caller of the filter, until it is killed."""
    become(uids=(BY_USER,) * 3, gids=(62_001,) * 3, groups=())
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((METADATA, port))
        one.connect((METADATA, 80))
        signal.pause()


def _are_open(machine: Machine, ports: set[int]) -> bool:
    def find() -> set[int]:
        with SockDiag() as diag:
            sockets = list(diag.each_socket(socket.AF_INET, socket.IPPROTO_TCP, (ESTABLISHED,)))
        return {one.local_port for one in sockets if one.remote_port == 80}

    return ports <= machine.call(find)


def test_the_other_backend_takes_over(scene: FallbackScene) -> None:
    """The hooks ask for marks, which the listeners from before don't have, though rules and addresses are the same."""
    scene.start()
    before = scene.machine.call(lambda: filter_places.wanted_places(None))
    backend, cgroup = EbpfBackend(scene.sandbox.cgroup, guards.FAST), scene.sandbox.cgroup
    backend.apply(POLICY)
    try:
        scene.machine.call(lambda: scene.machine.backend().remove())
        after = scene.machine.call(lambda: filter_places.wanted_places(cgroup))
        assert [place.address for place in before.places] == [place.address for place in after.places]
        assert "the filter does not serve 'region'" in scene.machine.call(lambda: filter_places.faults(cgroup))[0]
        assert scene.machine.call(lambda: filter_service.reload(cgroup)) == []
        assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET)) == ("200", "403")
    finally:
        backend.remove()


def test_a_policy_without_filters_removes_them(scene: FallbackScene) -> None:
    scene.start()
    scene.change(make_policy(POLICY.locks))
    assert scene.reload() == []
    assert (scene.ask(BY_USER, REGION), scene.ask(ALLOWED, SECRET), scene.faults()) == (DENIED, "200", [])
    assert "IMDS-GUARD" not in scene.machine.rules(4, "nat")


def test_kill_9_never_gives_direct_access(scene: FallbackScene) -> None:
    """The caller is denied at once, since nobody listens. Status says so, and a new service takes over."""
    scene.start()
    scene.kill(scene.service)
    before = time.monotonic()
    assert (scene.ask(BY_USER, SECRET), scene.ask(BY_USER, REGION)) == (DENIED, DENIED)
    assert time.monotonic() - before < 4
    assert "the filter does not serve 'region', so its callers are denied" in scene.faults()[0]
    scene.start()
    assert (scene.ask(BY_USER, REGION), scene.ask(BY_USER, SECRET)) == ("200", "403")


def test_stop_removes_everything(scene: FallbackScene) -> None:
    scene.machine.call(lambda: scene.machine.backend().remove())
    tables = [scene.machine.rules(version, table) for version in (4, 6) for table in ("mangle", "filter")]
    assert "IMDS-GUARD" not in "".join((*tables, scene.machine.rules(4, "nat")))
    assert list(Path(scene.machine.state_folder).glob("iptables-*")) == []
    assert scene.ask(STRANGER, SECRET) == "200"


def test_stop_removes_the_rules_in_nat_also_when_the_file_is_gone(scene: FallbackScene) -> None:
    for file in Path(scene.machine.state_folder).glob("iptables-filters-*"):
        file.unlink()
    with pytest.raises(GuardError, match="the file that says what its filters allow is gone"):
        scene.machine.call(lambda: scene.machine.backend().read())
    scene.machine.call(lambda: scene.machine.backend().remove())
    assert "IMDS-GUARD" not in scene.machine.rules(4, "nat")


def test_a_routed_address(machine: Machine) -> None:
    """As on a real machine: the metadata service is behind an interface, whose address is the caller's source."""
    need("ip")
    with Sandbox() as sandbox:
        routed = Machine(sandbox, machine.kind, machine.state_folder, machine.form)
        for line in _ROUTE:
            assert sandbox.call(partial(run, ["ip", *line.split()])).status == 0, line
        sandbox.call(lambda: Path("/proc/sys/net/ipv4/conf/all/rp_filter").write_text("1", encoding="ascii"))
        routed.apply(POLICY)
        scene = FallbackScene(routed)
        assert scene.ask(BY_USER, SECRET) == DENIED
        scene.start()
        assert (scene.ask(BY_USER, SECRET), scene.ask(STRANGER, SECRET)) == ("403", DENIED)
        refusals = routed.call(filter_refusals.read_refusals)
        assert refusals is not None
        assert [(row.uid, row.path) for row in refusals.rows] == [(BY_USER, SECRET)]
        assert not routed.call(partial(_connects_on, "up0")), "a filter is behind lo"


_ROUTE = (
    "link add up0 type veth peer name up1",
    "addr add 10.9.9.1/24 dev up0",
    "link set up1 up",
    "link set up0 up",
    f"route add {METADATA} dev up0",
)


def _connects_on(device: str) -> bool:
    become(uids=(BY_USER,) * 3, gids=(62_001,) * 3, groups=())
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        one.settimeout(1)
        return one.connect_ex((METADATA, 80)) == 0


# --- beside rules of others -------------------------------------------------------------------------------------------


def test_without_the_rules_in_nat_callers_are_denied(scene: FallbackScene) -> None:
    scene.start()
    scene.machine.iptables("-t", "nat", "-F")
    assert (scene.ask(BY_USER, SECRET), scene.ask(BY_USER, REGION), scene.ask(ALLOWED, SECRET)) == (
        DENIED,
        DENIED,
        "200",
    )
    assert any("table nat" in fault or "nat OUTPUT" in fault for fault in scene.machine.faults())
    scene.machine.apply(POLICY)
    assert (scene.ask(BY_USER, REGION), scene.machine.faults()) == ("200", [])


def test_who_translates_the_address_before_us_opens_nothing(scene: FallbackScene) -> None:
    """A local proxy for the locked address: the caller of a filter would reach it in place of its filter."""
    scene.start()
    scene.sandbox.spawn(partial(_serve_at, ("127.0.0.1", 8080)))
    rule = ("-d", METADATA, "-p", "tcp", "-j", "DNAT", "--to-destination", "127.0.0.1:8080")
    scene.machine.iptables("-t", "nat", "-A", "OUTPUT", *rule)
    assert [scene.ask(user, SECRET) for user in (BY_USER, ALLOWED, STRANGER)] == ["403", "299", DENIED], "behind ours"
    scene.machine.iptables("-t", "nat", "-D", "OUTPUT", *rule)
    scene.machine.iptables("-t", "nat", "-I", "OUTPUT", *rule)
    assert [scene.ask(user, SECRET) for user in (BY_USER, ALLOWED, STRANGER)] == [DENIED, "299", DENIED]
    assert any("nat OUTPUT stand before ours" in fault for fault in scene.machine.faults())


def _serve_at(address: tuple[str, int]) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen(16)
        while True:
            with server.accept()[0] as one:
                one.recv(65536)
                one.sendall(b"HTTP/1.1 299 Proxy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")


def test_an_accept_in_front_is_named(scene: FallbackScene) -> None:
    """The owner of a connect at the address of a filter is asked for in table filter."""
    scene.machine.iptables("-I", "OUTPUT", "-j", "ACCEPT")
    assert any("stand before ours" in fault for fault in scene.machine.faults())


def test_nobody_inherits_the_translation_of_a_failed_connection(scene: FallbackScene) -> None:
    """Conntrack keeps a connection that the server has reset (10 s), and NAT is not asked for the same ports.

    A caller of a filter must not get the direct way of an allowed user, nor one of another filter.
    """
    second = Filter("second", ("default",), Identities(frozenset((STRANGER,))), rules=SECOND)
    scene.change(make_policy(POLICY.locks, filters=(*POLICY.filters, second), filter_uid=ACCOUNT.uid))
    scene.kill(scene.metadata)
    wanted = scene.machine.call(lambda: filter_places.wanted_places(None).places)
    region = next(place.address for place in wanted if place.filter == "region")
    scene.machine.call(lambda: _TIMEOUT.write_text("100", encoding="ascii"))
    resetting = [scene.sandbox.spawn(partial(_reset_at, at)) for at in ((METADATA, 80), (region, FILTER_PORT))]
    wait_until(lambda: scene.ask(ALLOWED, SECRET, port=40_001) == RESET)
    wait_until(lambda: scene.ask(BY_USER, SECRET, port=40_002) == RESET)
    for pid in resetting:
        scene.kill(pid)
    scene.metadata = scene.sandbox.spawn(serve_metadata)
    scene.start()
    assert scene.ask(BY_USER, SECRET, port=40_001) == DENIED, "the direct way"
    assert scene.ask(STRANGER, SECRET, port=40_002) == DENIED, "the way to the first filter"
    assert (scene.ask(BY_USER, SECRET, port=40_003), scene.ask(STRANGER, SECRET, port=40_004)) == ("403", "200")


_TIMEOUT = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close")


def _reset_at(address: tuple[str, int]) -> None:
    """Resets each connection that it has accepted."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen(16)
        while True:
            one = server.accept()[0]
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()


# --- what is refused --------------------------------------------------------------------------------------------------


def _lower(first: int) -> None:
    Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").write_text(str(first), encoding="ascii")


def test_a_port_that_anybody_may_take_is_refused(scene: FallbackScene) -> None:
    """At start, and named when it is so later: somebody could answer in place of a dead filter."""
    scene.machine.call(lambda: _lower(169))
    with pytest.raises(Unsupported, match="ip_unprivileged_port_start is 169, so any process can listen at port 169"):
        scene.machine.call(lambda: scene.machine.backend().check(POLICY))
    assert any("ip_unprivileged_port_start is 169" in fault for fault in scene.machine.faults())
    scene.machine.call(lambda: _lower(170))
    assert scene.machine.faults() == []


def test_a_listener_that_root_has_not_made_is_no_filter(scene: FallbackScene) -> None:
    def squat() -> None:
        become((STRANGER,) * 3, (STRANGER,) * 3, ())
        _serve_at((FIRST_FILTER, FILTER_PORT))

    scene.machine.call(lambda: _lower(100))
    scene.sandbox.spawn(squat)
    wait_until(lambda: scene.machine.call(listening) == {(1, 1)})
    assert "the filter does not serve 'region'" in scene.faults()[0]


def test_what_can_not_be_enforced_is_refused(machine: Machine) -> None:
    """With the reason, and nothing is changed."""
    ipv6 = Lock("default", (Endpoint(ipaddress.ip_network(V6), ALL_PORTS),))
    many = Identities(frozenset(range(1000, 2000, 2)))
    for policy, why in (
        (make_policy([ipv6], filters=POLICY.filters, filter_uid=ACCOUNT.uid), "serves IPv6 addresses alone"),
        (
            make_policy(POLICY.locks, filters=[POLICY.filters[0]._replace(who=many)], filter_uid=ACCOUNT.uid),
            "500 ranges of IDs, and the maximum for iptables is 256",
        ),
    ):
        with pytest.raises(Unsupported, match=why):
            machine.apply(policy)
    with pytest.raises(Unsupported, match="'region' lists groups, and groups of filters are never put in the rules"):
        machine.call(lambda: machine.backend(resolve_groups=True).apply(POLICY))
    assert "IMDS-GUARD" not in machine.rules(4, "mangle") + machine.rules(4)


@pytest.mark.parametrize(
    ("probed", "why"),
    [
        (ProbeResult(True, False, "no --suppl-groups here"), "users: no --suppl-groups here"),
        (ProbeResult(True, True, form=Form.FILTER), r"marks \(the target MARK and the match mark\) do not work"),
    ],
)
def test_what_does_not_work_here_is_refused(machine: Machine, probed: ProbeResult, why: str) -> None:
    """As if it were not in this kernel, or this iptables."""

    def apply() -> None:
        backend = machine.backend()
        backend._probes[False] = probed
        backend.apply(POLICY)

    with pytest.raises(Unsupported, match=why):
        machine.call(apply)
    assert "IMDS-GUARD" not in machine.rules(4, "mangle") + machine.rules(4)


def test_callers_are_denied_by_ipv6(machine: Machine) -> None:
    """Filters are reached by IPv4 alone. The same filter serves the IPv4 addresses, and start says so."""
    ipv6 = Endpoint(ipaddress.ip_network(V6), ALL_PORTS)
    lock = POLICY.locks[0]._replace(endpoints=(*POLICY.locks[0].endpoints, ipv6))
    policy = make_policy([lock], filters=POLICY.filters, filter_uid=ACCOUNT.uid)
    machine.apply(policy)
    assert machine.reach(BY_USER, V6) == DENIED
    notes = machine.call(lambda: machine.backend().notes(policy))
    assert any("callers of filters are denied at IPv6 endpoints" in note for note in notes)
