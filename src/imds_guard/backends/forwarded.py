# SPDX-License-Identifier: Apache-2.0
"""Packets that this machine only carries: rules at the head of FORWARD that keep them from the locked endpoints.

They serve beside either backend. A machine that routes (an appliance without source/destination check, a host of
containers or virtual machines) sees no owner for such packets, so nobody is let through, on the locked ports alone.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Sequence

from imds_guard.backends import Change
from imds_guard.backends.iptables.parse import parse_chains
from imds_guard.backends.iptables.record import STATE_FOLDER, Record
from imds_guard.backends.iptables.render import Chains, denial
from imds_guard.backends.iptables.rules import Range, Rule
from imds_guard.backends.iptables.tables import (
    LOCK_WAIT_S,
    Anchor,
    NoTable,
    Program,
    clear,
    default_program,
    every_program,
    is_first,
    is_reached,
    other_program,
    owned,
    put_back,
    read_table,
    replace,
    rule_texts,
)
from imds_guard.errors import GuardError, Unsupported, UsageError
from imds_guard.policy.model import Policy, Protocol, Verdict
from imds_guard.policy.ports import ALL_PORTS

HEAD = "IMDS-FORWARD"
DENY = "IMDS-FORWARD-DENY"
ANCHOR = Anchor("FORWARD", HEAD)

DROP = "drop"
LEAVE = "leave"

_SWITCHES = "/proc/sys/net/ipv[46]/conf/*/forwarding"


def forwarding_is_on() -> bool:
    """True when this network namespace routes on some interface, IPv4 or IPv6."""
    for path in glob.glob(_SWITCHES):
        if "/conf/default/" in path:
            continue
        # An interface may go while we look.
        with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as switch:
            if switch.read().strip() != "0":
                return True
    return False


def choose(policy: Policy, word: str | None, forwarding: bool) -> tuple[bool, Change]:
    """Whether forwarded packets are to be dropped, and what to report. ``word`` is the option, None if not given.

    Raises UsageError where dropping would undo what the policy lets containers do.
    """
    lenient = policy.containers is Verdict.ALLOW
    if word == DROP and lenient:
        raise UsageError(
            'containers = "allow" lets containers through, whose packets are forwarded: --forwarded drop would undo '
            "that, so leave one of them out"
        )
    if word is not None:
        return word == DROP, Change()
    if forwarding and lenient:
        said = 'forwarded packets are left alone, since containers = "allow" (--forwarded leave says so too)'
        return False, Change((said,))
    return forwarding, Change()


def render(policy: Policy, version: int) -> Chains:
    """The chains of one IP version; none when no endpoint is of it."""
    rules = [
        Rule(DENY, goto=True, destination=destination, protocol=protocol.value, ports=ports)
        for lock in policy.locks
        for endpoint in lock.endpoints
        if endpoint.network.version == version
        for destination in [endpoint.network if endpoint.network.prefixlen else None]
        for protocol in Protocol
        for ports in _ranges(endpoint.ports(protocol))
    ]
    return {HEAD: rules, DENY: denial(policy.mode, version)} if rules else {}


def _ranges(ports: Sequence[Range]) -> Sequence[Range | None]:
    return [None] if tuple(ports) == ALL_PORTS else list(ports)


class Forwarded:
    """The rules in FORWARD of the calling thread's network namespace. ``commands`` as for IptablesBackend."""

    def __init__(
        self,
        commands: tuple[str, str] = ("iptables", "ip6tables"),
        *,
        state_folder: str = STATE_FOLDER,
        lock_wait_s: int = LOCK_WAIT_S,
    ) -> None:
        self.commands: dict[int, str] = {4: commands[0], 6: commands[1]}
        self.lock_wait_s = lock_wait_s
        self.record = Record(state_folder, "forwarded")

    def check(self, policy: Policy, word: str | None) -> None:
        """Raises UsageError or Unsupported when ``word`` was asked for and can't be had. Changes nothing."""
        if choose(policy, word, forwarding_is_on())[0] and word is not None:
            for version in _versions(policy):
                read_table(default_program(version, self.commands[version]))

    def settle(self, policy: Policy, word: str | None) -> Change:
        """Does what ``word`` asks, or what is right without one.

        Where nothing was asked for and iptables can't be had, the change warns, and faults() says so from then on.
        """
        drop, chosen = choose(policy, word, forwarding_is_on())
        if not drop:
            self.remove()
            if word == LEAVE:
                self.record.write(LEAVE)
            return chosen
        try:
            return chosen.then(self.apply(policy))
        except Unsupported as error:
            if word is not None:
                raise
            warning = f"packets that this machine forwards still reach the locked endpoints: {error}"
            return chosen.then(Change(warnings=(warning,)))

    def follow(self, policy: Policy) -> Change:
        """The same for a policy that was changed: what was asked for at the start still holds."""
        return self.settle(policy, self.asked())

    def asked(self) -> str | None:
        """What was asked for when the policy was put in force, as settle() takes it."""
        return LEAVE if self.record.read() == LEAVE else None

    def apply(self, policy: Policy) -> Change:
        """Puts rules for the policy's endpoints at the head of FORWARD, in place of those that were there."""
        with self.record.locked():
            programs = [default_program(version, self.commands[version]) for version in (4, 6)]
            before = [(program, owned(read_table(program), ANCHOR)) for program in programs]
            noted = self.record.read()
            self.record.write(DROP)
            try:
                for program in programs:
                    replace(program, ANCHOR, rule_texts(render(policy, program.version)), self.lock_wait_s)
            except BaseException as error:
                put_back(error, before, ANCHOR, self.lock_wait_s)
                self.record.write(noted) if noted else self.record.remove()
                raise
            self._clear([other for program in programs for other in other_program(program)])
        titles = " and ".join(program.title for program in programs)
        done = f"forwarded packets to locked endpoints are rejected, by rules in FORWARD written with {titles}"
        return Change((done,))

    def remove(self) -> Change:
        """Takes our rules out of FORWARD; harmless when there are none."""
        with self.record.locked():
            done = self._clear(every_program(self.commands, needed=self.record.read() == DROP))
            self.record.remove()
        return Change(tuple(done))

    def _clear(self, programs: Sequence[Program]) -> list[str]:
        cleared = clear(programs, ANCHOR, self.lock_wait_s)
        return [f"rules for forwarded packets were removed with {program.title}" for program in cleared]

    def in_force(self) -> bool:
        """True when FORWARD leads to rules of ours, IPv4 or IPv6."""
        return any(_is_reached(program) for program in every_program(self.commands, needed=self.record.read() == DROP))

    def faults(self, policy: Policy | None) -> list[str]:
        """What is wrong in FORWARD for the policy that is in force, a sentence each."""
        if policy is None:
            left = self.in_force()
            return ["no policy is in force, but its rules in FORWARD are; stop removes them"] if left else []
        word = self.record.read()
        if word == LEAVE or (not word and not choose(policy, None, forwarding_is_on())[0]):
            return []
        try:
            programs = [default_program(version, self.commands[version]) for version in _versions(policy)]
            return [line for program in programs for line in _faults(program, policy)]
        except GuardError as error:
            return [f"packets that this machine forwards may reach the locked endpoints: {error}"]


def _is_reached(program: Program) -> bool:
    with contextlib.suppress(NoTable):
        return is_reached(read_table(program), ANCHOR)
    return False


def _versions(policy: Policy) -> list[int]:
    return sorted({endpoint.network.version for lock in policy.locks for endpoint in lock.endpoints})


def _faults(program: Program, policy: Policy) -> list[str]:
    table = read_table(program)
    title = program.title
    if not is_reached(table, ANCHOR):
        return [f"{title}: packets that this machine forwards reach the locked endpoints; start again to reject them"]
    lines: list[str] = []
    if not is_first(table, ANCHOR):
        lines.append(f"{title}: other people's rules in FORWARD stand before ours; start again to put ours first")
    chains, foreign = parse_chains(owned(table, ANCHOR))
    if foreign or chains != render(policy, program.version):
        lines.append(f"{title}: the rules in FORWARD are not those of the policy; start again")
    return lines
