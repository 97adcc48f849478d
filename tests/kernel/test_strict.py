# SPDX-License-Identifier: Apache-2.0
"""--strict: the egress hook drops packets of sockets that no connect hook has approved."""

from __future__ import annotations

import ipaddress
import mmap
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from typing import Callable

import pytest

from imds_guard.backends.ebpf import EbpfBackend, abi, hooks
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.pins import PinLocation, map_pin
from imds_guard.backends.ebpf.reader import MapReader
from imds_guard.backends.ebpf.report import read_report
from imds_guard.errors import GuardError
from imds_guard.kernel import bpf
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import NOBODY, Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.packet import DESTINATION_OPTIONS
from tests import packets
from tests.kernel import guards
from tests.kernel.guards import BOTH, IPV4, IPV6, NEW, NEW_POLICY, OLD, OLD_POLICY, PORT, STRANGER
from tests.packets import Ipv4, Ipv6, extension, fragment_header

Guarded = tuple[Sandbox, EbpfBackend]

GROUP = 62_100
STRICT_OLD, STRICT_NEW = OLD_POLICY._replace(strict=True), NEW_POLICY._replace(strict=True)
_ANSWER_WITHIN_S = 1.0
"""Long enough for loopback, where the answer is there before send() returns. A test waits so long for a lost packet."""


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    if os.geteuid() != 0:
        pytest.skip("attaching programs needs root")
    with Sandbox((IPV4, IPV6)) as sandbox:
        sandbox.serve_with(_listen, _echo_forever)
        backend = EbpfBackend(sandbox.cgroup, guards.FAST)
        try:
            yield sandbox, backend
        finally:
            backend.remove()


def _listen() -> list[socket.socket]:
    sockets = []
    for address in (IPV4, IPV6):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            one = socket.socket(family, kind)
            one.bind((address, PORT))
            if kind == socket.SOCK_STREAM:
                one.listen(16)
            sockets.append(one)
    return sockets


def _echo_forever(sockets: list[socket.socket]) -> None:
    from imds_guard.kernel.listeners import each_ready

    connections: list[socket.socket] = []

    def answer(one: socket.socket) -> None:
        if one.type == socket.SOCK_DGRAM:
            message, sender = one.recvfrom(65536)
            one.sendto(message, sender)
        else:
            accepted = one.accept()[0]
            connections.append(accepted)
            if os.fork() == 0:
                while True:
                    accepted.sendall(accepted.recv(65536) or os._exit(0) or b"")

    each_ready(sockets, answer)


class Client:
    """A child that has one connection of one user. answered() sends a message over it."""

    def __init__(self, sandbox: Sandbox, user: int, make: Callable[[], socket.socket], groups: tuple[int, ...] = ()):
        ours, theirs = socket.socketpair()
        self._pipe = ours

        def live() -> None:
            ours.close()
            become(uids=(user,) * 3, gids=(GROUP + 1,) * 3, groups=groups)
            try:
                one = make()
            except OSError as error:
                theirs.send(f"{type(error).__name__}".encode())
                return
            one.settimeout(_ANSWER_WITHIN_S)
            theirs.send(b"connected")
            while theirs.recv(1):
                theirs.send(_answered(one))

        sandbox.spawn(live)
        theirs.close()
        ours.settimeout(20)
        self.outcome = ours.recv(100).decode()

    def answered(self) -> bool:
        """True when the service answers a message."""
        self._pipe.send(b"?")
        return self._pipe.recv(1) == b"1"


def _answered(one: socket.socket) -> bytes:
    try:
        one.send(b"x")
        return b"1" if one.recv(1) else b"0"
    except OSError:
        return b"0"


def tcp(address: str = IPV4) -> Callable[[], socket.socket]:
    return lambda: socket.create_connection((address, PORT), timeout=5)


def udp(address: str = IPV4) -> Callable[[], socket.socket]:
    def make() -> socket.socket:
        one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        one.connect((address, PORT))
        return one

    return make


def both_protocols(policy: Policy) -> Policy:
    """The policy for TCP and UDP alike."""
    locks = [
        lock._replace(endpoints=tuple(one._replace(udp=one.tcp) for one in lock.endpoints)) for lock in policy.locks
    ]
    return make_policy(locks, policy.mode, policy.containers, policy.strict)


