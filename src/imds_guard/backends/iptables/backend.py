# SPDX-License-Identifier: Apache-2.0
"""The Backend that keeps a policy in iptables. It looks at the rules as they are, but see tables.reading_once()."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from imds_guard.backends import Change, Description
from imds_guard.backends.iptables import differences, faults
from imds_guard.backends.iptables.look import ANCHOR, FamilyRules, look
from imds_guard.backends.iptables.members import resolve
from imds_guard.backends.iptables.parse import Found, combine
from imds_guard.backends.iptables.record import STATE_FOLDER, Record
from imds_guard.backends.iptables.render import HEAD, Holding, digest, id_ranges, render
from imds_guard.backends.iptables.tables import (
    LOCK_WAIT_S,
    NoTable,
    Program,
    Table,
    clear,
    default_program,
    every_program,
    is_first,
    other_program,
    owned,
    put_back,
    read_table,
    replace,
    rule_texts,
)
from imds_guard.errors import BadPolicy, GuardError, Unsupported
from imds_guard.policy.model import Mode, Policy

if TYPE_CHECKING:
    from imds_guard.backends.iptables.probe import Probed

MAX_RANGES = 20_000
"""Ranges of ids in all lists. iptables-restore takes seconds for so many, and grows faster than their number."""


class IptablesBackend:
    """Owner rules in OUTPUT, IPv4 and IPv6.

    ``commands`` are the programs for IP version 4 and 6 where it shall not be the machine's default ("iptables-legacy",
    "ip6tables-legacy"). ``resolve_groups`` turns listed groups into the user IDs of their members when applied.
    """

    name = "iptables"

    def __init__(
        self,
        commands: tuple[str, str] = ("iptables", "ip6tables"),
        *,
        resolve_groups: bool = False,
        state_folder: str = STATE_FOLDER,
        lock_wait_s: int = LOCK_WAIT_S,
    ) -> None:
        self.commands = {4: commands[0], 6: commands[1]}
        self.resolve_groups = resolve_groups
        self.lock_wait_s = lock_wait_s
        self.record = Record(state_folder)
        self._probed: dict[bool, Probed] = {}

    # --- what can be done --------------------------------------------------------------------------------------------

    def check(self, policy: Policy | None) -> None:
        """Raises Unsupported or NotPermitted with the reason unless all of ``policy`` can be enforced here."""
        programs = self._programs()
        for program in programs:
            read_table(program)
        probed = self._probe(programs, policy is not None and policy.mode is Mode.AUDIT)
        if probed.told and not probed.owner:
            raise Unsupported(f"owner rules of iptables do not work here: {probed.reason}")
        if policy is None:
            return
        if policy.strict:
            raise Unsupported(
                "iptables can't hold a strict policy: it judges who opened a socket, and knows of no connect that was "
                "let through; leave --strict (strict = true) out"
            )
        _check_size(policy)
        grouped = sorted(lock.name for lock in policy.locks if lock.listed_groups)
        if grouped and not probed.supplementary and not self._resolves():
            raise Unsupported(
                f"iptables can't match supplementary groups here, which lock {grouped[0]!r} lists: {probed.reason}; "
                "--resolve-groups puts the user IDs of their present members in the rules instead"
            )

    def notes(self, policy: Policy) -> list[str]:
        """What holds less, or otherwise, than the policy says: the known differences and resolved groups."""
        lines = differences.notes(policy)
        if _has_groups(policy) and self._resolves():
            lines.append(
                "iptables: groups stand in the rules as the user IDs that were their members when the rules were made: "
                "start again after each change of membership"
            )
        return lines

    def _probe(self, programs: Sequence[Program], audit: bool) -> Probed:
        """An answer is kept; that nothing could be told is not."""
        from imds_guard.backends.iptables.probe import probe  # noqa: PLC0415 -- start-up time: to look takes none

        if audit not in self._probed:
            probed = probe(programs, audit, self.lock_wait_s)
            if not probed.told:
                return probed
            self._probed[audit] = probed
        return self._probed[audit]

    def _resolves(self) -> bool:
        """True when groups are to be resolved, or already are in what is in force."""
        if self.resolve_groups:
            return True
        with contextlib.suppress(GuardError):
            held = self._held()
            return held is not None and held.members is not None
        return False

    def _programs(self) -> list[Program]:
        """The programs for the IP versions that this kernel has. Raises Unsupported."""
        versions = (4, 6) if _has_ipv6() else (4,)
        return [default_program(version, self.commands[version]) for version in versions]

    # --- changes -----------------------------------------------------------------------------------------------------

    def apply(self, policy: Policy) -> Change:
        """Puts ``policy`` in force, in place of what was in force. On any error the old rules stay."""
        with self.record.locked():
            self.check(policy)
            programs = self._programs()
            holding = Holding(policy, resolve(policy) if _has_groups(policy) and self._resolves() else None)
            noted = self.record.read()
            before = [(program, owned(read_table(program), ANCHOR)) for program in programs]
            self.record.write("applied")
            try:
                for program in programs:
                    replace(program, ANCHOR, rule_texts(render(holding, program.version)), self.lock_wait_s)
                self._verify(programs, holding)
            except BaseException as error:
                put_back(error, before, ANCHOR, self.lock_wait_s)
                if not noted:
                    self.record.remove()
                raise
            self._clear([other for program in programs for other in other_program(program)])
        titles = " and ".join(program.title for program in programs)
        return Change((f"iptables rules are in force, written with {titles}",))

    def change(self, policy: Policy) -> Change:
        """Backend.change(): the rules are always replaced as a whole."""
        return self.apply(policy)

    def _verify(self, programs: Sequence[Program], holding: Holding) -> None:
        """Raises GuardError unless the kernel gives back the rules that it was given."""
        for program in programs:
            rules, expected = look(program), render(holding, program.version)
            if rules.foreign or rules.chains != expected or (expected and not is_first(rules.table, ANCHOR)):
                raise GuardError(f"{program.title} took the rules, but iptables-save shows others; nothing was changed")

    def remove(self) -> Change:
        """Takes everything of ours out of both families, nf_tables and legacy; harmless when there is nothing."""
        with self.record.locked():
            programs = self._every_program()
            before = _owned_by(programs)
            try:
                done = self._clear(programs)
            except BaseException as error:
                put_back(error, before, ANCHOR, self.lock_wait_s)
                raise
            self.record.remove()
        return Change(tuple(done))

    def _clear(self, programs: Sequence[Program]) -> list[str]:
        cleared = clear(programs, ANCHOR, self.lock_wait_s)
        return [f"iptables rules were removed with {program.title}" for program in cleared]

    def _every_program(self) -> list[Program]:
        return every_program(self.commands, needed=bool(self.record.read()))

    # --- the truth ---------------------------------------------------------------------------------------------------

    def read(self) -> Policy | None:
        """The policy that the rules which packets meet stand for, or None."""
        held = self._held()
        return held.policy if held is not None else None

    def unaltered(self) -> Policy | None:
        """As read(); None also when the rules' digest is not that of the policy which they stand for."""
        found = _reached(self._look_everywhere())
        try:
            held = combine(found)
        except BadPolicy:
            return None
        whole = held is not None and {rules.digest for rules in found} == {digest(held.policy)}
        return held.policy if held is not None and whole else None

    def in_force(self) -> bool:
        """True when there is a chain of ours, whole or not, in either family."""
        return any(rules.present for rules in self._look_everywhere())

    def _held(self) -> Holding | None:
        try:
            return combine(_reached(self._look_everywhere()))
        except BadPolicy as error:
            raise GuardError(_no_policy(error)) from error

    def _look_everywhere(self) -> list[FamilyRules]:
        found: list[FamilyRules] = []
        for program in self._every_program():
            with contextlib.suppress(NoTable):
                found.append(look(program))
        return found

    def faults(self) -> list[str]:
        """What is wrong with the rules that should be in force, a sentence each."""
        families = [rules for rules in self._look_everywhere() if rules.present]
        if not families:
            return [faults.GONE] if self.record.read() else []
        lines = faults.of_places(families)
        try:
            held = combine(_reached(families))
        except BadPolicy as error:
            return [*lines, _no_policy(error)]
        if held is None:
            return lines
        return lines + faults.of_rules(families, held) + faults.of_members(held)

    def describe(self) -> Description:
        """Backend.describe(). Rules that are no policy are a fault, not an error."""
        try:
            policy = self.read()
        except GuardError:
            policy = None
        return Description(policy, tuple(self.faults()))


