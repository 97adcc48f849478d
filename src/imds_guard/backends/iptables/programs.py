# SPDX-License-Identifier: Apache-2.0
"""The iptables commands of this machine: which there are, and whether they write nf_tables or legacy tables."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from imds_guard.errors import GuardError, Unsupported
from imds_guard.kernel.netns import has_ipv6
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
    """The IP versions of this kernel. Without 6 (ipv6.disable=1) nothing can connect to an IPv6 address.

    There ip6tables-legacy fails, and ip6tables-nft shows empty tables.
    """
    return (4, 6) if has_ipv6() else (4,)


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


class Programs(NamedTuple):
    """The commands that run here, and a sentence for each default command that does not."""

    running: list[Program]
    missing: list[str]


def every_program(commands: Mapping[int, str], table: str = "filter") -> Programs:
    """Both kinds for each IP version, the default one first. None where iptables is not installed or does not run."""
    running: list[Program] = []
    missing: list[str] = []
    for version in ip_versions():
        try:
            program = default_program(version, commands[version])
            running += [program, *other_program(program, table)]
        except Unsupported as error:
            missing.append(
                f"{error}; rules of imds-guard should be in force, and can't be seen or changed until it runs"
            )
    return Programs(running, missing)


def require_none(missing: Sequence[str]) -> None:
    """Raises GuardError with the sentences of Programs.missing."""
    if missing:
        raise GuardError("; ".join(missing))


def titles(programs: list[Program]) -> str:
    """``iptables (nf_tables) and ip6tables (nf_tables)``."""
    return " and ".join(program.title for program in programs)
