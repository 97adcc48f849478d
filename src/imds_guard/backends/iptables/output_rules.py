# SPDX-License-Identifier: Apache-2.0
"""Our rules in OUTPUT: chains in mangle and filter, and the chain of nft. All are replaced or removed, or none.

Why is every connect judged by the old policy or by the new one, though tables are changed one after the other?

Mangle and filter each hold a whole policy, and each table is exchanged in one step (tables.replace()). A connect passes
when both let it pass. While one is old and the other new, a connect that both policies allow passes, one that neither
allows does not, and any other is denied: its verdict is that of the policy that denies it. So no step opens, and a
command that is killed in the middle leaves the stricter of both. (Where NAT changes one locked address into another,
mangle judges the first and filter the second: then each address is judged by one of the policies.) The chain of nft
rejects what is marked, and knows no policy: it is there before the first mark, and goes after the last one.

With filters NAT holds a part of the policy, too, and filter says who may be where a filter listens. While they are not
all of one policy, a caller whose filter changes may be led to a place that filter does not let it reach: it is denied,
and a moment later it is not. Nobody reaches an address that neither policy lets it reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Callable

from imds_guard.backends.iptables import marks
from imds_guard.backends.iptables.filter_state import FilterFile
from imds_guard.backends.iptables.form import ANCHORS, FILTER, MANGLE, NAT, Applied, Form, parse_applied
from imds_guard.backends.iptables.programs import (
    NFT,
    Program,
    every_program,
    has_legacy_table,
    other_program,
    require_none,
)
from imds_guard.backends.iptables.render import Part, ResolvedPolicy, render
from imds_guard.backends.iptables.state_file import StateFile
from imds_guard.backends.iptables.tables import (
    Anchor,
    NoTable,
    Table,
    clear,
    is_reached,
    owned,
    read_table,
    replace,
    rule_texts,
)
from imds_guard.errors import GuardError
from imds_guard.kernel.run import find_program
from imds_guard.policy.model import Mode

_Saved = list[tuple[Program, Anchor, Table]]


class OutputRules:
    """``commands`` are for IP version 4 and 6 ("iptables-legacy", "ip6tables-legacy")."""

    def __init__(self, state_file: StateFile, commands: tuple[str, str], lock_wait_s: int) -> None:
        self.state_file = state_file
        self.filter_file = FilterFile(state_file.folder)
        self.commands: dict[int, str] = {4: commands[0], 6: commands[1]}
        self.lock_wait_s = lock_wait_s

    def applied(self) -> Applied | None:
        """What should be in force. None for nothing."""
        return parse_applied(self.state_file.read())

    def programs(self, anchor: Anchor) -> list[Program]:
        """Every program in whose table of this anchor our chains may be. Raises GuardError where one can't be seen."""
        require_none(self.missing())
        return self._running(anchor)

    def anchors(self) -> tuple[Anchor, ...]:
        """Where rules of ours may be. Table nat is nobody's business where no policy has filters."""
        return ANCHORS if self.filter_file.exists() else tuple(one for one in ANCHORS if one is not NAT)

    def _running(self, anchor: Anchor) -> list[Program]:
        used = [one for one in every_program(self.commands, anchor.table).running if _is_used(one, anchor)]
        if anchor is NAT and not self.filter_file.exists():
            return [one for one in used if _has_chains(one, anchor)]
        return used

    def missing(self) -> list[str]:
        """A sentence for each command that does not run and in whose tables rules of ours should be in force."""
        return [] if self.applied() is None else every_program(self.commands).missing

    def replace(
        self, programs: Sequence[Program], form: Form, wanted: ResolvedPolicy, verify: Callable[[], None]
    ) -> None:
        """Puts the rules for a policy in place of ours, and removes ours from other kinds of tables.

        When a step fails, or ``verify`` raises, the rules and the state file are as before.
        """
        before = self._saved((anchor, programs) for anchor in self.anchors())
        state_before, applied_before = self.state_file.read(), self.applied()
        with_nft = form is Form.NFT and wanted.policy.mode is Mode.ENFORCE
        self.state_file.write(Applied(form).text())
        try:
            fingerprint = marks.put(applied_before.fingerprint if applied_before else "") if with_nft else ""
            self.state_file.write(Applied(form, fingerprint).text())
            for anchor, part in steps(form, self.anchors()):
                for program in programs:
                    self._put(program, anchor, _chains(wanted, program.version, part))
            verify()
        except BaseException as error:
            self._restore(error, before)
            if applied_before is None or applied_before.form is not Form.NFT:
                _remove_nft()
            self.state_file.write(state_before)
            raise
        if not with_nft:
            _remove_nft()
        for anchor in self.anchors():
            others = [other for program in programs for other in other_program(program, anchor.table)]
            clear(others, anchor, self.lock_wait_s)

    def remove(self) -> list[Program]:
        """Removes our rules from all tables. Returns the programs that had some. When a step fails all stay.

        Raises GuardError for commands that do not run, with the rules removed that can be.
        """
        everywhere = [(anchor, self._running(anchor)) for anchor in ANCHORS]
        missing = self.missing()
        before = self._saved(everywhere)
        try:
            found = [one for anchor, programs in everywhere for one in clear(programs, anchor, self.lock_wait_s)]
            if find_program("nft") is not None:
                marks.remove()
        except BaseException as error:
            self._restore(error, before)
            raise
        require_none(missing)
        self.filter_file.remove()
        self.state_file.remove()
        return sorted(set(found))

    def _saved(self, everywhere: Iterable[tuple[Anchor, Sequence[Program]]]) -> _Saved:
        saved: _Saved = []
        for anchor, programs in everywhere:
            for program in programs:
                with contextlib.suppress(NoTable):
                    table = read_table(program, anchor.table) if _is_used(program, anchor) else {}
                    saved.append((program, anchor, owned(table, anchor)))
        return saved

    def _put(self, program: Program, anchor: Anchor, chains: Table) -> None:
        if chains or _is_used(program, anchor):
            replace(program, anchor, chains, self.lock_wait_s)

    def _restore(self, error: BaseException, before: _Saved) -> None:
        """Our chains as they were before ``error``. Raises GuardError with the texts of both if it fails."""
        try:
            for program, anchor, chains in before:
                self._put(program, anchor, chains)
        except GuardError as second:
            raise GuardError(
                f"{error}; not all of the rules from before could be put back ({second}): run the command again"
            ) from error


