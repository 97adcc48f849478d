# SPDX-License-Identifier: Apache-2.0
"""Filters on the running kernel: listeners and their marks, from one policy to the next, and connections to them."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import pytest

from imds_guard.backends.ebpf import EbpfBackend, abi, program
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.features import FILTERS, Feature, loaded_features
from imds_guard.backends.ebpf.filter_listeners import ListenerMarks, listeners_under, wanted_listeners
from imds_guard.backends.ebpf.hooks import pinned_links
from imds_guard.backends.ebpf.pins import PinLocation, link_pin, map_pin
from imds_guard.backends.ebpf.reader import MapReader
from imds_guard.backends.ebpf.store import MapStore
from imds_guard.connections.cut import cut_denied
from imds_guard.connections.find import Scope
from imds_guard.kernel import bpf
from imds_guard.kernel.children import ChildFailed
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.filters import FILTER_PORT, Filter, FilterRules
from imds_guard.policy.model import Identities, Mode, Policy, make_policy
from tests.conformance import witness
from tests.kernel import guards
from tests.kernel.clients import NEEDS_THE_HOST, Client, Stage, opening
from tests.kernel.guards import IPV4, IPV6, NEW, OLD, PORT, STRANGER

pytestmark = NEEDS_THE_HOST

GROUP = 62_001
RULES, OTHER_RULES = FilterRules(allow=("GET /**",)), FilterRules(allow=("GET /latest/**",))


def filtering(
    *users: int, rules: FilterRules = RULES, name: str = "region", allowed: Sequence[int] = (OLD,), strict: bool = False
) -> Policy:
    """The policy that lets OLD through, and sends these users to a filter."""
    (lock,) = guards.policy(*allowed).locks
    named = Filter(name, (lock.name,), Identities(frozenset(users)), rules=rules)
    return make_policy([lock], strict=strict, filters=[named], filter_uid=61_009)


class Scene:
    """A sandbox with the service, and the guard of its cgroup."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox, self.backend = sandbox, EbpfBackend(sandbox.cgroup, guards.FAST)
        self.location = PinLocation.of(sandbox.cgroup)

    def listeners(self) -> tuple[Listener, ...]:
        """What has to listen now."""
        found = wanted_listeners(self.location)
        return () if found is None else found.listeners

    def serve(self) -> int:
        """Starts what listens for the policy in force."""
        wanted = self.listeners()

        def listen() -> list[socket.socket]:
            with ListenerMarks(self.location) as marks:
                return witness.listen_as_filters(wanted, marks.mark)

        return self.sandbox.serve_with(listen, witness.greet_forever)

    def reached(self, user: int, to: str = IPV4, port: int = PORT) -> str:
        """``endpoint``, the address of a filter's listener, or the name of an errno."""

        def connect() -> str:
            become((user,) * 3, (GROUP,) * 3, ())
            with socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET) as one:
                one.settimeout(5)
                error = one.connect_ex((to, port))
                return errno.errorcode[error] if error else one.recv(64).decode() or "endpoint"

        return self.sandbox.call(connect)


@contextmanager
def scene() -> Iterator[Scene]:
    with Sandbox((IPV4, IPV6)) as sandbox:
        sandbox.serve((IPV4, IPV6), (PORT,))
        one = Scene(sandbox)
        try:
            yield one
        finally:
            one.backend.remove()


@pytest.fixture
def here() -> Iterator[Scene]:
    with scene() as one:
        yield one


def address(here: Scene) -> str:
    """Of the listener for the IPv4 address."""
    return str(here.listeners()[0].address)


def hooks(here: Scene) -> set[str]:
    return {hook.name for hook in here.backend.state().hooks}


# --- from one policy to the next ------------------------------------------------------------------------------------


def test_filters_come_and_go(here: Scene) -> None:
    """The hooks of getpeername are attached as long as there are filters."""
    here.backend.apply(guards.policy(OLD))
    assert hooks(here) == set(abi.needed_hooks(guards.policy(OLD)))
    here.backend.change(filtering(NEW))
    assert (here.backend.read(), here.backend.faults()) == (filtering(NEW), [])
    assert hooks(here) == set(abi.HOOKS) - {abi.EGRESS}
    assert here.reached(NEW) == "EPERM"
    here.serve()
    assert [here.reached(user) for user in (OLD, NEW, STRANGER)] == ["endpoint", address(here), "EPERM"]
    here.backend.change(guards.policy(OLD))
    assert hooks(here) == set(abi.needed_hooks(guards.policy(OLD)))
    assert [here.reached(user) for user in (OLD, NEW)] == ["endpoint", "EPERM"]
    assert here.listeners() == ()