def _owned_by(programs: Iterable[Program]) -> list[tuple[Program, Table]]:
    """Our chains in each program's table; nothing for one that has no table."""
    found: list[tuple[Program, Table]] = []
    for program in programs:
        with contextlib.suppress(NoTable):
            found.append((program, owned(read_table(program), ANCHOR)))
    return found


def _reached(families: Iterable[FamilyRules]) -> list[Found]:
    """What each IP version's rules say; those of the default program where both kinds of tables hold some."""
    found: dict[int, Found] = {}
    for rules in families:
        if rules.found is not None:
            found.setdefault(rules.program.version, rules.found)
    return list(found.values())


def _no_policy(error: BadPolicy) -> str:
    return f"the rules in {HEAD} were changed by someone and are no policy any more ({error}): start again"


def _has_groups(policy: Policy) -> bool:
    return any(lock.listed_groups for lock in policy.locks)


def _has_ipv6() -> bool:
    """False where the kernel has no IPv6 (ipv6.disable=1): nothing can connect to such an address then."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True


def _check_size(policy: Policy) -> None:
    ranges = sum(
        len(id_ranges(ids))
        for lock in policy.locks
        for ids in (lock.allow.users, lock.allow.groups, lock.deny.users, lock.deny.groups)
    )
    if ranges > MAX_RANGES:
        raise Unsupported(
            f"the lists of the policy are {ranges} ranges of IDs, and iptables is given {MAX_RANGES} at most: "
            "list a group in place of its members"
        )