def steps(form: Form, anchors: Sequence[Anchor] = ANCHORS) -> list[tuple[Anchor, Part | None]]:
    """Which table is changed to what, one after the other. None: it will have no rules of ours."""
    order = (FILTER, NAT, MANGLE) if form is Form.FILTER else ANCHORS
    return [(anchor, form.parts.get(anchor)) for anchor in order if anchor in anchors]


def _chains(wanted: ResolvedPolicy, version: int, part: Part | None) -> Table:
    return {} if part is None else rule_texts(render(wanted, version, part))


def _has_chains(program: Program, anchor: Anchor) -> bool:
    with contextlib.suppress(GuardError):  # of others, or not there
        table = read_table(program, anchor.table)
        return bool(owned(table, anchor)) or is_reached(table, anchor)
    return False


def _is_used(program: Program, anchor: Anchor) -> bool:
    """False for a legacy table that nobody uses: to read it would make it. Filters are reached by IPv4 alone."""
    if anchor is NAT and program.version != 4:
        return False
    return anchor is FILTER or program.kind == NFT or has_legacy_table(program.version, anchor.table)


def _remove_nft() -> None:
    """Without marks it rejects nothing, so a failure does not matter. remove() tries again."""
    if find_program("nft") is not None:
        with contextlib.suppress(GuardError):
            marks.remove()