ADDRESSES = pytest.mark.parametrize("address", [IPV4, IPV6])


@ADDRESSES
@pytest.mark.parametrize("make", [tcp, udp], ids=["tcp", "udp"])
def test_an_allowed_client_is_answered(
    guarded: Guarded, address: str, make: Callable[[str], Callable[[], socket.socket]]
) -> None:
    sandbox, backend = guarded
    backend.apply(both_protocols(STRICT_OLD))
    assert Client(sandbox, OLD, make(address)).answered()
    assert Client(sandbox, STRANGER, make(address)).outcome == "PermissionError"
    assert backend.faults() == []
    assert guards.traces(sandbox.cgroup) == {"attached": 5, "pins": 1}


@ADDRESSES
@pytest.mark.parametrize("make", [tcp, udp], ids=["tcp", "udp"])
def test_a_connection_from_before_is_cut_off_under_strict_alone(
    guarded: Guarded, address: str, make: Callable[[str], Callable[[], socket.socket]]
) -> None:
    sandbox, backend = guarded
    before = Client(sandbox, OLD, make(address))
    backend.apply(both_protocols(OLD_POLICY))
    assert before.answered()
    backend.apply(both_protocols(STRICT_OLD))
    assert not before.answered()
    assert dict(zip(Reason, backend.state().counters))[Reason.UNAPPROVED_SOCKET][0] > 0


def test_a_revoked_connection_is_cut_off_and_the_others_are_not(guarded: Guarded) -> None:
    sandbox, backend = guarded
    backend.apply(STRICT_OLD)
    lost, kept = Client(sandbox, OLD, tcp()), Client(sandbox, BOTH, tcp())
    assert (lost.answered(), kept.answered()) == (True, True)
    backend.change(STRICT_NEW)
    assert (lost.answered(), kept.answered()) == (False, True)
    backend.change(STRICT_OLD)
    assert kept.answered()


def of_user(user: int, endpoints: list[Endpoint]) -> Policy:
    return make_policy([Lock("default", tuple(endpoints), Identities(frozenset({user})))], strict=True)


def of_group(*groups: int, deny: Identities = NOBODY) -> Policy:
    endpoint = OLD_POLICY.locks[0].endpoints
    return make_policy([Lock("default", endpoint, Identities(groups=frozenset(groups)), deny)], strict=True)


def test_the_group_that_let_a_connection_through_is_the_one_that_counts(guarded: Guarded) -> None:
    """The allowed group is neither the first nor the last of the caller's groups."""
    sandbox, backend = guarded
    backend.apply(of_group(GROUP))
    client = Client(sandbox, STRANGER, tcp(), groups=(61_500, 61_501, GROUP, 62_500, 62_501, 62_502))
    assert client.answered()
    backend.change(of_group(GROUP, 63_000))
    assert client.answered()
    backend.change(of_group(63_000))
    assert not client.answered()


def test_a_lock_that_denies_groups_needs_a_new_connect_after_a_change(guarded: Guarded) -> None:
    """Packets do not show whether their sender is in a denied group. On doubt, deny."""
    sandbox, backend = guarded
    backend.apply(of_group(GROUP))
    client = Client(sandbox, STRANGER, tcp(), groups=(GROUP, 63_001))
    assert client.answered()
    backend.change(of_group(GROUP, deny=Identities(groups=frozenset({63_001}))))
    assert not client.answered()


def test_default_allow_lasts_until_the_user_is_denied(guarded: Guarded) -> None:
    sandbox, backend = guarded
    endpoints = OLD_POLICY.locks[0].endpoints

    def denying(*users: int) -> Policy:
        deny = Identities(users=frozenset(users))
        return make_policy([Lock("default", endpoints, deny=deny, default=Verdict.ALLOW)], strict=True)

    backend.apply(denying(OLD))
    client = Client(sandbox, STRANGER, tcp())
    backend.change(denying(OLD, NEW))
    assert client.answered()
    backend.change(denying(OLD, STRANGER))
    assert not client.answered()