def loaded(here: Scene) -> frozenset[Feature]:
    """The features of each program at connect and sendmsg; they are the same."""
    with MapReader.open(here.location.pins() or "") as maps:
        guarding = [hook for hook in here.backend.state().hooks if hook.name not in abi.INDIFFERENT]
        (found,) = {loaded_features([hook], maps.map_id) for hook in guarding}
        return found


def links(here: Scene) -> dict[int, int]:
    """Hook -> the ID of its link."""
    return {link.attach_type: link.id for link in pinned_links(here.location.pins() or "")}


def test_programs_have_the_code_of_filters_where_the_policy_has_some(here: Scene) -> None:
    """They replace each other in the same links. A change of users leaves them alone."""
    here.backend.apply(guards.policy(OLD))
    before = links(here)
    assert loaded(here) == frozenset()
    done = here.backend.change(filtering(NEW)).done
    assert "put programs with filters in place" in done
    assert loaded(here) == {FILTERS}
    programs = here.backend.state().versions
    here.backend.change(filtering(NEW, STRANGER))
    here.backend.apply(filtering(NEW, STRANGER))
    assert here.backend.state().versions == programs
    done = here.backend.apply(guards.policy(OLD)).done
    assert "put programs without filters in place" in done
    assert (loaded(here), links(here), here.backend.faults()) == (frozenset(), before, [])
    assert [here.reached(user) for user in (OLD, NEW)] == ["endpoint", "EPERM"]


def test_start_gives_a_policy_the_form_that_it_needs_at_once(here: Scene) -> None:
    here.backend.apply(filtering(NEW))
    assert loaded(here) == {FILTERS}
    here.backend.remove()
    here.backend.apply(guards.policy(OLD))
    assert loaded(here) == frozenset()


def test_a_program_without_the_code_that_its_policy_needs_is_a_fault(here: Scene) -> None:
    """Another tool put it there: callers of filters are denied until it is repaired."""
    here.backend.apply(filtering(NEW))
    here.serve()
    pins = here.location.pins() or ""
    with MapStore.open(pins) as maps:
        fd = program.load_hooks(["connect4"], maps.fds(), guards.FAST)["connect4"]
    link_fd = bpf.pinned(link_pin(pins, "connect4"))
    bpf.link_update(link_fd, fd)
    os.close(link_fd)
    os.close(fd)
    assert here.reached(NEW) == "EPERM"
    (fault,) = here.backend.faults()
    assert "connect4 has no code for filters" in fault
    here.backend.apply(filtering(NEW))
    assert (here.backend.faults(), here.reached(NEW)) == ([], address(here))


@pytest.mark.parametrize("hook", abi.GETPEERNAME)
def test_a_hook_of_getpeername_that_is_gone_is_a_fault(here: Scene, hook: str) -> None:
    """Its link is gone, or runs a program on other maps."""
    here.backend.apply(filtering(NEW))
    pins = here.location.pins() or ""
    fd = bpf.pinned(link_pin(pins, hook))
    bpf.link_detach(fd)
    os.close(fd)
    assert [fault for fault in here.backend.faults() if hook in fault and "not attached" in fault]
    here.backend.change(filtering(NEW))
    assert here.backend.faults() == []
    replacement = _program_on_other_maps(hook)
    fd = bpf.pinned(link_pin(pins, hook))
    bpf.link_update(fd, replacement)
    os.close(fd)
    os.close(replacement)
    assert [fault for fault in here.backend.faults() if hook in fault and "uses other maps" in fault]
    here.backend.change(filtering(NEW))
    assert here.backend.faults() == []
    here.serve()
    assert peer_of(here, IPV4) == (IPV4, PORT)


def _program_on_other_maps(hook: str) -> int:
    fds = [bpf.map_create(shape, "ig_test") for _, shape in sorted(abi.SHAPES.items())]
    try:
        return program.load_hooks([hook], fds, ())[hook]
    finally:
        for fd in fds:
            os.close(fd)


