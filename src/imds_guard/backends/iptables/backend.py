# SPDX-License-Identifier: Apache-2.0
"""The Backend that enforces by owner rules of iptables. It reads the rules as they are now (but see reading_once())."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from imds_guard.backends import Change, Description, Neighbour
from imds_guard.backends.iptables import differences, faults
from imds_guard.backends.iptables.members import resolve
from imds_guard.backends.iptables.our_chains import COMMANDS, OurChains
from imds_guard.backends.iptables.our_rules import ANCHOR, OurRules, read_rules
from imds_guard.backends.iptables.parse import FamilyPolicy, combine
from imds_guard.backends.iptables.programs import Program, default_program, ip_versions, titles
from imds_guard.backends.iptables.render import HEAD, ResolvedPolicy, digest, render, require_supported
from imds_guard.backends.iptables.state_file import STATE_FOLDER, StateFile
from imds_guard.backends.iptables.tables import LOCK_WAIT_S, NoTable, is_first, read_table, rule_texts
from imds_guard.errors import BadPolicy, GuardError, Unsupported
from imds_guard.policy.model import Mode, Policy

if TYPE_CHECKING:
    from imds_guard.backends.iptables.probe import ProbeResult


class IptablesBackend:
    """Owner rules in OUTPUT, IPv4 and IPv6.

    ``commands`` are for IP version 4 and 6 ("iptables-legacy", "ip6tables-legacy"). ``resolve_groups`` replaces listed
    groups by the user IDs of their members when a policy is applied.
    """

    name = "iptables"

    def __init__(
        self,
        commands: tuple[str, str] = COMMANDS,
        *,
        resolve_groups: bool = False,
        state_folder: str = STATE_FOLDER,
        lock_wait_s: int = LOCK_WAIT_S,
    ) -> None:
        self.resolve_groups = resolve_groups
        self.state_file = StateFile(state_folder)
        self._chains = OurChains(ANCHOR, self.state_file, "applied", commands, lock_wait_s)
        self._probes: dict[bool, ProbeResult] = {}

    @property
    def commands(self) -> dict[int, str]:
        """IP version -> command."""
        return self._chains.commands

    # --- what can be enforced ---------------------------------------------------------------------------------------

    def check(self, policy: Policy | None) -> None:
        """Backend.check()."""
        programs = self.default_programs()
        for program in programs:
            read_table(program)
        probed = self._probe(programs, policy is not None and policy.mode is Mode.AUDIT)
        if probed.conclusive and not probed.owner:
            raise Unsupported(f"owner rules of iptables do not work here: {probed.reason}")
        if policy is None:
            return
        require_supported(policy)
        grouped = sorted(lock.name for lock in policy.locks if lock.listed_groups)
        if grouped and not probed.supplementary and not self._resolves_groups():
            raise Unsupported(
                f"iptables can't match supplementary groups here, which lock {grouped[0]!r} lists: {probed.reason}; "
                "--resolve-groups puts the user IDs of their present members in the rules instead"
            )

    def notes(self, policy: Policy) -> list[str]:
        """Backend.notes(): the known differences, and resolved groups."""
        lines = differences.notes(policy)
        if _has_groups(policy) and self._resolves_groups():
            lines.append(
                "iptables: groups are in the rules as the user IDs that were their members when the rules were made: "
                "start again after each change of membership"
            )
        return lines

    def _probe(self, programs: Sequence[Program], audit: bool) -> ProbeResult:
        """A conclusive answer is kept, another one is not."""
        from imds_guard.backends.iptables.probe import probe  # noqa: PLC0415 -- start-up time: to read rules takes none

        if audit not in self._probes:
            probed = probe(programs, audit, self._chains.lock_wait_s)
            if not probed.conclusive:
                return probed
            self._probes[audit] = probed
        return self._probes[audit]

    def _resolves_groups(self) -> bool:
        """True when groups are to be resolved, or are resolved in the rules that are in force."""
        if self.resolve_groups:
            return True
        with contextlib.suppress(GuardError):
            current = self._in_force()
            return current is not None and current.members is not None
        return False

    def default_programs(self) -> list[Program]:
        """The programs for the IP versions that this kernel has. Raises Unsupported."""
        return [default_program(version, self.commands[version]) for version in ip_versions()]

    # --- changes ----------------------------------------------------------------------------------------------------

    def apply(self, policy: Policy) -> Change:
        """Backend.apply()."""
        with self.state_file.locked():
            self.check(policy)
            programs = self.default_programs()
            wanted = ResolvedPolicy(
                policy, resolve(policy) if _has_groups(policy) and self._resolves_groups() else None
            )
            self._chains.replace(
                programs, lambda version: rule_texts(render(wanted, version)), verify=lambda: _verify(programs, wanted)
            )
        return Change((f"iptables rules are in force, written with {titles(programs)}",))

    def change(self, policy: Policy) -> Change:
        """Backend.change(): the rules are always replaced as a whole."""
        return self.apply(policy)

    def remove(self) -> Change:
        """Backend.remove(): from both IP versions, nf_tables and legacy."""
        with self.state_file.locked():
            cleared = self._chains.remove()
        return Change(tuple(f"iptables rules were removed with {program.title}" for program in cleared))

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self) -> Policy | None:
        """Backend.read(): the policy of the rules that packets reach."""
        current = self._in_force()
        return current.policy if current is not None else None

    def unaltered(self) -> Policy | None:
        """Backend.unaltered(): None also when the digest in the rules is not that of their policy."""
        families = _reached(self._read_all())
        try:
            current = combine(families)
        except BadPolicy:
            return None
        whole = current is not None and {family.digest for family in families} == {digest(current.policy)}
        return current.policy if current is not None and whole else None

    def in_force(self) -> bool:
        """Backend.in_force(): True when there is a chain of ours, whole or not, of either IP version."""
        return any(rules.present for rules in self._read_all())

    def _in_force(self) -> ResolvedPolicy | None:
        try:
            return combine(_reached(self._read_all()))
        except BadPolicy as error:
            raise GuardError(_no_policy(error)) from error

    def _read_all(self) -> list[OurRules]:
        found: list[OurRules] = []
        for program in self._chains.programs():
            with contextlib.suppress(NoTable):
                found.append(read_rules(program))
        return found

    def faults(self) -> list[str]:
        """Backend.faults()."""
        families = [rules for rules in self._read_all() if rules.present]
        if not families:
            return [faults.GONE] if self.state_file.read() else []
        lines = faults.of_position(families)
        try:
            current = combine(_reached(families))
        except BadPolicy as error:
            return [*lines, _no_policy(error)]
        if current is None:
            return lines
        return lines + faults.of_rules(families, current) + faults.of_members(current)

    def neighbours(self) -> list[Neighbour]:
        """Backend.neighbours(): none. What other rules do to ours is a fault."""
        return []

    def describe(self) -> Description:
        """Backend.describe(). Rules that are no policy are a fault, not an error."""
        try:
            policy = self.read()
        except GuardError:
            policy = None
        return Description(policy, tuple(self.faults()))


def _verify(programs: Sequence[Program], wanted: ResolvedPolicy) -> None:
    """Raises GuardError unless the kernel shows the rules that it was given."""
    for program in programs:
        rules, expected = read_rules(program), render(wanted, program.version)
        if rules.foreign or rules.chains != expected or (expected and not is_first(rules.table, ANCHOR)):
            raise GuardError(f"{program.title} took the rules, but iptables-save shows others; nothing was changed")


def _reached(families: Iterable[OurRules]) -> list[FamilyPolicy]:
    """The policy of each IP version. Where both kinds of tables have rules, those of the default program."""
    found: dict[int, FamilyPolicy] = {}
    for rules in families:
        policy = rules.policy
        if policy is not None:
            found.setdefault(rules.program.version, policy)
    return list(found.values())


def _no_policy(error: BadPolicy) -> str:
    return f"the rules in {HEAD} were changed by someone and are no policy any more ({error}): start again"


def _has_groups(policy: Policy) -> bool:
    return any(lock.listed_groups for lock in policy.locks)