@ADDRESSES
def test_a_service_of_this_machine_answers_from_a_port_that_is_open_now(guarded: Guarded, address: str) -> None:
    """The client's own port is locked, since it has the service's address: the answers are packets to a locked port."""
    sandbox, backend = guarded

    def locking(*ports: tuple[int, int]) -> Policy:
        networks = [endpoint.network for endpoint in OLD_POLICY.locks[0].endpoints]
        return of_user(OLD, [Endpoint(network, ports) for network in networks])

    backend.apply(locking((PORT, PORT), (1024, 65535)))
    client = Client(sandbox, OLD, tcp(address))
    assert client.answered()
    backend.change(locking((1024, 65535)))
    assert client.answered()


# --- one socket, several locks ----------------------------------------------------------------------------------------

OTHERS = tuple(f"169.254.169.{n}" for n in range(241, 244))
FIRST_LOCK = {
    "group": (Identities(groups=frozenset({GROUP})), NOBODY, Verdict.DENY),
    "default": (NOBODY, Identities(frozenset({OLD})), Verdict.ALLOW),
    "beside-denied-groups": (Identities(frozenset({STRANGER})), Identities(groups=frozenset({63_001})), Verdict.DENY),
}


def _several_locks(first: tuple[Identities, Identities, Verdict], *more: Lock) -> Policy:
    udp = ((PORT, PORT),)
    others = [
        Lock(f"other-{n}", (Endpoint(ipaddress.ip_network(address), (), udp),), Identities(frozenset({STRANGER, n})))
        for n, address in enumerate(OTHERS)
    ]
    here = Endpoint(ipaddress.ip_network(IPV4), (), udp)
    return make_policy([*more, Lock("one", (here,), *first), *others], strict=True)


def _sends_to_others() -> socket.socket:
    """Connected to one lock; then it sends to the others, where another right lets it through."""
    one = udp()()
    for address in OTHERS:
        one.sendto(b"x", (address, PORT))
    return one