def peer_of(here: Scene, to: str) -> tuple[str, int]:
    """What getpeername(2) shows to a caller of the filter."""

    def connect() -> tuple[str, int]:
        become((NEW,) * 3, (GROUP,) * 3, ())
        with socket.create_connection((to, PORT), 5) as one:
            address, port, *_ = one.getpeername()
            return str(address), int(port)

    return here.sandbox.call(connect)


def test_an_unchanged_filter_keeps_its_address_and_a_changed_one_does_not(here: Scene) -> None:
    """What listens for the old rules is out of reach with the first connect under the new ones."""
    here.backend.apply(filtering(NEW))
    before = here.listeners()
    here.serve()
    here.backend.change(filtering(NEW, STRANGER))
    assert here.listeners() == before
    assert here.reached(STRANGER) == address(here)
    here.backend.change(filtering(NEW, rules=OTHER_RULES))
    assert {one.address for one in here.listeners()}.isdisjoint({one.address for one in before})
    assert here.reached(NEW) == "EPERM"
    here.serve()
    assert here.reached(NEW) == address(here)


def test_a_dead_filter_is_a_denial_at_once(here: Scene) -> None:
    here.backend.apply(filtering(NEW))
    pid = here.serve()
    assert here.reached(NEW) == address(here)
    here.sandbox.end(pid)
    assert here.reached(NEW) == "EPERM"


def test_the_marks_outlive_a_replacement_of_maps_and_programs(here: Scene) -> None:
    """A pin that is missing makes start build the guard anew. Filters serve on."""
    here.backend.apply(filtering(NEW))
    here.serve()
    os.unlink(map_pin(here.location.pins() or "", Map.MEMBERS))
    done = here.backend.apply(filtering(NEW))
    assert "replaced maps" in done.done[0]
    assert here.reached(NEW) == address(here)


def test_nobody_connects_to_a_filter_directly(here: Scene) -> None:
    """Not even whoever the filter names, root, or an allowed user; mapped to IPv6, or by 0.0.0.0."""
    here.backend.apply(filtering(NEW))
    here.serve()
    for user in (0, OLD, NEW, STRANGER):
        for to in (address(here), f"::ffff:{address(here)}"):
            assert here.reached(user, to, FILTER_PORT) == "EPERM"
    assert here.backend.state().counters[Reason.FILTER_ADDRESS] == (8, 0)


def test_no_detour_leads_to_a_filter(here: Scene) -> None:
    """By its address as one's own and 0.0.0.0 or ::, and by Fast Open."""
    here.backend.apply(filtering(NEW))
    here.serve()
    filter_address = address(here)

    def attempts() -> dict[str, str]:
        become((STRANGER,) * 3, (GROUP,) * 3, ())
        found = {}
        for family, own, to in (
            (socket.AF_INET, filter_address, "0.0.0.0"),
            (socket.AF_INET6, f"::ffff:{filter_address}", "::"),
            (socket.AF_INET6, f"::ffff:{filter_address}", "::ffff:0.0.0.0"),
        ):
            with socket.socket(family) as one:
                one.bind((own, 0))
                found[f"own address, {to}"] = errno.errorcode.get(one.connect_ex((to, FILTER_PORT)), "connected")
        with socket.socket() as one:
            try:
                one.sendto(b"GET /", socket.MSG_FASTOPEN, (filter_address, FILTER_PORT))
                found["fast open"] = "connected"
            except OSError as error:
                found["fast open"] = errno.errorcode[error.errno or 0]
        return found

    assert set(here.sandbox.call(attempts).values()) == {"EPERM"}


def test_a_socket_that_is_disconnected_is_judged_anew(here: Scene) -> None:
    """By whoever connects it then: its first connect gives no right."""
    here.backend.apply(filtering(NEW, strict=True))
    here.serve()

    def connect_twice() -> tuple[str, list[str]]:
        with socket.socket() as one:
            one.settimeout(5)
            become((0, NEW, 0), (GROUP,) * 3, ())
            one.connect((IPV4, PORT))
            first = one.recv(64).decode()
            assert _disconnect(one) == 0
            become((0, 0, 0))
            become((STRANGER,) * 3)
            codes = [one.connect_ex(to) for to in ((IPV4, PORT), (filter_address, FILTER_PORT))]
            return first, [errno.errorcode.get(code, "connected") for code in codes]

    filter_address = address(here)
    assert here.sandbox.call(connect_twice) == (filter_address, ["EPERM", "EPERM"])


