# SPDX-License-Identifier: Apache-2.0
"""The Backend that enforces by owner rules of iptables. It reads the rules as they are now (but see reading_once())."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from imds_guard.backends import Change, Description, Neighbour
from imds_guard.backends.iptables import differences, faults, filter_listeners, strangers
from imds_guard.backends.iptables.form import MANGLE, Applied, Form
from imds_guard.backends.iptables.members import resolve
from imds_guard.backends.iptables.our_chains import COMMANDS
from imds_guard.backends.iptables.our_rules import OurRules, read_rules, verify
from imds_guard.backends.iptables.output_rules import OutputRules
from imds_guard.backends.iptables.parse import FamilyPolicy, combine
from imds_guard.backends.iptables.programs import Program, default_program, ip_versions, titles
from imds_guard.backends.iptables.render import HEAD, ResolvedPolicy, digest, require_supported
from imds_guard.backends.iptables.render_filters import listeners_under
from imds_guard.backends.iptables.state_file import STATE_FOLDER, StateFile
from imds_guard.backends.iptables.tables import LOCK_WAIT_S, NoTable, read_table
from imds_guard.errors import BadPolicy, GuardError, Unsupported
from imds_guard.kernel.netns import has_ipv6
from imds_guard.policy.edit import without_ipv6
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.filter_numbers import NO_NUMBERS, NOTHING, Numbered, Numbers, assigned_afresh
from imds_guard.policy.model import Mode, Policy

if TYPE_CHECKING:
    from imds_guard.backends.iptables.probe import ProbeResult


class IptablesBackend:
    """Owner rules in OUTPUT, IPv4 and IPv6. form.py says in which tables.

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
        self._rules = OutputRules(self.state_file, commands, lock_wait_s)
        self._probes: dict[bool, ProbeResult] = {}

    @property
    def commands(self) -> dict[int, str]:
        """IP version -> command."""
        return self._rules.commands

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
        _require_ipv4(policy)
        require_supported(policy)
        if policy.filters:
            filter_listeners.require(policy, programs, probed, self._resolves_groups(), self._rules.lock_wait_s)
        grouped = sorted(lock.name for lock in policy.locks if lock.listed_groups)
        if grouped and not probed.supplementary and not self._resolves_groups():
            raise Unsupported(
                f"iptables can't match supplementary groups here, which lock {grouped[0]!r} lists: {probed.reason}; "
                "--resolve-groups puts the user IDs of their present members in the rules instead"
            )

    def notes(self, policy: Policy) -> list[str]:
        """Backend.notes(): the known differences, and resolved groups."""
        applied = self._rules.applied()
        lines = differences.notes(policy, applied.form if applied is not None else None)
        if not has_ipv6() and without_ipv6(policy) != policy:
            lines.append(
                "iptables: this kernel has no IPv6 (ipv6.disable=1), so its endpoints are in no rule: start again "
                "where it has"
            )
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
            probed = probe(programs, audit, self._rules.lock_wait_s)
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
            policy = policy if has_ipv6() else without_ipv6(policy)
            programs = self.default_programs()
            members = resolve(policy) if _has_groups(policy) and self._resolves_groups() else None
            wanted = ResolvedPolicy(policy, members, self._numbers(policy))
            form = self._form(programs, policy)
            if policy.filters:
                filter_listeners.require_form(form)
            with self._rules.filter_file.changing(wanted):
                self._rules.replace(programs, form, wanted, verify=lambda: verify(programs, form, wanted))
            # What another program has put where we can't stand before it.
            warnings = tuple(self.faults())
        with_nft = " and nft" if form is Form.NFT else ""
        return Change((f"iptables rules are in force, written with {titles(programs)}{with_nft}",), warnings)

    def _numbers(self, policy: Policy) -> Numbers:
        """The numbers of the filters. They are kept for what does not change."""
        if not policy.filters:
            return NO_NUMBERS
        current = None
        with contextlib.suppress(GuardError):
            current = self._in_force()
        before = NOTHING if current is None else Numbered(current.policy.filters, current.numbers)
        return assigned_afresh(without_ipv6(policy), before, filter_listeners.listening())

    def _form(self, programs: Sequence[Program], policy: Policy) -> Form:
        """The best form that works. Where nothing could be tried, the one before, or that of the oldest kernels."""
        probed = self._probe(programs, policy.mode is Mode.AUDIT)
        applied = self._rules.applied()
        if probed.conclusive:
            return probed.form
        return applied.form if applied is not None else Form.FILTER

    def change(self, policy: Policy) -> Change:
        """Backend.change(): the rules are always replaced as a whole."""
        return self.apply(policy)

    def remove(self) -> Change:
        """Backend.remove(): from both IP versions, nf_tables and legacy."""
        with self.state_file.locked():
            cleared = self._rules.remove()
        return Change(tuple(f"iptables rules were removed with {program.title}" for program in cleared))

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self) -> Policy | None:
        """Backend.read(): the policy of the rules that packets reach."""
        current = self._in_force()
        return current.policy if current is not None else None

    def unaltered(self) -> Policy | None:
        """Backend.unaltered(): None also when the digest in some rules is not that of their policy."""
        families = [rules for rules in self._read_all() if rules.present]
        try:
            current = self._combined(families)
        except BadPolicy:
            return None
        digests = {policy.digest for policy in (rules.policy for rules in families) if policy is not None}
        if current is None or digests != {digest(current.policy)}:
            return None
        if current.policy.filters and faults.of_rules(families, current, self._applied_form(families)):
            return None  # who is in a filter is in no digest that the rules have
        return current.policy

    def wanted(self) -> tuple[Policy, list[Listener]] | None:
        """The policy in force, and what has to listen for its filters. None when nothing is in force."""
        current = self._in_force()
        return None if current is None else (current.policy, listeners_under(current.policy, current.numbers))

    def in_force(self) -> bool:
        """Backend.in_force(): True when there is a chain of ours, whole or not, of either IP version.

        Also where nobody can see it, since iptables was removed: its rules stay.
        """
        return bool(self._rules.missing()) or any(rules.present for rules in self._read_all())

    def _in_force(self) -> ResolvedPolicy | None:
        try:
            return self._combined(self._read_all())
        except BadPolicy as error:
            raise GuardError(_no_policy(error)) from error

    def _combined(self, families: Iterable[OurRules]) -> ResolvedPolicy | None:
        """The policy in these rules. Raises BadPolicy."""
        found = _reached(families)
        current = combine(found)
        filtered = [family.digest for family in found if family.filtered]
        if current is None or not filtered:
            return current
        return self._rules.filter_file.complete(current, filtered[0])

    def _read_all(self) -> list[OurRules]:
        found: list[OurRules] = []
        for anchor in self._rules.anchors():
            for program in self._rules.programs(anchor):
                with contextlib.suppress(NoTable):
                    found.append(read_rules(program, anchor))
        return found

    def faults(self) -> list[str]:
        """Backend.faults()."""
        missing = self._rules.missing()
        if missing:
            return missing
        families = [rules for rules in self._read_all() if rules.present]
        applied = self._rules.applied()
        if not families:
            return [faults.GONE] if applied is not None else []
        applied = applied or Applied(_form_of(families))  # the state file is gone
        lines = faults.of_position(families, applied.form)
        try:
            current = self._combined(families)
        except BadPolicy as error:
            return [*lines, _no_policy(error)]
        if current is None:
            return lines
        lines += faults.of_rules(families, current, applied.form) + faults.of_members(current)
        lines += filter(None, [filter_listeners.fault_of_port()] if current.policy.filters else [])
        lines += faults.of_routes(current.policy)
        return lines + strangers.faults(applied, current.policy.mode, [rules.program for rules in families])

    def _applied_form(self, families: Iterable[OurRules]) -> Form:
        applied = self._rules.applied()
        return _form_of(families) if applied is None else applied.form

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


def _form_of(families: Iterable[OurRules]) -> Form:
    return Form.MANGLE if any(rules.anchor is MANGLE for rules in families) else Form.FILTER


def _reached(families: Iterable[OurRules]) -> list[FamilyPolicy]:
    """The policy of each IP version: of the first table that has one. Those of the default program come first."""
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


def _require_ipv4(policy: Policy) -> None:
    """Raises Unsupported where no rule would be left to write."""
    if not has_ipv6() and not without_ipv6(policy).locks:
        raise Unsupported("this kernel has no IPv6 (ipv6.disable=1), and the policy locks nothing else")