@pytest.mark.parametrize("first", FIRST_LOCK)
def test_a_socket_keeps_its_right_at_one_lock_when_it_sends_to_others(first: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("attaching programs needs root")
    with Sandbox((IPV4, IPV6, *OTHERS)) as sandbox:
        sandbox.serve_with(_listen, _echo_forever)
        backend = EbpfBackend(sandbox.cgroup, guards.FAST)
        try:
            backend.apply(_several_locks(FIRST_LOCK[first]))
            client = Client(sandbox, STRANGER, _sends_to_others, groups=(GROUP,))
            assert (client.outcome, client.answered()) == ("connected", True)
            if first != "beside-denied-groups":  # there each change demands a new connect
                backend.change(_several_locks(FIRST_LOCK[first], of_user(OLD, [_ELSEWHERE]).locks[0]))
                assert client.answered()
            report = read_report(PinLocation.of(sandbox.cgroup))
            assert report is not None
            assert report.rows == ()
            backend.change(_several_locks((Identities(frozenset({OLD})), NOBODY, Verdict.DENY)))
            assert not client.answered()
        finally:
            backend.remove()


_ELSEWHERE = Endpoint(ipaddress.ip_network("192.0.2.1"), ((80, 80),))
"""Its lock comes first, and so the lists of the others get other numbers."""

# --- an upgrade that replaces the maps --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tcp, udp], ids=["tcp", "udp"])
def test_an_approved_connection_lives_through_a_replacement_of_the_maps(
    guarded: Guarded, make: Callable[[str], Callable[[], socket.socket]]
) -> None:
    """The marks are kept. What the new policy takes away is taken away all the same."""
    sandbox, backend = guarded
    with guards.other_layout():
        backend.apply(both_protocols(STRICT_OLD))
        lost, kept = Client(sandbox, OLD, make(IPV4)), Client(sandbox, BOTH, make(IPV4))
        assert (lost.answered(), kept.answered()) == (True, True)
    assert backend.apply(both_protocols(STRICT_NEW)).warnings == ()
    assert backend.faults() == []
    assert (lost.answered(), kept.answered()) == (False, True)
    backend.change(both_protocols(STRICT_OLD))
    assert (lost.answered(), kept.answered()) == (True, True)


def test_an_approved_connection_loses_no_packet_while_maps_are_replaced(guarded: Guarded) -> None:
    """Ten replacements while a client sends datagram after datagram. A dropped one is an error of send()."""
    sandbox, backend = guarded
    backend.apply(both_protocols(STRICT_OLD))
    stream = Stream(sandbox, BOTH)
    for n in range(10):
        os.unlink(map_pin(guards.folder_of(sandbox.cgroup).path, Map.LOCKS))
        backend.apply(both_protocols(STRICT_NEW if n % 2 == 0 else STRICT_OLD))
        stream.wait_for(20)
    sent, dropped = stream.counts()
    assert dropped == 0, f"{dropped} of {sent + dropped} packets were dropped"


def test_marks_of_another_layout_are_not_used_and_start_says_so(guarded: Guarded) -> None:
    sandbox, backend = guarded
    with guards.other_layout(Map.MARKS, value_size=abi.MARK.size + 8):
        backend.apply(STRICT_OLD)
        client = Client(sandbox, BOTH, tcp())
        assert client.answered()
    (warning,) = backend.apply(STRICT_OLD).warnings
    assert "approved before are dropped" in warning
    assert not client.answered()


def test_a_serial_number_is_not_used_again_after_a_failed_replacement(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that was approved while hooks had moved over must not pass for one of a later policy."""
    sandbox, backend = guarded
    with guards.other_layout():
        backend.apply(STRICT_OLD)
    with monkeypatch.context() as failing:
        failing.setattr(hooks, "verify", refuse)
        for _ in range(2):
            with pytest.raises(GuardError, match="refused"):
                backend.apply(STRICT_NEW)
    backend.apply(STRICT_NEW)
    with MapReader.open(guards.folder_of(sandbox.cgroup).path) as maps:
        assert maps.in_force() == (1, 4)


def refuse(*_: object) -> None:
    raise GuardError("refused")


class Stream:
    """A process that sends datagrams in a loop and counts in shared memory how many were sent and dropped.

    A packet that the egress hook drops is an EPERM of send().
    """

    def __init__(self, sandbox: Sandbox, user: int) -> None:
        self._memory = memory = mmap.mmap(-1, mmap.PAGESIZE)

        def loop() -> None:
            become(uids=(user,) * 3, gids=(GROUP + 1,) * 3, groups=())
            sent = dropped = 0
            with udp()() as one:
                while True:
                    try:
                        one.send(b"x")
                        sent += 1
                    except PermissionError:
                        dropped += 1
                    memory[:16] = struct.pack("=QQ", sent, dropped)

        sandbox.spawn(loop)
        self.wait_for(20)

    def counts(self) -> tuple[int, int]:
        """Datagrams that were sent, and that were dropped."""
        sent, dropped = struct.unpack("=QQ", self._memory[:16])
        return sent, dropped

    def wait_for(self, more: int) -> None:
        """Returns after so many more datagrams, or fails."""
        goal, deadline = sum(self.counts()) + more, time.monotonic() + 20
        while sum(self.counts()) < goal:
            assert time.monotonic() < deadline, f"the stream stopped at {self.counts()}"
            os.sched_yield()


# --- packets that no socket was approved for --------------------------------------------------------------------------


def _raw_datagram() -> bytes:
    """UDP without a checksum. IPv4 allows this, and for IPv6 the kernel fills it in (RFC 3542, section 3.1)."""
    return struct.pack("!4H", 4242, PORT, 8 + 1, 0) + b"x"


def _send_raw(address: str) -> bool:
    """True when a datagram of a raw socket arrives."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.socket(family, socket.SOCK_DGRAM) as ear,
        socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP) as mouth,
    ):
        ear.bind((address, 4242))
        ear.settimeout(_ANSWER_WITHIN_S)
        if family == socket.AF_INET6:
            mouth.setsockopt(socket.IPPROTO_IPV6, 7, 6)  # IPV6_CHECKSUM: its offset in a UDP header
        try:
            mouth.sendto(_raw_datagram(), (address, 0))
            return ear.recv(10) == b"x"
        except OSError:
            return False