def _disconnect(one: socket.socket) -> int:
    """connect(2) with AF_UNSPEC, which Python can't write."""
    return ctypes.CDLL(None).connect(one.fileno(), bytes(16), 16)  # type: ignore[no-any-return]


REUSE_ADDRESS, REUSE_PORT = (socket.SO_REUSEADDR, 1), (socket.SO_REUSEPORT, 1)
ON_LOOPBACK = (socket.SO_BINDTODEVICE, b"lo")
BESIDE: dict[str, tuple[str, tuple[tuple[int, int | bytes], ...]]] = {
    "same": ("{}", ()),
    "same-reuse": ("{}", (REUSE_ADDRESS, REUSE_PORT)),
    "same-on-loopback": ("{}", (REUSE_ADDRESS, REUSE_PORT, ON_LOOPBACK)),
    "mapped-on-loopback": ("::ffff:{}", (REUSE_ADDRESS, REUSE_PORT, ON_LOOPBACK)),
    "all": ("0.0.0.0", (REUSE_ADDRESS, REUSE_PORT)),
    "all-on-loopback": ("0.0.0.0", (REUSE_ADDRESS, REUSE_PORT, ON_LOOPBACK)),
    "all-ipv6-on-loopback": ("::", (REUSE_ADDRESS, REUSE_PORT, ON_LOOPBACK)),
}
"""Where somebody with CAP_NET_BIND_SERVICE listens beside a filter. The kernel prefers a listener on the interface at
which a connection arrives, and the hook asks for none."""


def opened(to: str, options: Sequence[tuple[int, int | bytes]]) -> socket.socket:
    one = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET)
    for option, value in options:
        one.setsockopt(socket.SOL_SOCKET, option, value)
    one.bind((to, FILTER_PORT))
    return one


@pytest.mark.parametrize("bound_first", [False, True], ids=["afterwards", "bound-before"])
@pytest.mark.parametrize("row", BESIDE)
def test_nobody_takes_the_callers_of_a_filter(here: Scene, row: str, bound_first: bool) -> None:
    """The other listener can't be had, or callers go on reaching the filter or nothing, and never the other one."""
    here.backend.apply(filtering(NEW))
    shape, options = BESIDE[row]
    where = shape.format(address(here))
    ours, theirs = socket.socketpair()

    def bound() -> list[socket.socket]:
        return [opened(where, options)] if bound_first else []

    def squat(sockets: list[socket.socket]) -> None:
        theirs.recv(1)
        try:
            (one,) = sockets or [opened(where, options)]
            one.listen()
        except OSError as error:
            theirs.send(errno.errorcode[error.errno or 0].encode())
            return
        theirs.send(b"listens")
        while True:
            one.accept()[0].send(b"taken")

    with ours, theirs:
        here.sandbox.serve_with(bound, squat)
        with suppress(ChildFailed):  # the address was taken, so that there is no filter
            here.serve()
        ours.settimeout(5)
        ours.send(b".")
        assert ours.recv(64) in (b"listens", b"EADDRINUSE")
        assert here.reached(NEW) in (address(here), "EPERM")


def test_a_socket_for_ipv6_alone_does_not_reach_the_filter(here: Scene) -> None:
    """The kernel refuses the address of IPv4 that it is sent to."""
    here.backend.apply(filtering(NEW))
    here.serve()

    def connect() -> int:
        become((NEW,) * 3, (GROUP,) * 3, ())
        with socket.socket(socket.AF_INET6) as one:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            return one.connect_ex((IPV6, PORT))

    assert here.sandbox.call(connect) == errno.ENETUNREACH


def test_a_listener_has_a_mark_of_its_own(here: Scene) -> None:
    here.backend.apply(filtering(NEW))
    with ListenerMarks(here.location) as marks, socket.socket() as one, socket.socket() as other:
        assert marks.mark_of(one.fileno()) is None
        marks.mark(one.fileno(), 2**64 - 1)
        marks.mark(other.fileno(), 5)
        marks.mark(other.fileno(), 6)
        assert (marks.mark_of(one.fileno()), marks.mark_of(other.fileno())) == (2**64 - 1, 6)


