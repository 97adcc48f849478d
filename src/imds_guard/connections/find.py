# SPDX-License-Identifier: Apache-2.0
"""Finds the connected sockets of the machine whose remote end is a locked address, whoever holds them."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from imds_guard.errors import system_text
from imds_guard.kernel import sock_diag
from imds_guard.kernel.abandonable import Limits, Unanswered, Worker
from imds_guard.kernel.namespaces import Namespace, network_namespaces
from imds_guard.kernel.sock_diag import CONNECTED, ESTABLISHED, LISTEN, SockDiag, Socket, open_sock_diag
from imds_guard.policy.decide import Destination
from imds_guard.policy.filters import FILTER_NETWORK, FILTER_PORT
from imds_guard.policy.model import Address, Endpoint, Policy, Protocol, unmapped
from imds_guard.policy.ports import NO_PORTS, Ports, has_port
from imds_guard.text import count_of, some_of

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96
_UNSPECIFIED = (ipaddress.IPv4Address(0), ipaddress.IPv6Address(0))
_PROTOCOLS = (
    (Protocol.TCP, socket.IPPROTO_TCP, CONNECTED),
    (Protocol.UDP, socket.IPPROTO_UDP, (ESTABLISHED,)),
)
_PRIVILEGED_PORTS = 1024
_MAX_SHOWN = 3


class Scope(NamedTuple):
    """Where to search."""

    cgroup: str | None = None
    """The path of a cgroup2 directory: only sockets that were made in it or below it."""
    every_namespace: bool = True
    """All network namespaces, or only the calling thread's."""


class FoundSocket(NamedTuple):
    """A socket, its network namespace, and its remote end."""

    socket: Socket
    namespace: Namespace
    destination: Destination
    seems_accepted: bool
    """Its peer's port is no port of a service, and something listens at its own. A process can arrange that."""


LIMITS = Limits(share_s=3.0, total_s=10.0)
"""1,024 namespaces take 4.2 s. Linux 5.10 holds sock_diag_table_mutex while it destroys a socket. So one SOCK_DESTROY
that hangs, of whomever, hangs every other request of sock_diag.
"""
MAX_SOCKETS = 4096
"""Of one namespace: the sockets that are judged. Anybody can make as many as they like in a namespace of their own."""
MAX_ALL_SOCKETS = 16384
"""Of all namespaces. Each takes 2 KB in this process."""

MAX_LISTENING = 65536
"""Of one namespace: the listening sockets that are known."""


class FoundSockets:
    """The sockets, the namespaces that were searched, and what could not be searched and why."""

    def __init__(self) -> None:
        self.sockets: list[FoundSocket] = []
        self.searched: list[Namespace] = []
        self.errors: list[str] = []
        self._more = 0
        self._refused: dict[str, list[str]] = {}

    def add(self, namespace: Namespace, answer: _Answer | Unanswered) -> None:
        """Adds what was found in a namespace."""
        if isinstance(answer, Unanswered):
            self._refused.setdefault(_UNANSWERED[answer], []).append(namespace.path)
        elif answer.refused is not None:
            self._refused.setdefault(f"{answer.refused}, it takes CAP_SYS_ADMIN", []).append(namespace.path)
        elif not answer.gone:
            space = max(0, MAX_ALL_SOCKETS - len(self.sockets))
            self.sockets += answer.sockets[:space]
            self._more += answer.more + len(answer.sockets[space:])
            self.errors += [text for text in answer.errors if text not in self.errors]
            self.searched.append(namespace)

    def finish(self) -> None:
        """Adds the errors that are about several namespaces."""
        self.errors += [f"entering {some_of(paths, _MAX_SHOWN)}: {text}" for text, paths in self._refused.items()]
        if self._more:
            self.errors.append(
                f"{count_of(self._more, 'more socket')} to locked addresses: at most {MAX_SOCKETS} of a namespace and "
                f"{MAX_ALL_SOCKETS} of all are looked at"
            )


_Wanted = dict[Protocol, sock_diag.Wanted]
_UNANSWERED = {
    Unanswered.HUNG: f"no answer within {LIMITS.share_s:g} s",
    Unanswered.NOT_ASKED: "not tried, since others did not answer or time was over",
}


class _Answer(NamedTuple):
    """Of one namespace."""

    sockets: list[FoundSocket] = []
    more: int = 0
    errors: tuple[str, ...] = ()
    refused: str | None = None
    gone: bool = False
    """Its last process has ended."""


def find_sockets(policy: Policy, scope: Scope, limits: Limits = LIMITS) -> FoundSockets:
    """Every socket of the scope that is connected to an address and port that some lock covers, or to a filter.

    Sockets without a file are left out: nobody can use them. A child searches, since others can make it hang.
    """
    found = FoundSockets()
    namespaces, hidden, more = network_namespaces()
    if not scope.every_namespace:
        namespaces, hidden, more = namespaces[:1], 0, 0
    if more:
        found.errors.append(
            f"{count_of(more, 'network namespace')} beyond the first {len(namespaces)} were not searched; those of "
            "root come first, then one of each other user in turn"
        )
    if hidden:
        found.errors.append(f"{hidden_processes(hidden)}, so connections in other network namespaces may be missing")
    wanted = {protocol: _locked_endpoints(policy, protocol) for protocol, _, _ in _PROTOCOLS}
    cgroups = _cgroup_ids(scope.cgroup)

    def work(namespace: Namespace) -> _Answer:
        return _search(namespace, wanted, cgroups)

    with Worker(work) as worker:
        for namespace, answer in worker.ask_each(namespaces, limits):
            found.add(namespace, answer)
    found.finish()
    return found


