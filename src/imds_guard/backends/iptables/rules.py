# SPDX-License-Identifier: Apache-2.0
"""One rule of iptables as a value: rendered for iptables-restore, parsed from iptables-save.

Only the matches and targets of our own rules are known here. Any other rule in one of our chains is somebody else's.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Iterable
from typing import Callable, NamedTuple

from imds_guard.policy.model import Network

Range = tuple[int, int]
"""First and last, inclusive."""
Place = tuple[ipaddress.IPv4Address, int]

RETURN = "RETURN"
ACCEPT = "ACCEPT"
REJECT = "REJECT"
LOG = "LOG"
MARK = "MARK"
DNAT = "DNAT"

DENIED_MARK = 0x696D1064
"""The firewall mark of a packet that is to be rejected. It is the whole mark, not a bit of it: no other program uses
this number, and no rule of ours changes the mark of a packet that may pass. A process that sets it itself (SO_MARK in
socket(7)) denies itself.

A packet whose mark has changed in OUTPUT is routed again (ip_route_me_harder() in Linux net/ipv4/netfilter.c). So the
number has none of the bits that rules for routing ask for: 0x80 (AWS VPC CNI), 0xf00 (Cilium), 0x2000 (the CNI plugin
portmap), 0xc000 (kube-proxy), 0x100000 (Calico with WireGuard).
"""

FILTERED_MARK = 0x696D1066
"""The firewall mark of the first packet to a filter. Whoever has it goes there, or nowhere: nobody gains by setting it.

It has none of those bits either.
"""

LOG_PREFIX = "imds-guard would deny: "
"""At most 29 bytes: struct xt_log_info in Linux include/uapi/linux/netfilter/xt_LOG.h."""


class ForeignRule(ValueError):
    """The text is not one of our rules."""


class Rule(NamedTuple):
    """What a packet must match, and its target: -g with ``goto``, else -j. ``reject_with`` is an option of REJECT."""

    target: str
    goto: bool = False
    destination: Network | None = None
    protocol: str = ""
    syn: bool = False
    ports: Range | None = None
    uids: Range | None = None
    ownerless: bool = False
    gids: Range | None = None
    supplementary: bool = False
    comment: str = ""
    reject_with: str = ""
    mark: int = 0
    """DENIED_MARK or FILTERED_MARK: what the target MARK sets, else what the packet must have."""
    to: Place | None = None
    """Where DNAT leads to: an IPv4 address and a port."""

    def text(self) -> str:
        """The rule as a line of iptables-restore, without its ``-A CHAIN``."""
        arguments: list[str] = []
        if self.destination is not None:
            arguments += ["-d", str(self.destination)]
        if self.protocol:
            arguments += ["-p", self.protocol]
        if self.mark and self.target != MARK:
            arguments += [f"-m mark --mark {self.mark:#x}"]
        arguments += self._transport_arguments() + self._owner_arguments()
        if self.comment:
            arguments += ["-m comment --comment", f'"{self.comment}"']
        arguments += ["-g" if self.goto else "-j", self.target]
        if self.reject_with:
            arguments += ["--reject-with", self.reject_with]
        if self.target == LOG:
            arguments += [f'--log-prefix "{LOG_PREFIX}" --log-uid']
        if self.target == MARK:
            arguments += [f"--set-xmark {self.mark:#x}/0xffffffff"]
        if self.to is not None:
            arguments += ["--to-destination", f"{self.to[0]}:{self.to[1]}"]
        return " ".join(arguments)

    def _transport_arguments(self) -> list[str]:
        arguments: list[str] = []
        if self.syn or self.ports:
            arguments += ["-m", self.protocol]
        if self.syn:
            arguments += ["--tcp-flags FIN,SYN,RST,ACK SYN"]
        if self.ports:
            arguments += ["--dport", _range_text(self.ports, ":")]
        return arguments

    def _owner_arguments(self) -> list[str]:
        arguments: list[str] = []
        if self.ownerless:
            arguments += ["-m owner ! --uid-owner", _range_text(EVERY_UID, "-")]
        if self.uids:
            arguments += ["-m owner --uid-owner", _range_text(self.uids, "-")]
        if self.gids:
            arguments += ["-m owner --gid-owner", _range_text(self.gids, "-")]
        if self.supplementary:
            arguments += ["--suppl-groups"]
        return arguments


EVERY_UID: Range = (0, 0xFFFFFFFE)
"""``! --uid-owner`` with this range matches packets of sockets without an open file (of the kernel), and no others.

