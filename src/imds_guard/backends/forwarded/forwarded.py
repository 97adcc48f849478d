# SPDX-License-Identifier: Apache-2.0
"""The rules for forwarded packets of this network namespace: written, changed, removed, and described."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from imds_guard.backends import Change
from imds_guard.backends.forwarded import record
from imds_guard.backends.forwarded.by_iptables import ANCHOR as MANGLE
from imds_guard.backends.forwarded.by_iptables import ByIptables
from imds_guard.backends.forwarded.by_nft import ByNft
from imds_guard.backends.forwarded.places import UNLOCKED, Writer, Written, entries
from imds_guard.backends.forwarded.record import DROP, LEAVE, WRITERS, Record
from imds_guard.backends.forwarded.state import Forwarding, ForwardingState, forwarding_is_on
from imds_guard.backends.iptables.our_chains import COMMANDS, OurChains
from imds_guard.backends.iptables.programs import ip_versions
from imds_guard.backends.iptables.state_file import STATE_FOLDER, StateFile
from imds_guard.backends.iptables.tables import LOCK_WAIT_S, Anchor
from imds_guard.errors import GuardError, Unsupported, UsageError
from imds_guard.kernel import conntrack
from imds_guard.policy.model import Mode, Policy, Verdict

OLD = Anchor("FORWARD", "IMDS-FORWARD")
"""Where imds-guard 0.1.0 had the rules: in filter, behind those that Docker inserts later."""

_LENIENT = 'containers = "allow" lets containers through, whose packets are forwarded'


class Forwarded:
    """``commands`` are iptables for IP version 4 and 6. ``writers``: which to try, in this order."""

    def __init__(
        self,
        commands: tuple[str, str] = COMMANDS,
        *,
        state_folder: str = STATE_FOLDER,
        lock_wait_s: int = LOCK_WAIT_S,
        writers: Sequence[str] = WRITERS,
    ) -> None:
        self.state_file = StateFile(state_folder, "forwarded")
        versions = ip_versions()
        mangle = StateFile(state_folder, "forwarded-iptables")
        self._old = OurChains(OLD, StateFile(state_folder, "forwarded-old"), "applied", commands, lock_wait_s)
        chains = OurChains(MANGLE, mangle, "applied", commands, lock_wait_s)
        self._versions = versions
        self._writers: dict[str, Writer] = {"nft": ByNft(versions), "iptables": ByIptables(versions, chains)}
        self._tried = writers

    # --- changes ----------------------------------------------------------------------------------------------------

    def check(self, policy: Policy, option: str | None) -> None:
        """Raises UsageError or Unsupported when ``option`` was given and can't be done here. Changes nothing."""
        if option == DROP and choose(policy, option):
            self._usable(policy)

    def _usable(self, policy: Policy) -> None:
        refusals: list[GuardError] = []
        for name in self._tried:
            try:
                self._writers[name].require(policy)
                return
            except GuardError as error:
                refusals.append(error)
        raise _unsupported(refusals)

    def enforce(self, policy: Policy, option: str | None) -> Change:
        """Does what ``option`` says; without one, what suits the policy.

        Where no option was given and no rules can be written, a machine that forwards gets a warning, and a fault.
        """
        if not choose(policy, option):
            return self._leave(policy, option)
        try:
            return self.apply(policy)
        except Unsupported as error:
            if option is not None:
                raise
            if not forwarding_is_on():
                return Change()
            return Change(warnings=(f"{UNLOCKED}: {error}",))

    def _leave(self, policy: Policy, option: str | None) -> Change:
        change = self.remove()
        if option == LEAVE:
            self.state_file.write(LEAVE)
        elif forwarding_is_on():
            said = f"forwarded packets are left alone, since {_LENIENT} (--forwarded leave says so too)"
            change = change.then(Change((said,)))
        return change

    def change(self, policy: Policy) -> Change:
        """Enforces a policy that was changed, with the option from the start. Rules that are whole stay."""
        written = record.read(self.state_file).written
        if written is not None and choose(policy, None) and not self._writers[written.by].look(policy, written).faults:
            return Change()
        return self.enforce(policy, self.option())

    def option(self) -> str | None:
        """The option that was given when the policy was put in force: LEAVE, or None for what enforce() chooses."""
        return LEAVE if record.read(self.state_file).option == LEAVE else None

    def apply(self, policy: Policy) -> Change:
        """Puts rules for the policy's endpoints in place of those that were there.

        Raises Unsupported where neither nft nor iptables can write them. On any error the rules from before stay.
        """
        with self.state_file.locked():
            before = record.read(self.state_file)
            tracked = tuple(version for version in self._versions if conntrack.tracks(version))
            record.write(self.state_file, before._replace(option=DROP))  # a command that is killed leaves a fault
            try:
                written, refusals = self._write(policy, tracked)
            except BaseException:
                record.write(self.state_file, before)
                raise
            record.write(self.state_file, Record(DROP, written))
            warnings = self._remove_all_but(written.by, before)
        return Change((_said(policy, written, refusals),), (*warnings, *_weaker(policy, written, self._versions)))

    def _write(self, policy: Policy, tracked: tuple[int, ...]) -> tuple[Written, list[GuardError]]:
        refusals: list[GuardError] = []
        for name in self._tried:
            try:
                return self._writers[name].write(policy, tracked), refusals
            except GuardError as error:
                refusals.append(error)
        raise _unsupported(refusals)

    def _remove_all_but(self, name: str, before: Record) -> list[str]:
        """Called when the new rules are in force: for a moment both are, and there is no moment without either.

        Returns warnings: what could not be removed rejects no more than the new rules do.
        """
        try:
            if before.written is not None and before.written.by != name:
                self._writers[before.written.by].remove()
            self._old.remove()
        except Unsupported:
            pass  # a table that can't be read has none of our chains
        except GuardError as error:
            return [f"earlier rules for forwarded packets are still there: {error}"]
        return []

    def remove(self) -> Change:
        """Removes our rules. Harmless when there are none."""
        with self.state_file.locked():
            removed: list[str] = []
            for writer in self._writers.values():
                with contextlib.suppress(Unsupported):
                    removed += writer.remove()
            with contextlib.suppress(Unsupported):
                removed += [f"the chains {OLD.head} of table filter ({one.title})" for one in self._old.remove()]
            self.state_file.remove()
        return Change(tuple(f"the rules for forwarded packets were removed: {one}" for one in removed))

    # --- reading ----------------------------------------------------------------------------------------------------

    def in_force(self) -> bool:
        """True when packets meet rules of ours."""
        return any(self._is_in_force(writer) for writer in self._writers.values())

    def _is_in_force(self, writer: Writer) -> bool:
        with contextlib.suppress(Unsupported):
            return writer.in_force()
        return False

    def describe(self, policy: Policy | None) -> ForwardingState:
        """What becomes of forwarded packets under the policy in force; None where none is, or it can't be read."""
        held = record.read(self.state_file)
        if policy is None:
            return ForwardingState(Forwarding.LEFT, self._left_faults())
        if held.option == LEAVE:
            return ForwardingState(Forwarding.LEFT, why="--forwarded leave")
        if not choose(policy, None):
            return ForwardingState(Forwarding.LEFT, why='containers = "allow"')
        if held.written is None:
            return _without_rules(held)
        return self._of_rules(policy, held.written)

    def _left_faults(self) -> tuple[str, ...]:
        """Faults of rules that are there without a policy."""
        try:
            found = self.in_force()
        except GuardError as error:  # iptables was removed, and its rules were not
            return (f"rules for forwarded packets can't be seen: {error}",)
        return ("no policy is in force, but rules for forwarded packets are; stop removes them",) if found else ()

    def _of_rules(self, policy: Policy, written: Written) -> ForwardingState:
        writer = self._writers[written.by]
        try:
            found = writer.look(policy, written)
        except GuardError as error:
            said = f"the rules for forwarded packets can't be seen: {error}"
            return ForwardingState(Forwarding.OPEN, (said,), written.by)
        if found.faults:
            return ForwardingState(Forwarding.OPEN, found.faults, written.by, written.tracked)
        kind = Forwarding.REJECTED if written.by == "nft" else Forwarding.DROPPED
        kind = Forwarding.COUNTED if policy.mode is Mode.AUDIT else kind
        return ForwardingState(kind, (), written.by, written.tracked, found.counts)

    def faults(self, policy: Policy | None) -> list[str]:
        """What is wrong with the rules for the policy that is in force, a sentence each."""
        return list(self.describe(policy).faults)