def hidden_processes(number: int) -> str:
    """That this process can see nothing of so many others."""
    return f"{number} process{'' if number == 1 else 'es'} may not be inspected (CAP_SYS_PTRACE is missing)"


def _search(namespace: Namespace, wanted: _Wanted, cgroups: frozenset[int] | None) -> _Answer:
    try:
        with open_sock_diag(namespace) as diag:
            return _in_namespace(diag, namespace, wanted, cgroups)
    except FileNotFoundError:
        return _Answer(gone=True)
    except OSError as error:
        return _Answer(refused=system_text(error))


def _in_namespace(diag: SockDiag, namespace: Namespace, wanted: _Wanted, cgroups: frozenset[int] | None) -> _Answer:
    """The sockets of one namespace; those beyond MAX_SOCKETS are counted. Raises OSError."""
    found: list[FoundSocket] = []
    more, errors = 0, []
    for protocol, number, states in _PROTOCOLS:
        try:
            for one, seems_accepted in _outgoing_first(diag, number, states, wanted[protocol]):
                if not one.inode or (cgroups is not None and one.cgroup_id not in cgroups):
                    continue
                more += len(found) >= MAX_SOCKETS
                if len(found) < MAX_SOCKETS:
                    remote = Destination(address_of(one.remote), one.remote_port, protocol)
                    found.append(FoundSocket(one, namespace, remote, seems_accepted))
        except FileNotFoundError:
            errors.append(f"{protocol.value.upper()} sockets: this kernel can't list them (CONFIG_INET_DIAG)")
    return _Answer(found, more, tuple(errors))


def _sockets(
    diag: SockDiag, number: int, states: tuple[int, ...], wanted: sock_diag.Wanted | None = None
) -> Iterator[Socket]:
    for family in _FAMILIES:
        yield from diag.each_socket(family, number, states, wanted)


def _outgoing_first(
    diag: SockDiag, number: int, states: tuple[int, ...], wanted: sock_diag.Wanted
) -> Iterator[tuple[Socket, bool]]:
    """The sockets, and whether they seem to be accepted ones: these come last, so that they don't crowd out others.

    The sockets are listed again rather than kept: there may be any number of them.
    """
    with_high_port = False
    for one in _sockets(diag, number, states, wanted):
        if number != socket.IPPROTO_TCP or one.remote_port < _PRIVILEGED_PORTS:
            yield one, False
        else:
            with_high_port = True
    listening = _listening(diag) if with_high_port else set()
    for accepted in (False, True) if with_high_port else ():
        for one in _sockets(diag, number, states, wanted):
            if one.remote_port >= _PRIVILEGED_PORTS and _is_listened_at(one, listening) is accepted:
                yield one, accepted


def _listening(diag: SockDiag) -> set[tuple[Address, int]]:
    """At most MAX_LISTENING of them. A connection to another one is taken for an outgoing one."""
    found: set[tuple[Address, int]] = set()
    for one in _sockets(diag, socket.IPPROTO_TCP, (LISTEN,)):
        if len(found) < MAX_LISTENING:
            found.add((address_of(one.local), one.local_port))
    return found


def _is_listened_at(one: Socket, listening: set[tuple[Address, int]]) -> bool:
    addresses = (address_of(one.local), *_UNSPECIFIED)
    return any((address, one.local_port) in listening for address in addresses)


def address_of(packed: bytes) -> Address:
    """The address in 4 or 16 bytes; an IPv4-mapped one as the IPv4 address that it stands for."""
    return unmapped(ipaddress.ip_address(packed))


def _cgroup_ids(path: str | None) -> frozenset[int] | None:
    """The IDs of a cgroup and of all below it: the inodes of their directories (kernfs_node in Linux)."""
    if path is None:
        return None
    found = set()
    for folder, _, _ in os.walk(path):
        with suppress(FileNotFoundError):  # removed meanwhile
            found.add(os.stat(folder).st_ino)
    return frozenset(found)


def _locked_endpoints(policy: Policy, protocol: Protocol) -> sock_diag.Wanted:
    """A quick test that is true for every address and port that some lock covers, or where filters listen."""
    networks: dict[tuple[int, int], dict[int, Ports]] = {}
    filters = [Endpoint(FILTER_NETWORK, ((FILTER_PORT, FILTER_PORT),))] if policy.filters else []
    for endpoint in (*filters, *(one for lock in policy.locks for one in lock.endpoints)):
        network = endpoint.network
        host_bits = network.max_prefixlen - network.prefixlen
        known = networks.setdefault((network.max_prefixlen // 8, host_bits), {})
        number = int(network.network_address) >> host_bits
        known[number] = known.get(number, NO_PORTS) + endpoint.ports(protocol)
    by_size = tuple((*key, found) for key, found in networks.items())

    def wanted(address: bytes, port: int) -> bool:
        packed = address[12:] if address.startswith(_MAPPED) else address
        number = int.from_bytes(packed, "big")
        return any(
            size == len(packed) and has_port(found.get(number >> host_bits, NO_PORTS), port)
            for size, host_bits, found in by_size
        )

    return wanted
