# SPDX-License-Identifier: Apache-2.0
"""An interpreter of nft rules: one table, as ``export``, forwarded/by_nft.py and iptables/marks.py write it.

Written from nft(8), and from nft_do_chain() and nft_meta_get_eval_skugid() in Linux. What it does not know is an error.
tests/kernel/test_rule_interpreters.py compares it with a kernel.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from dataclasses import dataclass, field
from typing import Callable

from tests.rules.packets import BadRules, Outcome, Packet, number_range

Test = Callable[[Packet], bool]

_TOKENS = re.compile(r'"[^"]*"|[{}();,|&]|[=!]=|[^\s{}();,|&=!"]+')
_MAX_ID = 0xFFFFFFFE
_MAX_STEPS = 100_000
_MAX_DEPTH = 16
"""NFT_JUMP_STACK_SIZE in include/net/netfilter/nf_tables.h."""


@dataclass
class _Rule:
    tests: list[Test] = field(default_factory=list)
    verdict: str = ""
    """accept, drop, return, jump, goto or reject."""
    argument: str = ""
    """The chain, or the type of reject as iptables calls it for IPv4."""
    log_prefix: str = ""


class Ruleset:
    """A file for ``nft -f``: ``table``, ``delete table``, and the table with its chains. Raises BadRules."""

    def __init__(self, text: str) -> None:
        self._chains: dict[str, list[_Rule]] = {}
        self._hooks: dict[str, str] = {}
        """Hook -> base chain."""
        self._version = 0
        """The IP version of family ip or ip6; 0 for both."""
        self.priorities: dict[str, int] = {}
        """Hook -> the priority of its base chain."""
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        family = re.match(r"table (inet|ip6|ip) ", lines[0])
        if family is None or lines[1:3] != [f"delete {lines[0]}", f"{lines[0]} {{"]:
            raise BadRules("the table is not replaced in one step")
        if lines[-1] != "}":
            raise BadRules("the table does not end")
        self._version = {"inet": 0, "ip": 4, "ip6": 6}[family[1]]
        self._read_chains(lines[3:-1])
        for rules in self._chains.values():
            for rule in rules:
                if rule.verdict in ("jump", "goto") and rule.argument not in self._chains:
                    raise BadRules(f"no chain {rule.argument}")

    def _read_chains(self, lines: list[str]) -> None:
        rules: list[_Rule] | None = None
        for line in lines:
            begins = re.fullmatch(r"chain ([\w-]+) \{", line)
            base = re.fullmatch(r"type filter hook (\w+) priority (filter|-?\d+); policy accept;", line)
            if rules is None and begins and begins[1] not in self._chains:
                rules = self._chains[begins[1]] = []
            elif rules is not None and line == "}":
                rules = None
            elif rules == [] and base:
                self._hooks[base[1]] = next(name for name, other in self._chains.items() if other is rules)
                self.priorities[base[1]] = 0 if base[2] == "filter" else int(base[2])
            elif rules is not None:
                rules.append(_Parser(line).rule)
            else:
                raise BadRules(f"not in a chain: {line!r}")
        if rules is not None:
            raise BadRules("a chain does not end")

    def judge(self, hook: str, packet: Packet) -> Outcome:
        """What the rules at a hook do with a packet. A goto does not add to the places that return leads to."""
        stack: list[tuple[str, int]] = []
        logged: list[str] = []
        name, place, met, depth = self._hooks[hook], 0, 0, 1
        if self._version not in (0, packet.destination.version):
            return Outcome("ACCEPT")
        for _ in range(_MAX_STEPS):
            if place >= len(self._chains[name]):
                if not stack:
                    return Outcome("ACCEPT", "", tuple(logged), met, depth)
                name, place = stack.pop()
                continue
            rule = self._chains[name][place]
            met, place = met + 1, place + 1
            if not all(test(packet) for test in rule.tests):
                continue
            logged += [rule.log_prefix] if rule.log_prefix else []
            if rule.verdict in ("accept", "drop"):
                return Outcome(rule.verdict.upper(), "", tuple(logged), met, depth)
            if rule.verdict == "reject":
                return Outcome("REJECT", _rejection(rule.argument, packet), tuple(logged), met, depth)
            if rule.verdict == "return":
                place = len(self._chains[name])
            elif rule.verdict:
                stack += [(name, place)] if rule.verdict == "jump" else []
                name, place, depth = rule.argument, 0, depth + 1
                if depth > _MAX_DEPTH:
                    raise BadRules("too many chains in each other")
        raise BadRules("the chains go round in a circle")


def _rejection(kind: str, packet: Packet) -> str:
    if kind == "tcp-reset":
        if packet.protocol != "tcp":
            raise BadRules("a reset for a packet that is not TCP")
        return kind
    if kind != "port-unreachable" and int(kind[-1]) != packet.destination.version:
        raise BadRules("an answer of the other IP version")
    return "icmp-port-unreachable" if packet.destination.version == 4 else "icmp6-port-unreachable"


class _Parser:
    """One rule: matches, then what is done. Each key adds the match of its protocol, as nft does in family inet."""

    def __init__(self, text: str) -> None:
        self.rule = _Rule()
        self._text = text
        self._left = _TOKENS.findall(text)
        if _TOKENS.sub("", text).strip():
            raise self._unknown("unknown characters")
        while self._left:
            if self.rule.verdict:
                raise self._unknown("something behind the verdict")
            self._part(self._next())

    def _next(self) -> str:
        if not self._left:
            raise self._unknown("the rule ends in the middle")
        return str(self._left.pop(0))

    def _take(self, *tokens: str) -> None:
        for token in tokens:
            if self._next() != token:
                raise self._unknown(f"expected {token}")

    def _unknown(self, what: str) -> BadRules:
        return BadRules(f"{what}: {self._text!r}")

    def _part(self, word: str) -> None:
        if word in ("accept", "drop", "return"):
            self.rule.verdict = word
        elif word in ("jump", "goto"):
            self.rule.verdict, self.rule.argument = word, self._next()
        elif word == "reject":
            self._reject()
        elif word == "counter":
            pass
        elif word == "log":
            self._take("prefix")
            self.rule.log_prefix = self._next().strip('"')
            self._take("flags", "skuid")
        elif word in ("meta", "ip", "ip6", "tcp", "udp", "ct", "exthdr", "frag"):
            self._match(word, self._next())
        else:
            raise self._unknown(f"{word} is not known here")

    def _reject(self) -> None:
        self._take("with")
        how = (self._next(), self._next())
        if how[1] == "type":
            how = (how[0], self._next())
        kinds = {
            ("tcp", "reset"): "tcp-reset",
            ("icmpx", "port-unreachable"): "port-unreachable",
            ("icmp", "port-unreachable"): "port-unreachable-4",
            ("icmpv6", "port-unreachable"): "port-unreachable-6",
        }
        if how not in kinds:
            raise self._unknown("this reject is not known here")
        self.rule.verdict, self.rule.argument = "reject", kinds[how]

    def _match(self, header: str, key: str) -> None:
        tests = self.rule.tests
        if header in ("ip", "ip6"):
            self._protocol_of("nfproto", {"ip": "ipv4", "ip6": "ipv6"}[header])
        elif header in ("tcp", "udp"):
            self._protocol_of("l4proto", header)
        if (header, key) == ("meta", "l4proto") and self._left[:1] == ["!="]:
            self._other_protocols()
        elif (header, key) in (("meta", "l4proto"), ("meta", "nfproto")):
            self._protocol_of(key, self._next())
        elif (header, key) in (("ip", "daddr"), ("ip6", "daddr")):
            self._addresses(4 if header == "ip" else 6)
        elif key == "dport":
            ports = self._values(65535)
            tests.append(lambda packet: any(packet.read_port() in one for one in ports))
        elif (header, key) == ("tcp", "flags"):
            self._flags()
        elif header in ("ct", "exthdr", "frag") or key == "frag-off":
            self._forwarded(header, key)
        elif header == "meta" and key in ("skuid", "skgid"):
            self._owner(key)
        elif (header, key) == ("meta", "mark"):
            mark = int(self._next(), 16)
            tests.append(lambda packet: packet.mark == mark)
        else:
            raise self._unknown(f"{header} {key} is not known here")

    def _protocol_of(self, key: str, name: str) -> None:
        if key == "l4proto" and name in ("tcp", "udp"):
            self.rule.tests.append(lambda packet: packet.protocol == name)
        elif key == "nfproto" and name in ("ipv4", "ipv6"):
            version = int(name[-1])
            self.rule.tests.append(lambda packet: packet.destination.version == version)
        else:
            raise self._unknown(f"{key} {name} is not known here")

    def _owner(self, key: str) -> None:
        """A packet whose socket has no open file matches no skuid and no skgid. skgid is the primary group alone."""
        wanted = self._values(_MAX_ID)

        def test(packet: Packet) -> bool:
            if packet.owner is None:
                return False
            identity = packet.owner.fsuid if key == "skuid" else packet.owner.fsgid
            return any(identity in one for one in wanted)

        self.rule.tests.append(test)

    def _values(self, highest: int) -> list[range]:
        """A value, a range, or a set of both. In a set with ranges, two that overlap are an error."""
        if self._left[:1] != ["{"]:
            return [number_range(self._next(), "-", highest)]
        self._take("{")
        found = [number_range(self._next(), "-", highest)]
        while self._left[:1] == [","]:
            self._take(",")
            found.append(number_range(self._next(), "-", highest))
        self._take("}")
        ordered = sorted(found, key=lambda one: one[0])
        if any(one[-1] >= other[0] for one, other in zip(ordered, ordered[1:])):
            raise self._unknown("intervals overlap")
        return found

    def _flags(self) -> None:
        """A fragment of TCP may end before the flags, or have something else in their place."""
        self._take("&", "(")
        examined = {self._next().upper()}
        while self._left[:1] == ["|"]:
            self._take("|")
            examined.add(self._next().upper())
        self._take(")")
        operator, wanted = self._next(), frozenset({self._next().upper()})
        if operator not in ("==", "!="):
            raise self._unknown("not a comparison")

        def test(packet: Packet) -> bool:
            if packet.fragment == "later" or packet.is_cut_short:
                raise BadRules("a rule takes what is in a fragment for flags")
            return (packet.flags & examined == wanted) == (operator == "==")

        self.rule.tests.append(test)

    def _other_protocols(self) -> None:
        """``!=`` of a protocol that the packet does not tell does not match: NFT_BREAK."""
        self._take("!=", "{")
        names = [self._next()]
        while self._left[:1] == [","]:
            self._take(",")
            names.append(self._next())
        self._take("}")
        self.rule.tests.append(lambda packet: packet.protocol != "" and packet.protocol not in names)

    def _addresses(self, version: int) -> None:
        is_inverted = self._left[:1] == ["!="]
        texts = [self._next() for _ in range(1 + is_inverted)][-1:]
        if texts == ["{"]:
            texts = [self._next()]
            while self._left[:1] == [","]:
                self._take(",")
                texts.append(self._next())
            self._take("}")
        networks = [ipaddress.ip_network(text) for text in texts]
        if any(network.version != version for network in networks):
            raise self._unknown("the address is of the other IP version")
        if any(one.overlaps(other) for one, other in itertools.combinations(networks, 2)):
            raise self._unknown("intervals overlap")
        self.rule.tests.append(lambda packet: any(packet.destination in one for one in networks) != is_inverted)

    def _forwarded(self, header: str, key: str) -> None:
        """What only the rules for forwarded packets ask: conntrack and fragments."""
        forms: dict[str, Test] = {
            "ct direction reply": lambda packet: packet.direction == "reply",
            "ct state { invalid , untracked }": lambda packet: packet.direction == "",
            "ip frag-off & 0x3fff != 0": lambda packet: packet.fragment != "",
            "ip frag-off & 0x1fff != 0": lambda packet: packet.fragment == "later",
            "exthdr frag exists": lambda packet: packet.fragment != "",
            "frag frag-off != 0": lambda packet: packet.fragment == "later",
        }
        words = [header, key]
        while " ".join(words) not in forms:
            if not self._left:
                raise self._unknown("not known here")
            words.append(self._next())
        if header in ("exthdr", "frag"):
            self._protocol_of("nfproto", "ipv6")
        self.rule.tests.append(forms[" ".join(words)])
