# SPDX-License-Identifier: Apache-2.0
"""Finds the connected sockets of the machine whose remote end is a locked address, whoever holds them."""

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


class FoundSockets:
    """The sockets, the namespaces that were searched, and what could not be searched and why."""

    def __init__(self) -> None:
        self.sockets: list[FoundSocket] = []
        self.searched: list[Namespace] = []
        self.errors: list[str] = []


def find_sockets(policy: Policy, scope: Scope) -> FoundSockets:
    """Every socket of the scope that is connected to an address that some lock covers, whatever the port.

    Sockets without a file are left out: nobody can use them.
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
        found.errors.append(f"the network namespace of {hidden_processes(hidden)} was not found")
    wanted, cgroups = _locked_addresses(policy), _cgroup_ids(scope.cgroup)
    refused: dict[str, list[str]] = {}
    for namespace in namespaces:
        try:
            found.sockets += _in_namespace(namespace, wanted, cgroups, found.errors)
            found.searched.append(namespace)
        except FileNotFoundError:
            continue  # its last process has ended
        except OSError as error:
            refused.setdefault(system_text(error), []).append(namespace.path)
    found.errors += [
        f"entering {some_of(paths, _MAX_SHOWN)}: {text}, it takes CAP_SYS_ADMIN" for text, paths in refused.items()
    ]
    return found


def hidden_processes(number: int) -> str:
    """Processes of which this one can see nothing, as text."""
    return f"{number} process{'' if number == 1 else 'es'} that this one may not inspect (CAP_SYS_PTRACE)"


def open_sock_diag(namespace: Namespace) -> SockDiag:
    """Raises OSError; FileNotFoundError when the process whose path leads to the namespace has ended."""
    if namespace.path == OWN_PATH:
        return SockDiag()  # our own namespace needs no privilege
    fd = os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return SockDiag(fd)
    finally:
        os.close(fd)


def _in_namespace(
    namespace: Namespace, wanted: sock_diag.Wanted, cgroups: frozenset[int] | None, errors: list[str]
) -> list[FoundSocket]:
    """The sockets of one namespace. Raises OSError."""
    found: list[FoundSocket] = []
    with open_sock_diag(namespace) as diag:
        for protocol, number, states in _PROTOCOLS:
            try:
                sockets = _sockets(diag, number, states, wanted)
            except FileNotFoundError:
                text = f"{protocol.value.upper()} sockets: this kernel can't list them (CONFIG_INET_DIAG)"
                errors += [] if text in errors else [text]
                continue
            usable = [one for one in sockets if one.inode and (cgroups is None or one.cgroup_id in cgroups)]
            found += [
                FoundSocket(one, namespace, Destination(address_of(one.remote), one.remote_port, protocol))
                for one in (_outgoing(diag, usable) if protocol is Protocol.TCP else usable)
            ]
    return found


def _sockets(
    diag: SockDiag, number: int, states: tuple[int, ...], wanted: sock_diag.Wanted | None = None
) -> list[Socket]:
    return [one for family in _FAMILIES for one in diag.sockets(family, number, states, wanted)]


def _outgoing(diag: SockDiag, sockets: list[Socket]) -> list[Socket]:
    """Without the connections that seem to be incoming: no service has the remote port, and ours is listened at.

    The kernel does not record which end has connected.
    """
    if all(one.remote_port < _PRIVILEGED_PORTS for one in sockets):
        return sockets
    listening = _listening(diag)
    return [one for one in sockets if one.remote_port < _PRIVILEGED_PORTS or not _is_accepted(one, listening)]


def _listening(diag: SockDiag) -> set[tuple[Address, int]]:
    return {(address_of(one.local), one.local_port) for one in _sockets(diag, socket.IPPROTO_TCP, (LISTEN,))}


def _is_accepted(one: Socket, listening: set[tuple[Address, int]]) -> bool:
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


def _locked_addresses(policy: Policy) -> sock_diag.Wanted:
    """A quick test that is true for every address that some lock covers, whatever the port."""
    networks: dict[tuple[int, int], set[int]] = {}
    for lock in policy.locks:
        for endpoint in lock.endpoints:
            network = endpoint.network
            host_bits = network.max_prefixlen - network.prefixlen
            known = networks.setdefault((network.max_prefixlen // 8, host_bits), set())
            known.add(int(network.network_address) >> host_bits)
    by_size = tuple((*key, found) for key, found in networks.items())

    def wanted(address: bytes, _port: int) -> bool:
        packed = address[12:] if address.startswith(_MAPPED) else address
        number = int.from_bytes(packed, "big")
        return any(size == len(packed) and number >> host_bits in found for size, host_bits, found in by_size)

    return wanted
