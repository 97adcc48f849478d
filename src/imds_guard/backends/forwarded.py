# SPDX-License-Identifier: Apache-2.0
"""Forwarded packets: rules at the head of FORWARD keep them from the locked endpoints, with either backend.

A machine that routes (an appliance without source/destination check, a host of containers or virtual machines) knows no
owner of such packets. So none of them may pass to a locked port, whoever the policy allows.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Sequence

from imds_guard.backends import Change
from imds_guard.backends.iptables.our_chains import COMMANDS, OurChains
from imds_guard.backends.iptables.parse import parse_chains
from imds_guard.backends.iptables.programs import Program, default_program, titles
from imds_guard.backends.iptables.render import Chains, denial
from imds_guard.backends.iptables.rules import Range, Rule
from imds_guard.backends.iptables.state_file import STATE_FOLDER, StateFile
from imds_guard.backends.iptables.tables import (
    LOCK_WAIT_S,
    Anchor,
    NoTable,
    is_first,
    is_reached,
    owned,
    read_table,
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
        # An interface may be removed meanwhile.
        with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as switch:
            if switch.read().strip() != "0":
                return True
    return False


def choose(policy: Policy, option: str | None, forwarding: bool) -> tuple[bool, Change]:
    """Whether forwarded packets are to be dropped, and what to report. ``option`` is None when it was not given.

    Raises UsageError where dropping would undo what the policy lets containers do.
    """
    lenient = policy.containers is Verdict.ALLOW
    if option == DROP and lenient:
        raise UsageError(
            'containers = "allow" lets containers through, whose packets are forwarded: --forwarded drop would undo '
            "that, so leave one of them out"
        )
    if option is not None:
        return option == DROP, Change()
    if forwarding and lenient:
        said = 'forwarded packets are left alone, since containers = "allow" (--forwarded leave says so too)'
        return False, Change((said,))
    return forwarding, Change()


def render(policy: Policy, version: int) -> Chains:
    """Chain -> rules for IP ``version`` 4 or 6. Empty when no endpoint is of that version."""
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
    """The rules in FORWARD of the calling thread's network namespace. ``commands`` as in OurChains."""

    def __init__(
        self,
        commands: tuple[str, str] = COMMANDS,
        *,
        state_folder: str = STATE_FOLDER,
        lock_wait_s: int = LOCK_WAIT_S,
    ) -> None:
        self.state_file = StateFile(state_folder, "forwarded")
        self._chains = OurChains(ANCHOR, self.state_file, DROP, commands, lock_wait_s)

    def check(self, policy: Policy, option: str | None) -> None:
        """Raises UsageError or Unsupported when ``option`` was given and can't be done here. Changes nothing."""
        if choose(policy, option, forwarding_is_on())[0] and option is not None:
            for program in self._default_programs(_versions(policy)):
                read_table(program)

    def enforce(self, policy: Policy, option: str | None) -> Change:
        """Does what ``option`` says. Without one: what suits the machine.

        Where no option was given and iptables can't be used, the change warns, and faults() says so from then on.
        """
        drop, chosen = choose(policy, option, forwarding_is_on())
        if not drop:
            self.remove()
            if option == LEAVE:
                self.state_file.write(LEAVE)
            return chosen
        try:
            return chosen.then(self.apply(policy))
        except Unsupported as error:
            if option is not None:
                raise
            warning = f"packets that this machine forwards still reach the locked endpoints: {error}"
            return chosen.then(Change(warnings=(warning,)))

    def change(self, policy: Policy) -> Change:
        """Enforces a policy that was changed, with the option from the start."""
        return self.enforce(policy, self.option())

    def option(self) -> str | None:
        """The option that was given when the policy was put in force: LEAVE, or None for what enforce() chooses."""
        return LEAVE if self.state_file.read() == LEAVE else None

    def apply(self, policy: Policy) -> Change:
        """Puts rules for the policy's endpoints at the head of FORWARD, in place of those that were there."""
        with self.state_file.locked():
            programs = self._default_programs((4, 6))
            self._chains.replace(programs, lambda version: render(policy, version))
        done = (
            f"forwarded packets to locked endpoints are rejected, by rules in FORWARD written with {titles(programs)}"
        )
        return Change((done,))

    def remove(self) -> Change:
        """Removes our rules from FORWARD. Harmless when there are none."""
        with self.state_file.locked():
            cleared = self._chains.remove()
        return Change(tuple(f"rules for forwarded packets were removed with {program.title}" for program in cleared))

    def _default_programs(self, versions: Sequence[int]) -> list[Program]:
        return [default_program(version, self._chains.commands[version]) for version in versions]

    def in_force(self) -> bool:
        """True when FORWARD leads to rules of ours, IPv4 or IPv6."""
        return any(_is_reached(program) for program in self._chains.programs())

    def faults(self, policy: Policy | None) -> list[str]:
        """What is wrong in FORWARD for the policy that is in force, a sentence each."""
        if policy is None:
            left = self.in_force()
            return ["no policy is in force, but its rules in FORWARD are; stop removes them"] if left else []
        state = self.state_file.read()
        if state == LEAVE or (not state and not choose(policy, None, forwarding_is_on())[0]):
            return []
        try:
            programs = self._default_programs(_versions(policy))
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