def test_what_would_listen_is_known_before_the_change(here: Scene) -> None:
    here.backend.apply(filtering(NEW))
    expected = listeners_under(filtering(NEW, rules=OTHER_RULES), here.sandbox.cgroup)
    here.backend.change(filtering(NEW, rules=OTHER_RULES))
    assert tuple(expected) == here.listeners()
    assert tuple(listeners_under(filtering(NEW, rules=OTHER_RULES), here.sandbox.cgroup)) == here.listeners()


# --- strict mode ----------------------------------------------------------------------------------------------------


def test_a_strict_policy_lets_packets_to_the_filter_through(here: Scene) -> None:
    """A redirected socket is approved for its filter, before and after a change of policy."""
    here.backend.apply(filtering(NEW, strict=True))
    here.serve()
    assert [here.reached(user) for user in (OLD, NEW, STRANGER)] == ["endpoint", address(here), "EPERM"]
    assert here.backend.state().counters[Reason.UNAPPROVED_SOCKET] == (0, 0)


# --- connections that are older than the policy ---------------------------------------------------------------------


def cut(here: Scene, policy: Policy) -> list[str]:
    """Why connections are cut when the policy comes into force."""
    here.backend.change(policy)
    listeners = listeners_under(policy, here.sandbox.cgroup)
    return [one.why for one in cut_denied(policy, Scope(here.sandbox.cgroup), listeners=listeners).cut]


@contextmanager
def connected(here: Scene, user: int) -> Iterator[Client]:
    stage = Stage(here.sandbox)
    try:
        yield stage.client(opening(IPV4), uid=user, gid=GROUP)
    finally:
        stage.close()


@contextmanager
def kept(here: Scene) -> Iterator[None]:
    """In place of the greeting listener one that keeps its connections open."""
    wanted = here.listeners()

    def listen() -> list[socket.socket]:
        with ListenerMarks(here.location) as marks:
            return witness.listen_as_filters(wanted, marks.mark)

    def keep(sockets: list[socket.socket]) -> None:
        held = []
        while True:
            held.append(sockets[0].accept())

    pid = here.sandbox.serve_with(listen, keep)
    try:
        yield
    finally:
        here.sandbox.end(pid)


def test_a_connection_stays_where_its_filter_is_the_same(here: Scene) -> None:
    """Whatever else changes. A user that is allowed now keeps it, too."""
    here.backend.apply(filtering(NEW))
    with kept(here), connected(here, NEW) as client:
        assert cut(here, filtering(NEW, STRANGER)) == []
        assert cut(here, filtering(NEW, allowed=(OLD, STRANGER))) == []
        assert cut(here, filtering(STRANGER, allowed=(OLD, NEW))) == []
        assert client.write() == ["sent"]


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (filtering(NEW, rules=OTHER_RULES), "its filter has other rules now"),
        (filtering(NEW, name="another"), "its filter has other rules now"),
        (filtering(STRANGER), "not-listed in lock 'default'"),
    ],
    ids=["rules", "name", "who"],
)
def test_a_connection_is_cut_where_its_filter_changed(here: Scene, after: Policy, why: str) -> None:
    here.backend.apply(filtering(NEW))
    with kept(here), connected(here, NEW) as client:
        assert cut(here, after) == [why]
        assert client.write() == ["ECONNABORTED"]


def test_a_direct_connection_of_somebody_who_is_filtered_now_is_cut(here: Scene) -> None:
    """The filter itself keeps its connections to the endpoint."""
    here.backend.apply(guards.policy(OLD, NEW, 61_009))
    with connected(here, NEW) as client, connected(here, 61_009) as account:
        assert cut(here, filtering(NEW)) == ["filtered in lock 'default', by filter 'region'"]
        assert (client.write(), account.write()) == (["ECONNABORTED"], ["sent"])


def test_audit_mode_redirects_nobody(here: Scene) -> None:
    here.backend.apply(filtering(NEW)._replace(mode=Mode.AUDIT))
    here.serve()
    assert [here.reached(user) for user in (OLD, NEW, STRANGER)] == ["endpoint"] * 3
    assert here.backend.state().counters[Reason.FILTERED] == (0, 1)