def choose(policy: Policy, option: str | None) -> bool:
    """Whether forwarded packets are to be rejected. ``option`` is None when it was not given.

    Raises UsageError where rejecting would undo what the policy lets containers do.
    """
    lenient = policy.containers is Verdict.ALLOW
    if option == DROP and lenient:
        raise UsageError(f"{_LENIENT}: --forwarded drop would undo that, so leave one of them out")
    return option == DROP or (option is None and not lenient)


def _without_rules(held: Record) -> ForwardingState:
    if held.option == DROP:
        said = "the rules for forwarded packets are those of an earlier version, or not all were written; start again"
        return ForwardingState(Forwarding.OPEN, (said,))
    if forwarding_is_on():
        said = f"{UNLOCKED}, since no rules reject them; start again"
        return ForwardingState(Forwarding.OPEN, (said,))
    return ForwardingState(Forwarding.OPEN)


def _unsupported(refusals: list[GuardError]) -> GuardError:
    """One error for all programs."""
    reasons = "; ".join(map(str, refusals))
    if all(isinstance(one, Unsupported) for one in refusals):
        return Unsupported(reasons)
    return GuardError(f"rules for forwarded packets could not be written: {reasons}")


def _said(policy: Policy, written: Written, refusals: list[GuardError]) -> str:
    if written.by == "nft":
        done, where = "rejected", "nft, in tables of our own"
    else:
        reason = f" (without nft they can't be rejected, so clients wait: {refusals[0]})" if refusals else ""
        done, where = "dropped", f"iptables, in mangle FORWARD{reason}"
    if policy.mode is Mode.AUDIT:
        done = "counted"
    return f"forwarded packets to locked endpoints are {done}, by rules written with {where}"


def _weaker(policy: Policy, written: Written, versions: Sequence[int]) -> list[str]:
    """What the rules can't do here. It does not matter before the machine forwards."""
    if policy.mode is Mode.AUDIT or not forwarding_is_on():
        return []
    blind = [f"IPv{version}" for version in versions if version not in written.tracked and entries(policy, version)]
    lines = []
    if blind:
        lines.append(
            f"forwarded connections that are open already go on ({' and '.join(blind)}): conntrack, which knows who "
            "has begun them, is not in use here"
        )
    if any(endpoint.udp for lock in policy.locks for endpoint in lock.endpoints):
        lines.append("forwarded datagrams to locked UDP ports are rejected, answers too: nothing tells which is which")
    return lines
