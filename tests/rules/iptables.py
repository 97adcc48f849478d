# SPDX-License-Identifier: Apache-2.0
"""An interpreter of iptables rules: a table of one IP version, from the text that iptables-restore takes.

It shares no code with the backend. It is written from iptables(8), iptables-restore(8), iptables-extensions(8), and,
where those are silent, from ipt_do_table() and owner_mt() in Linux. What it does not know is an error: a match that is
skipped would make rules seem to do more than they do. tests/kernel/test_rule_interpreters.py compares it with a kernel.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from dataclasses import dataclass, field, replace
from typing import Callable

from imds_guard.policy.model import Address, Network
from tests.rules.packets import TCP_FLAGS, BadRules, Outcome, Packet, number_range

Test = Callable[[Packet], bool]

_MAX_ID = 0xFFFFFFFE
_MAX_CHAIN_NAME = 28
"""XT_EXTENSION_MAXNAMELEN in include/uapi/linux/netfilter/x_tables.h, less the zero byte."""
_MAX_COMMENT = 255
_MAX_LOG_PREFIX = 29
_MAX_STEPS = 100_000

_REJECT_WITH = {
    4: {
        *("icmp-net-unreachable", "icmp-host-unreachable", "icmp-port-unreachable", "icmp-proto-unreachable"),
        *("icmp-net-prohibited", "icmp-host-prohibited", "icmp-admin-prohibited", "tcp-reset"),
    },
    6: {"icmp6-no-route", "icmp6-adm-prohibited", "icmp6-addr-unreachable", "icmp6-port-unreachable", "tcp-reset"},
}
_DEFAULT_REJECT = {4: "icmp-port-unreachable", 6: "icmp6-port-unreachable"}


@dataclass
class _Owner:
    """One ``-m owner``."""

    uids: range | None = None
    gids: range | None = None
    not_uid: bool = False
    not_gid: bool = False
    supplementary: bool = False

    def __call__(self, packet: Packet) -> bool:
        if packet.owner is None:
            # Every owner option of a packet without one fails, and ! of it holds.
            return (self.uids is None or self.not_uid) and (self.gids is None or self.not_gid)
        if self.uids is not None and (packet.owner.fsuid in self.uids) == self.not_uid:
            return False
        if self.gids is None:
            return True
        found = packet.owner.fsgid in self.gids
        if self.supplementary:
            found = found or any(gid in self.gids for gid in packet.owner.groups)
        return found != self.not_gid


@dataclass
class _Rule:
    """A rule: ``tests`` that a packet must pass, and a target. Without a target it only counts."""

    tests: list[Test] = field(default_factory=list)
    target: str = ""
    goto: bool = False
    reject_with: str = ""
    log_prefix: str = ""
    mark: int = 0
    """What MARK sets."""
    to: tuple[Address, int] | None = None
    """What DNAT puts in."""


@dataclass
class _Chain:
    policy: str | None = None
    """Of a built-in chain."""
    rules: list[tuple[str, _Rule]] = field(default_factory=list)


_BUILTIN = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
}
_TARGETS = {
    "filter": ("", "ACCEPT", "DROP", "RETURN", "REJECT", "LOG"),
    "mangle": ("", "ACCEPT", "DROP", "RETURN", "MARK", "LOG"),
    "nat": ("", "ACCEPT", "DROP", "RETURN", "DNAT", "LOG"),
}
"""REJECT is for filter alone: reject_tg_reg in Linux net/ipv4/netfilter/ipt_REJECT.c."""


class Filter:
    """Table filter, or another one, of IP version 4 or 6, at first as it is on a machine without rules."""

    def __init__(self, version: int, table: str = "filter") -> None:
        self.version = version
        self.table = table
        self._chains = {name: _Chain("ACCEPT") for name in _BUILTIN[table]}

    # --- iptables-restore -------------------------------------------------------------------------------------------

    def restore(self, text: str) -> None:
        """What ``iptables-restore --noflush`` does with the text. Raises BadRules, and leaves the table half done."""
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        if lines[:1] != [f"*{self.table}"] or lines[-1] != "COMMIT":
            raise BadRules(f"not table {self.table} from its name to COMMIT")
        for line in lines[1:-1]:
            self._command(line)
        for chain in self._chains.values():
            for _, rule in chain.rules:
                self._check_target(rule)

    def _command(self, line: str) -> None:
        declared = re.fullmatch(r":(\S+) (\S+) \[\d+:\d+\]", line)
        if declared:
            self._declare(declared[1], declared[2])
            return
        family = re.match(r"-([46]) ", line)
        if family:  # each of iptables-restore and ip6tables-restore skips the lines for the other
            if int(family[1]) != self.version:
                return
            line = line[3:]
        verb, name, *rest = line.split(" ", 2)
        rule = "".join(rest)
        chain = self._chains.get(name)
        if chain is None:
            raise BadRules(f"no chain {name}: {line!r}")
        if verb == "-A":
            chain.rules.append((rule, self._parse(rule)))
        elif verb == "-I":
            place, _, rule = rule.partition(" ")
            chain.rules.insert(int(place) - 1, (rule, self._parse(rule)))
        elif verb == "-D":
            texts = [other for other, _ in chain.rules]
            if rule not in texts:
                raise BadRules(f"no such rule: {line!r}")
            del chain.rules[texts.index(rule)]
        elif verb == "-F" and not rest:
            chain.rules.clear()
        elif verb == "-X" and not rest:
            self._remove(name)
        else:
            raise BadRules(f"not a command: {line!r}")

    def _declare(self, name: str, policy: str) -> None:
        """A chain of ours that is there already is flushed, also with --noflush."""
        if name in self._chains and self._chains[name].policy is not None:
            if policy not in ("ACCEPT", "DROP"):
                raise BadRules(f"not a policy: {policy}")
            self._chains[name].policy = policy
        elif policy != "-" or len(name) > _MAX_CHAIN_NAME:
            raise BadRules(f"not a chain: {name} {policy}")
        else:
            self._chains[name] = _Chain()

    def _remove(self, name: str) -> None:
        chain = self._chains[name]
        used = any(rule.target == name for other in self._chains.values() for _, rule in other.rules)
        if chain.policy is not None or chain.rules or used:
            raise BadRules(f"{name} can't be removed: it is built in, not empty, or used")
        del self._chains[name]

    def texts(self) -> dict[str, tuple[str, ...]]:
        """Chain -> its rules as they were written."""
        return {name: tuple(text for text, _ in chain.rules) for name, chain in self._chains.items()}

    # --- one rule ---------------------------------------------------------------------------------------------------

    def _parse(self, text: str) -> _Rule:
        return _Parser(self.version, text).rule

    def _check_target(self, rule: _Rule) -> None:
        chain = self._chains.get(rule.target)
        if chain is None and (rule.goto or rule.target not in _TARGETS[self.table]):
            raise BadRules(f"no target {rule.target}")
        if chain is not None and chain.policy is not None:
            raise BadRules(f"a built-in chain is no target: {rule.target}")

    # --- packets ----------------------------------------------------------------------------------------------------

    def judge(self, hook: str, packet: Packet) -> Outcome:
        """What the rules of a built-in chain do with a packet. A goto keeps the place that RETURN leads to."""
        stack: list[tuple[str, int]] = []
        logged: list[str] = []
        name, place, met, depth = hook, 0, 0, 1
        if packet.destination.version != self.version:
            raise BadRules("the packet is of the other IP version")
        for _ in range(_MAX_STEPS):
            chain = self._chains[name]
            if place >= len(chain.rules):
                if not stack:
                    return Outcome(str(self._chains[hook].policy), "", tuple(logged), met, depth, packet.mark)
                name, place = stack.pop()
                continue
            rule = chain.rules[place][1]
            met, place = met + 1, place + 1
            if not all(test(packet) for test in rule.tests):
                continue
            if rule.target in ("ACCEPT", "DROP", "REJECT"):
                return Outcome(rule.target, rule.reject_with, tuple(logged), met, depth, packet.mark)
            if rule.target == "DNAT":
                return Outcome("ACCEPT", "", tuple(logged), met, depth, packet.mark, rule.to)
            if rule.target == "MARK":
                packet = replace(packet, mark=rule.mark)
            elif rule.target == "LOG":
                logged.append(rule.log_prefix)
            elif rule.target == "RETURN":
                place = len(chain.rules)
            elif rule.target:
                stack += [] if rule.goto else [(name, place)]
                name, place, depth = rule.target, 0, depth + 1
        raise BadRules("the chains go round in a circle")


class _Parser:
    """One rule: its options one after the other. ``-m`` opens a match, and options of a match go to the last one."""

    def __init__(self, version: int, text: str) -> None:
        self.rule = _Rule()
        self._version = version
        self._text = text
        self._left = shlex.split(text)
        self._protocol = ""
        self._match = ""
        self._owner = _Owner()
        while self._left:
            inverted = self._left[0] == "!"
            if inverted:
                self._left.pop(0)
            self._option(self._next(), inverted)
        if self.rule.target == "REJECT":
            self._finish_reject()

    def _next(self) -> str:
        if not self._left:
            raise self._unknown("an option without its argument")
        return self._left.pop(0)

    def _unknown(self, what: str) -> BadRules:
        return BadRules(f"{what}: {self._text!r}")

    def _option(self, option: str, inverted: bool) -> None:
        owner = {"--uid-owner": self._uid_owner, "--gid-owner": self._gid_owner}
        if option == "-p":
            self._set_protocol(self._next(), inverted)
        elif option == "--tcp-flags" and self._match == self._protocol == "tcp":
            self._tcp_flags(inverted)
        elif option in owner and self._match == "owner":
            owner[option](inverted)
        elif inverted:
            raise self._unknown(f"! {option} is not known here")
        elif option == "--suppl-groups" and self._match == "owner":
            self._owner.supplementary = True
        elif option == "-d":
            self._destination(self._next())
        elif option == "-m":
            self._open_match(self._next())
        elif option == "--dport" and self._match == self._protocol in ("tcp", "udp"):
            ports = number_range(self._next(), ":", 65535)
            self.rule.tests.append(lambda packet: packet.read_port() in ports)
        elif option in ("-f", "--fragfirst", "--ctdir", "--ctstate"):
            self._forwarded(option)
        elif option == "--mark" and self._match == "mark":
            mark = self._number(self._next())
            self.rule.tests.append(lambda packet: packet.mark == mark)
        elif option == "--comment" and self._match == "comment":
            if len(self._next().encode()) > _MAX_COMMENT:
                raise self._unknown("the comment is too long")
        elif option in ("-j", "-g") and not self.rule.target:
            self.rule.target, self.rule.goto = self._next(), option == "-g"
        else:
            self._target_option(option)

    def _destination(self, text: str) -> None:
        network: Network = ipaddress.ip_network(text, strict=False)  # iptables masks it
        if network.version != self._version:
            raise self._unknown("the address is of the other IP version")
        self.rule.tests.append(lambda packet: packet.destination in network)

    def _set_protocol(self, name: str, inverted: bool) -> None:
        """A packet that does not tell its protocol matches neither -p nor ! -p."""
        if name not in ("tcp", "udp") or self._protocol:
            raise self._unknown("-p is not known here")
        self._protocol = "" if inverted else name
        self.rule.tests.append(lambda packet: packet.protocol != "" and (packet.protocol == name) != inverted)

    def _open_match(self, name: str) -> None:
        known = ("tcp", "udp", "owner", "comment", "mark", "conntrack", *(["frag"] if self._version == 6 else []))
        if name not in known or (name in ("tcp", "udp") and name != self._protocol):
            raise self._unknown(f"-m {name} is not known here")
        self._match = name
        if name == "frag":
            self.rule.tests.append(lambda packet: packet.fragment != "")
        if name == "owner":
            self._owner = _Owner()
            self.rule.tests.append(self._owner)

    def _uid_owner(self, inverted: bool) -> None:
        self._owner.uids, self._owner.not_uid = number_range(self._next(), "-", _MAX_ID), inverted

    def _gid_owner(self, inverted: bool) -> None:
        self._owner.gids, self._owner.not_gid = number_range(self._next(), "-", _MAX_ID), inverted

    def _tcp_flags(self, inverted: bool) -> None:
        examined, wanted = self._flags(self._next()), self._flags(self._next())
        if not wanted <= examined:
            raise self._unknown("flags that are not examined are wanted")

        def test(packet: Packet) -> bool:
            if packet.fragment == "later" or packet.is_cut_short:
                raise BadRules("a rule takes what is in a fragment for flags")
            return (packet.flags & examined == wanted) != inverted

        self.rule.tests.append(test)

    def _forwarded(self, option: str) -> None:
        """What only the rules for forwarded packets ask: conntrack and fragments."""
        forms: dict[tuple[str, str], Test] = {
            ("-f", ""): lambda packet: packet.fragment == "later",
            ("--fragfirst", "frag"): lambda packet: packet.fragment == "first",
            ("--ctdir REPLY", "conntrack"): lambda packet: packet.direction == "reply",
            ("--ctstate INVALID,UNTRACKED", "conntrack"): lambda packet: packet.direction == "",
        }
        if option.startswith("--ct"):
            option = f"{option} {self._next()}"
        match = "" if option == "-f" and self._version == 4 else self._match
        if (option, match) not in forms:
            raise self._unknown(f"{option} is not known here")
        self.rule.tests.append(forms[option, match])

    def _number(self, text: str) -> int:
        if not re.fullmatch(r"0x[0-9a-f]{1,8}", text):
            raise self._unknown("not a mark in hexadecimal")
        return int(text, 16)

    def _flags(self, text: str) -> frozenset[str]:
        flags = frozenset(text.split(","))
        if not flags <= set(TCP_FLAGS):
            raise self._unknown("unknown TCP flags")
        return flags

    def _target_option(self, option: str) -> None:
        target = self.rule.target
        if option == "--reject-with" and target == "REJECT":
            self.rule.reject_with = self._next()
        elif option == "--set-xmark" and target == "MARK":
            mark, _, mask = self._next().partition("/")
            if self._number(mask) != 0xFFFFFFFF:
                raise self._unknown("a part of the mark is not known here")
            self.rule.mark = self._number(mark)
        elif option == "--to-destination" and target == "DNAT" and self._protocol:
            address, _, port = self._next().rpartition(":")
            self.rule.to = ipaddress.ip_address(address), int(port)
            if self.rule.to[0].version != self._version:
                raise self._unknown("the address is of the other IP version")
        elif option == "--log-prefix" and target == "LOG":
            self.rule.log_prefix = self._next()
            if len(self.rule.log_prefix) > _MAX_LOG_PREFIX:
                raise self._unknown("the prefix is too long")
        elif option != "--log-uid" or target != "LOG":
            raise self._unknown(f"{option} is not known here")

    def _finish_reject(self) -> None:
        """``tcp-reset`` needs a rule that matches TCP alone: iptables-extensions(8), "REJECT"."""
        self.rule.reject_with = self.rule.reject_with or _DEFAULT_REJECT[self._version]
        if self.rule.reject_with not in _REJECT_WITH[self._version]:
            raise self._unknown("not a type of REJECT for this IP version")
        if self.rule.reject_with == "tcp-reset" and self._protocol != "tcp":
            raise self._unknown("tcp-reset in a rule that is not for TCP")
