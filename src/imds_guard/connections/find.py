# SPDX-License-Identifier: Apache-2.0
"""The connected sockets of the machine that lead to a locked address, whoever holds them."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from typing import NamedTuple

from imds_guard.errors import system_text
from imds_guard.kernel import sock_diag
from imds_guard.kernel.namespaces import OWN_PATH, Namespace, network_namespaces
from imds_guard.kernel.sock_diag import CONNECTED, ESTABLISHED, LISTEN, SockDiag, Socket
from imds_guard.policy.decide import Destination
from imds_guard.policy.model import Address, Policy, Protocol, unmapped

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96
_ANYWHERE = (ipaddress.IPv4Address(0), ipaddress.IPv6Address(0))
_KINDS = (
    (Protocol.TCP, socket.IPPROTO_TCP, CONNECTED),
    (Protocol.UDP, socket.IPPROTO_UDP, (ESTABLISHED,)),
)
_PRIVILEGED_PORTS = 1024
_SHOWN = 3


class Scope(NamedTuple):
    """Where to look: a path of a cgroup2 directory for sockets made in it or below; all network namespaces, or this."""

    cgroup: str | None = None
    every_namespace: bool = True


class Candidate(NamedTuple):
    """A socket, and where it leads."""

    socket: Socket
    namespace: Namespace
    destination: Destination


class Candidates:
    """What was found, where was looked, and what could not be seen and why."""

    def __init__(self) -> None:
        self.sockets: list[Candidate] = []
        self.looked_into: list[Namespace] = []
        self.unseen: list[str] = []


def candidates(policy: Policy, scope: Scope) -> Candidates:
    """Every socket of the scope that leads to an address that some lock covers, and that somebody can use."""
    found = Candidates()
    namespaces, hidden = network_namespaces()
    if not scope.every_namespace:
        namespaces, hidden = namespaces[:1], 0
    if hidden:
        found.unseen.append(f"the network namespace of {processes(hidden)} was not found")
    wanted, cgroups = _locked_addresses(policy), _cgroup_ids(scope.cgroup)
    refused: dict[str, list[Namespace]] = {}
    for namespace in namespaces:
        try:
            found.sockets += _in_namespace(namespace, wanted, cgroups, found.unseen)
            found.looked_into.append(namespace)
        except FileNotFoundError:
            continue  # its last process has ended
        except OSError as error:
            refused.setdefault(system_text(error), []).append(namespace)
    found.unseen += [_refused(words, several) for words, several in refused.items()]
    return found


def _refused(words: str, several: list[Namespace]) -> str:
    paths = ", ".join(one.path for one in several[:_SHOWN])
    more = f" and {len(several) - _SHOWN} more" if len(several) > _SHOWN else ""
    return f"entering {paths}{more}: {words}, it takes CAP_SYS_ADMIN"


def processes(hidden: int) -> str:
    """Of whom nothing can be seen."""
    return f"{hidden} process{'' if hidden == 1 else 'es'} that this one may not look at (CAP_SYS_PTRACE)"


def ask(namespace: Namespace) -> SockDiag:
    """Raises FileNotFoundError when the process that led there has ended; OSError."""
    if namespace.path == OWN_PATH:
        return SockDiag()  # nobody needs a privilege to stay
    fd = os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return SockDiag(fd)
    finally:
        os.close(fd)


def _in_namespace(
    namespace: Namespace, wanted: sock_diag.Wanted, cgroups: frozenset[int] | None, unseen: list[str]
) -> list[Candidate]:
    """The sockets of a namespace that lead to a locked address and that somebody can use. Raises OSError."""
    found: list[Candidate] = []
    with ask(namespace) as diag:
        for protocol, number, states in _KINDS:
            try:
                sockets = _sockets(diag, number, states, wanted)
            except FileNotFoundError:
                words = f"{protocol.value.upper()} sockets: this kernel does not tell of them (CONFIG_INET_DIAG)"
                unseen += [] if words in unseen else [words]
                continue
            usable = [one for one in sockets if one.inode and (cgroups is None or one.cgroup_id in cgroups)]
            found += [
                Candidate(one, namespace, Destination(address_of(one.remote), one.remote_port, protocol))
                for one in (_called_by_us(diag, usable) if protocol is Protocol.TCP else usable)
            ]
    return found


def _sockets(
    diag: SockDiag, number: int, states: tuple[int, ...], wanted: sock_diag.Wanted | None = None
) -> list[Socket]:
    return [one for family in _FAMILIES for one in diag.sockets(family, number, states, wanted)]


def _called_by_us(diag: SockDiag, sockets: list[Socket]) -> list[Socket]:
    """Without those that seem to have come in: the peer's port is none of a service, and somebody listens at ours.

    Nothing in the kernel says who began.
    """
    if all(one.remote_port < _PRIVILEGED_PORTS for one in sockets):
        return sockets
    listening = _listening(diag)
    return [one for one in sockets if one.remote_port < _PRIVILEGED_PORTS or not _came_in(one, listening)]


def _listening(diag: SockDiag) -> set[tuple[Address, int]]:
    return {(address_of(one.local), one.local_port) for one in _sockets(diag, socket.IPPROTO_TCP, (LISTEN,))}


def _came_in(one: Socket, listening: set[tuple[Address, int]]) -> bool:
    places = (address_of(one.local), *_ANYWHERE)
    return any((place, one.local_port) in listening for place in places)


def address_of(packed: bytes) -> Address:
    """A packed address; an IPv4-mapped one as IPv4."""
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


def _locked_addresses(policy: Policy) -> sock_diag.Wanted:
    """A quick test that lets everything through that some lock covers, whatever the port."""
    networks: dict[tuple[int, int], set[int]] = {}
    for lock in policy.locks:
        for endpoint in lock.endpoints:
            network = endpoint.network
            host_bits = network.max_prefixlen - network.prefixlen
            known = networks.setdefault((network.max_prefixlen // 8, host_bits), set())
            known.add(int(network.network_address) >> host_bits)
    kinds = tuple((*kind, found) for kind, found in networks.items())

    def wanted(address: bytes, _port: int) -> bool:
        packed = address[12:] if address.startswith(_MAPPED) else address
        number = int.from_bytes(packed, "big")
        return any(size == len(packed) and number >> host_bits in found for size, host_bits, found in kinds)

    return wanted