@ADDRESSES
def test_raw_packets_are_dropped(guarded: Guarded, address: str) -> None:
    sandbox, backend = guarded
    backend.apply(both_protocols(OLD_POLICY))
    assert sandbox.call(lambda: _send_raw(address))
    backend.apply(both_protocols(STRICT_OLD))
    assert not sandbox.call(lambda: _send_raw(address))


def _raw_reset(address: str, *, fragment: bool) -> bytes:
    """An IP header, and a TCP header with RST: a whole packet, or a first fragment."""
    tcp = struct.pack("!2H2I2B3H", 4242, PORT, 1, 0, 5 << 4, 4, 0, 0, 0) + bytes(4)
    if ":" not in address:
        head = struct.pack("!2B3H2BH", 0x45, 0, 20 + len(tcp), 7, 0x2000 * fragment, 64, socket.IPPROTO_TCP, 0)
        return head + socket.inet_aton(address) * 2 + tcp
    extension = struct.pack("!2BHI", socket.IPPROTO_TCP, 0, int(fragment), 7)  # RFC 8200, section 4.5
    head = struct.pack("!IH2B", 6 << 28, len(extension) + len(tcp), 44, 64)
    return head + socket.inet_pton(socket.AF_INET6, address) * 2 + extension + tcp


def _goes_out(address: str, *, fragment: bool) -> bool:
    return _leaves(address, _raw_reset(address, fragment=fragment))


def _leaves(address: str, packet: bytes) -> bool:
    """False when the egress hook drops it: send() fails then (cgroup_bpf_run_filter_skb() in kernel/bpf/cgroup.c)."""
    with socket.socket(
        socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW
    ) as mouth:
        if ":" in address:
            mouth.setsockopt(socket.IPPROTO_IPV6, 36, 1)  # IPV6_HDRINCL
        try:
            mouth.sendto(packet, (address, 0))
        except PermissionError:
            return False
        return True


@ADDRESSES
def test_a_reset_passes_and_its_first_fragment_does_not(guarded: Guarded, address: str) -> None:
    """A later fragment may overwrite the flags."""
    sandbox, backend = guarded
    backend.apply(both_protocols(OLD_POLICY))
    assert sandbox.call(lambda: _goes_out(address, fragment=True))
    backend.apply(both_protocols(STRICT_OLD))
    assert sandbox.call(lambda: _goes_out(address, fragment=False))
    assert not sandbox.call(lambda: _goes_out(address, fragment=True))


OPEN_PORT = 53
_ENDS4, _ENDS6 = (socket.inet_aton(IPV4),) * 2, (socket.inet_pton(socket.AF_INET6, IPV6),) * 2
READABLE: dict[str, Ipv4 | Ipv6] = {IPV4: Ipv4(*_ENDS4, packets.UDP), IPV6: Ipv6(*_ENDS6, packets.UDP)}
UNREADABLE: dict[str, Ipv4 | Ipv6] = {
    "ipv4-version": Ipv4(*_ENDS4, packets.UDP, version=6),
    "ipv6-version": Ipv6(*_ENDS6, packets.UDP, version=4),
    "ipv6-options-in-a-fragment": Ipv6(
        *_ENDS6, packets.UDP, [fragment_header(0, more=True), extension(DESTINATION_OPTIONS)]
    ),
}
"""policy/packet.py has the rules. Short IPv4 headers are not here: newer kernels refuse them (bpf/egress.h)."""


@pytest.mark.parametrize("row", UNREADABLE)
def test_an_unreadable_packet_is_dropped_whatever_its_port(guarded: Guarded, row: str) -> None:
    sandbox, backend = guarded
    backend.apply(both_protocols(STRICT_OLD))
    datagram = packets.udp(4242, OPEN_PORT)
    address = IPV4 if isinstance(UNREADABLE[row], Ipv4) else IPV6
    assert sandbox.call(lambda: _leaves(address, READABLE[address].packet(datagram)))
    assert not sandbox.call(lambda: _leaves(address, UNREADABLE[row].packet(datagram)))
    report = read_report(PinLocation.of(sandbox.cgroup))
    assert report is not None
    assert [(str(row.address), row.port, row.lock, row.reason) for row in report.rows] == [
        (address, 0, None, Reason.UNAPPROVED_SOCKET)
    ]


