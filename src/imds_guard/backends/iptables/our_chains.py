# SPDX-License-Identifier: Apache-2.0
"""Our chains below one anchor, in all tables of this network namespace: all are replaced or removed, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Callable

from imds_guard.backends.iptables.programs import (
    NFT,
    Program,
    every_program,
    has_legacy_table,
    other_program,
    require_none,
)
from imds_guard.backends.iptables.state_file import StateFile
from imds_guard.backends.iptables.tables import Anchor, NoTable, Table, clear, owned, read_table, replace
from imds_guard.errors import GuardError

COMMANDS = ("iptables", "ip6tables")
"""For IP version 4 and 6: the machine's default."""


_Saved = list[tuple[Program, Table]]


class OurChains:
    """The chains below ``anchor``. ``state`` is the text of the state file while they should be in force.

    ``commands`` are for IP version 4 and 6 ("iptables-legacy", "ip6tables-legacy").
    """

    def __init__(
        self, anchor: Anchor, state_file: StateFile, state: str, commands: tuple[str, str], lock_wait_s: int
    ) -> None:
        self.anchor = anchor
        self.state_file = state_file
        self.commands: dict[int, str] = {4: commands[0], 6: commands[1]}
        self.lock_wait_s = lock_wait_s
        self._state = state

    def programs(self) -> list[Program]:
        """Every program in whose tables our chains may be. Raises GuardError where chains of ours can't be seen."""
        require_none(self.missing())
        return self.running()

    def running(self) -> list[Program]:
        """As programs(), those that run. To read a legacy table that nobody uses would make it."""
        table = self.anchor.table
        every = every_program(self.commands, table).running
        return [one for one in every if table == "filter" or one.kind == NFT or has_legacy_table(one.version, table)]

    def missing(self) -> list[str]:
        """A sentence for each command that does not run and in whose tables chains of ours should be in force."""
        if self.state_file.read() != self._state:
            return []
        return every_program(self.commands, self.anchor.table).missing

    def replace(
        self, programs: Sequence[Program], chains: Callable[[int], Table], verify: Callable[[], None] | None = None
    ) -> None:
        """Puts the chains of each program's IP version in place of ours. Then removes ours from other kinds of tables.

        When a step fails, or ``verify`` raises, the rules and the state file are as before.
        """
        before = [(program, owned(self._read(program), self.anchor)) for program in programs]
        state_before = self.state_file.read()
        self.state_file.write(self._state)
        try:
            for program in programs:
                replace(program, self.anchor, chains(program.version), self.lock_wait_s)
            if verify is not None:
                verify()
        except BaseException as error:
            self._restore(error, before)
            if state_before != self._state:
                self.state_file.write(state_before)
            raise
        others = [other for program in programs for other in other_program(program, self.anchor.table)]
        clear(others, self.anchor, self.lock_wait_s)

    def remove(self) -> list[Program]:
        """Removes our chains from all tables. Returns the programs that had some. When a step fails all stay.

        Raises GuardError for commands that do not run, with the rules removed that can be.
        """
        programs, missing = self.running(), self.missing()
        before: _Saved = []
        for program in programs:
            with contextlib.suppress(NoTable):
                before.append((program, owned(self._read(program), self.anchor)))
        try:
            cleared = clear(programs, self.anchor, self.lock_wait_s)
        except BaseException as error:
            self._restore(error, before)
            raise
        require_none(missing)
        self.state_file.remove()
        return cleared

    def _read(self, program: Program) -> Table:
        return read_table(program, self.anchor.table)

    def _restore(self, error: BaseException, before: Iterable[tuple[Program, Table]]) -> None:
        """Our chains as they were before ``error``. Raises GuardError with the texts of both if it fails."""
        try:
            for program, chains in before:
                replace(program, self.anchor, chains, self.lock_wait_s)
        except GuardError as second:
            raise GuardError(
                f"{error}; not all of the rules from before could be put back ({second}): run the command again"
            ) from error