Source: owner_mt() in Linux net/netfilter/xt_owner.c, "if (filp == NULL)".
"""


def id_ranges(ids: Iterable[int]) -> list[Range]:
    """The IDs as ascending ranges that do not touch."""
    ranges: list[Range] = []
    for number in sorted(ids):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _range_text(range_: Range, separator: str) -> str:
    low, high = range_
    return str(low) if low == high else f"{low}{separator}{high}"


# --- from iptables-save -----------------------------------------------------------------------------------------------


def parse_rule(text: str) -> Rule:
    """The rule in a line of iptables-save, after its ``-A CHAIN``. Raises ForeignRule."""
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise ForeignRule(text) from error
    rule = Rule(target="")
    while arguments:
        argument = arguments.pop(0)
        if argument == "!":
            rule, arguments = _inverted(rule, arguments, text)
        elif argument in ("--suppl-groups", "--log-uid"):
            rule = rule._replace(supplementary=rule.supplementary or argument == "--suppl-groups")
        elif argument in _OPTIONS and arguments:
            try:
                rule = _OPTIONS[argument](rule, arguments.pop(0))
            except ValueError as error:
                raise ForeignRule(text) from error
        elif argument == "--tcp-flags" and len(arguments) >= 2:
            if set(arguments.pop(0).split(",")) != {"FIN", "SYN", "RST", "ACK"} or arguments.pop(0) != "SYN":
                raise ForeignRule(text)
            rule = rule._replace(syn=True)
        else:
            raise ForeignRule(text)
    return rule


def _inverted(rule: Rule, arguments: list[str], text: str) -> tuple[Rule, list[str]]:
    if arguments[:2] != ["--uid-owner", _range_text(EVERY_UID, "-")]:
        raise ForeignRule(text)
    return rule._replace(ownerless=True), arguments[2:]


def _match_name(rule: Rule, argument: str) -> Rule:
    if argument not in ("tcp", "udp", "owner", "comment", "mark"):
        raise ValueError(argument)
    return rule


_MARKS = {f"{mark:#x}": mark for mark in (DENIED_MARK, FILTERED_MARK)}


def _mark(rule: Rule, argument: str) -> Rule:
    if argument not in _MARKS:
        raise ValueError(argument)
    return rule._replace(mark=_MARKS[argument])


def _set_mark(rule: Rule, argument: str) -> Rule:
    mark, _, mask = argument.partition("/")
    if mask != "0xffffffff":
        raise ValueError(argument)
    return _mark(rule, mark)


def _to_destination(rule: Rule, argument: str) -> Rule:
    address, _, port = argument.partition(":")
    return rule._replace(to=(ipaddress.IPv4Address(address), int(port)))


def _log_prefix(rule: Rule, argument: str) -> Rule:
    if argument.strip() != LOG_PREFIX.strip():
        raise ValueError(argument)
    return rule


def _parse_range(argument: str, separator: str, highest: int) -> Range:
    low, found, high = argument.partition(separator)
    first = int(low or "0")
    return (first, int(high or str(highest)) if found else first)


_OPTIONS: dict[str, Callable[[Rule, str], Rule]] = {
    "-d": lambda rule, argument: rule._replace(destination=ipaddress.ip_network(argument)),
    "-p": lambda rule, argument: rule._replace(protocol=argument),
    "-m": _match_name,
    "--dport": lambda rule, argument: rule._replace(ports=_parse_range(argument, ":", 65535)),
    "--uid-owner": lambda rule, argument: rule._replace(uids=_parse_range(argument, "-", EVERY_UID[1])),
    "--gid-owner": lambda rule, argument: rule._replace(gids=_parse_range(argument, "-", EVERY_UID[1])),
    "--comment": lambda rule, argument: rule._replace(comment=argument),
    "-j": lambda rule, argument: rule._replace(target=argument),
    "-g": lambda rule, argument: rule._replace(target=argument, goto=True),
    "--reject-with": lambda rule, argument: rule._replace(reject_with=argument),
    "--log-prefix": _log_prefix,
    "--mark": _mark,
    "--set-xmark": _set_mark,
    "--to-destination": _to_destination,
}
