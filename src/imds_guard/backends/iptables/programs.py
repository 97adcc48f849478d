# SPDX-License-Identifier: Apache-2.0
"""The iptables commands of this machine: which there are, and whether they write nf_tables or legacy tables."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from imds_guard.errors import GuardError, Unsupported
from imds_guard.kernel.run import find_program, run

NFT = "nf_tables"
LEGACY = "legacy"

_COMMANDS = {4: "iptables", 6: "ip6tables"}
_LEGACY_TABLES = {4: "/proc/self/net/ip_tables_names", 6: "/proc/self/net/ip6_tables_names"}


class Program(NamedTuple):
    """One of the iptables commands: its IP version, its name, and whether it writes nf_tables or legacy tables."""

    version: int
    command: str
    kind: str

    @property
    def title(self) -> str:
        """``ip6tables (nf_tables)``."""
        return f"{self.command} ({self.kind})"


def ip_versions() -> tuple[int, ...]:
    """The IP versions of this kernel. Without 6 (ipv6.disable=1) nothing can connect to an IPv6 address."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return (4,)
    return (4, 6)


def default_program(version: int, command: str = "") -> Program:
    """What ``iptables`` or ``ip6tables`` is on this machine. Raises Unsupported when it is absent or does not run."""
    command = command or _COMMANDS[version]
    return Program(version, command, _kind(command, _file(command)))


@functools.cache
def _kind(command: str, file: tuple[int, ...]) -> str:
    """Which tables a command writes. Each file is asked once in the life of a process. A failure is not cached."""
    completed = run([command, "--version"])
    if completed.status != 0:
        raise Unsupported(f"{command} --version failed: {completed.complaint}")
    # "iptables v1.8.9 (nf_tables)". Before 1.8 there was nothing in brackets, and legacy was all there was.
    return NFT if NFT in completed.stdout else LEGACY


def _file(command: str) -> tuple[int, ...]:
    """Identifies the command's file: it changes with update-alternatives(1) and upgrades. Empty without a file."""
    path = find_program(command)
    if path is None:
        return ()
    try:
        status = os.stat(path)
    except FileNotFoundError:  # it was removed meanwhile
        return ()
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


def other_program(program: Program, table: str = "filter") -> list[Program]:
    """The command for the other kind of tables, when it is there and ``table`` of that kind may hold something."""
    kind = LEGACY if program.kind == NFT else NFT
    command = f"{_COMMANDS[program.version]}-{'legacy' if kind == LEGACY else 'nft'}"
    # iptables-legacy-save creates the table that it is asked for. A table that nobody uses is not in this list.
    if kind == LEGACY and not has_legacy_table(program.version, table):
        return []
    return [Program(program.version, command, kind)] if find_program(command) else []


def has_legacy_table(version: int, table: str) -> bool:
    """True when somebody uses ``table`` of the legacy kind."""
    try:
        with open(_LEGACY_TABLES[version], encoding="ascii") as names:
            return table in names.read().split()
    except FileNotFoundError:
        return False


def every_program(commands: Mapping[int, str], needed: bool, table: str = "filter") -> list[Program]:
    """Both kinds for both IP versions, the default one first. None where iptables is not installed or does not run.

    With ``needed``, rules of ours should be in force: then a command that does not run is a GuardError.
    """
    every: list[Program] = []
    for version in (4, 6):
        try:
            program = default_program(version, commands[version])
            every += [program, *other_program(program, table)]
        except Unsupported as error:
            if needed:
                raise GuardError(
                    f"{error}; rules of imds-guard should be in force, and can't be seen or changed until it runs"
                ) from error
    return every


def titles(programs: list[Program]) -> str:
    """``iptables (nf_tables) and ip6tables (nf_tables)``."""
    return " and ".join(program.title for program in programs)
