# SPDX-License-Identifier: Apache-2.0
"""One rule of iptables as a value: rendered for iptables-restore, parsed from iptables-save.

Only what our own rules are made of has a place here. Anything else in one of our chains was put there by somebody else.
"""

from __future__ import annotations

import ipaddress
import shlex
from typing import Callable, NamedTuple

from imds_guard.policy.model import Network

Range = tuple[int, int]
"""Both ends belong to it."""

RETURN = "RETURN"
REJECT = "REJECT"
LOG = "LOG"

LOG_PREFIX = "imds-guard would deny: "
"""At most 29 octets: struct xt_log_info in Linux include/uapi/linux/netfilter/xt_LOG.h."""


class ForeignRule(ValueError):
    """The text is no rule that we would write."""


class Rule(NamedTuple):
    """What a packet must be, and what then happens. ``goto`` tells -g from -j; ``reject_with`` is REJECT's word."""

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

    def text(self) -> str:
        """The rule as a line of iptables-restore, without its ``-A CHAIN``."""
        words: list[str] = []
        if self.destination is not None:
            words += ["-d", str(self.destination)]
        if self.protocol:
            words += ["-p", self.protocol]
        words += self._transport_words() + self._owner_words()
        if self.comment:
            words += ["-m comment --comment", f'"{self.comment}"']
        words += ["-g" if self.goto else "-j", self.target]
        if self.reject_with:
            words += ["--reject-with", self.reject_with]
        if self.target == LOG:
            words += [f'--log-prefix "{LOG_PREFIX}" --log-uid']
        return " ".join(words)

    def _transport_words(self) -> list[str]:
        words: list[str] = []
        if self.syn or self.ports:
            words += ["-m", self.protocol]
        if self.syn:
            words += ["--tcp-flags FIN,SYN,RST,ACK SYN"]
        if self.ports:
            words += ["--dport", _range_words(self.ports, ":")]
        return words

    def _owner_words(self) -> list[str]:
        words: list[str] = []
        if self.ownerless:
            words += ["-m owner ! --uid-owner", _range_words(EVERY_UID, "-")]
        if self.uids:
            words += ["-m owner --uid-owner", _range_words(self.uids, "-")]
        if self.gids:
            words += ["-m owner --gid-owner", _range_words(self.gids, "-")]
        if self.supplementary:
            words += ["--suppl-groups"]
        return words


EVERY_UID: Range = (0, 0xFFFFFFFE)
"""``! --uid-owner`` of it matches the packets that no open file stands for (a kernel socket), and no others.

Source: owner_mt() in Linux net/netfilter/xt_owner.c, "if (filp == NULL)".
"""


def _range_words(range_: Range, dash: str) -> str:
    low, high = range_
    return str(low) if low == high else f"{low}{dash}{high}"


# --- from iptables-save ---------------------------------------------------------------------------------------------


def parse_rule(text: str) -> Rule:
    """The rule that a line of iptables-save stands for, after its ``-A CHAIN``. Raises ForeignRule."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ForeignRule(text) from error
    rule = Rule(target="")
    while words:
        word = words.pop(0)
        if word == "!":
            rule, words = _inverted(rule, words, text)
        elif word in ("--suppl-groups", "--log-uid"):
            rule = rule._replace(supplementary=rule.supplementary or word == "--suppl-groups")
        elif word in _OPTIONS and words:
            try:
                rule = _OPTIONS[word](rule, words.pop(0))
            except ValueError as error:
                raise ForeignRule(text) from error
        elif word == "--tcp-flags" and len(words) >= 2:
            if set(words.pop(0).split(",")) != {"FIN", "SYN", "RST", "ACK"} or words.pop(0) != "SYN":
                raise ForeignRule(text)
            rule = rule._replace(syn=True)
        else:
            raise ForeignRule(text)
    return rule


def _inverted(rule: Rule, words: list[str], text: str) -> tuple[Rule, list[str]]:
    if words[:2] != ["--uid-owner", _range_words(EVERY_UID, "-")]:
        raise ForeignRule(text)
    return rule._replace(ownerless=True), words[2:]


def _match_name(rule: Rule, word: str) -> Rule:
    if word not in ("tcp", "udp", "owner", "comment"):
        raise ValueError(word)
    return rule


def _log_prefix(rule: Rule, word: str) -> Rule:
    if word.strip() != LOG_PREFIX.strip():
        raise ValueError(word)
    return rule


def _parse_range(word: str, dash: str, highest: int) -> Range:
    low, found, high = word.partition(dash)
    first = int(low or "0")
    return (first, int(high or str(highest)) if found else first)


_OPTIONS: dict[str, Callable[[Rule, str], Rule]] = {
    "-d": lambda rule, word: rule._replace(destination=ipaddress.ip_network(word)),
    "-p": lambda rule, word: rule._replace(protocol=word),
    "-m": _match_name,
    "--dport": lambda rule, word: rule._replace(ports=_parse_range(word, ":", 65535)),
    "--uid-owner": lambda rule, word: rule._replace(uids=_parse_range(word, "-", EVERY_UID[1])),
    "--gid-owner": lambda rule, word: rule._replace(gids=_parse_range(word, "-", EVERY_UID[1])),
    "--comment": lambda rule, word: rule._replace(comment=word),
    "-j": lambda rule, word: rule._replace(target=word),
    "-g": lambda rule, word: rule._replace(target=word, goto=True),
    "--reject-with": lambda rule, word: rule._replace(reject_with=word),
    "--log-prefix": _log_prefix,
}