@ADDRESSES
def test_fragments_of_an_approved_datagram_pass(guarded: Guarded, address: str) -> None:
    sandbox, backend = guarded
    backend.apply(both_protocols(STRICT_OLD))

    def in_sandbox() -> int:
        subprocess.run(["ip", "link", "set", "lo", "mtu", "1500"], check=True)
        become(uids=(OLD,) * 3, gids=(GROUP,) * 3, groups=())
        with udp(address)() as one:
            one.settimeout(5)
            one.send(bytes(9_000))
            return len(one.recv(65536))

    assert sandbox.call(in_sandbox) == 9_000


def test_audit_lets_packets_through_and_counts_them(guarded: Guarded) -> None:
    sandbox, backend = guarded
    before = Client(sandbox, STRANGER, tcp())
    backend.apply(STRICT_OLD._replace(mode=Mode.AUDIT))
    after = Client(sandbox, STRANGER, tcp())
    assert (before.answered(), after.answered()) == (True, True)
    counted = dict(zip(Reason, backend.state().counters))
    assert counted[Reason.NOT_LISTED] == (0, 1)
    assert counted[Reason.UNAPPROVED_SOCKET][0] == 0
    assert counted[Reason.UNAPPROVED_SOCKET][1] > 0
    backend.change(STRICT_OLD)
    assert (before.answered(), after.answered()) == (False, False)


def test_other_addresses_are_left_alone(guarded: Guarded) -> None:
    sandbox, backend = guarded
    endpoint = Endpoint(OLD_POLICY.locks[0].endpoints[0].network, tcp=((81, 81),))
    backend.apply(make_policy([Lock("default", (endpoint,), Identities(frozenset({OLD})))], strict=True))
    for address in (IPV4, IPV6):
        assert Client(sandbox, STRANGER, tcp(address)).answered()


def _send_bare_header(address: str) -> str:
    """Whether an IPv4 header with nothing behind it gets out."""
    subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    head = struct.pack("!2B3H2BH", 0x45, 0, 20, 1, 0, 64, socket.IPPROTO_TCP, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as mouth:
        try:
            mouth.sendto(head + bytes(4) + socket.inet_aton(address), (address, 0))
        except PermissionError:
            return "dropped"
        return "sent"


def test_an_unparsable_packet_to_an_address_that_only_an_empty_entry_covers_passes(guarded: Guarded) -> None:
    """With ::/0 the trie has an entry for all of IPv4 that locks nothing. No range of it must be taken for one."""
    sandbox, backend = guarded
    prefixes = {"six": "::/0", "four": "192.0.2.128/25"}  # 192.0.2.7 has the same bit in the bitmap
    web = ((PORT, PORT),)
    locks = [Lock(name, (Endpoint(ipaddress.ip_network(prefix), tcp=web),)) for name, prefix in prefixes.items()]
    backend.apply(make_policy(locks, strict=True))
    assert sandbox.call(lambda: _send_bare_header("192.0.2.129")) == "dropped"
    assert sandbox.call(lambda: _send_bare_header("192.0.2.7")) == "sent"


def test_the_egress_hook_is_attached_under_strict_alone(guarded: Guarded) -> None:
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    assert guards.traces(sandbox.cgroup)["attached"] == 4
    assert backend.apply(STRICT_OLD).done == ("attached egress, too",)
    assert (backend.read(), guards.traces(sandbox.cgroup)["attached"]) == (STRICT_OLD, 5)
    backend.change(OLD_POLICY)
    assert (backend.read(), guards.traces(sandbox.cgroup)["attached"]) == (OLD_POLICY, 4)
    assert backend.faults() == []


def test_a_detached_egress_hook_is_a_fault(guarded: Guarded) -> None:
    sandbox, backend = guarded
    backend.apply(STRICT_OLD)
    with open_cgroup(sandbox.cgroup) as cgroup:
        links = bpf.links_of_cgroup(cgroup.id)
    for fd, link in links:
        if link.attach_type == bpf.AttachType.CGROUP_INET_EGRESS:
            bpf.link_detach(fd)
        os.close(fd)
    assert [fault for fault in backend.faults() if abi.EGRESS in fault]
    backend.apply(STRICT_OLD)
    assert backend.faults() == []
