# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in the text of rules: each changes one thing, where the text has it."""

from __future__ import annotations

import re
from typing import Callable

Edit = Callable[[str], str]
"""The text with a fault, or the same text where there is no place for it."""


def unchanged(text: str) -> str:
    """No fault."""
    return text


def replaced(pattern: str, by: str | Callable[[re.Match[str]], str], count: int = 1) -> Edit:
    """The first ``count`` matches are replaced; 0 is all."""
    return lambda text: re.sub(pattern, by, text, count=count, flags=re.MULTILINE)


def without(pattern: str) -> Edit:
    """The first line that matches is missing."""
    return replaced(rf"^.*{pattern}.*\n", "")


def moved(pattern: str, behind: str) -> Edit:
    """The first line that matches ``pattern`` comes right after the first that matches ``behind``."""

    def edit(text: str) -> str:
        found = re.search(rf"^.*{pattern}.*\n", text, re.MULTILINE)
        if found is None:
            return text
        rest = text[: found.start()] + text[found.end() :]
        place = re.search(rf"^.*{behind}.*\n", rest, re.MULTILINE)
        return text if place is None else rest[: place.end()] + found[0] + rest[place.end() :]

    return edit


def changed_number(pattern: str, change: int, *, count: int = 1) -> Edit:
    """The number in the only group of the pattern becomes another, in the first ``count`` matches; 0 is all."""

    def changed(found: re.Match[str]) -> str:
        before, after = found[0][: found.start(1) - found.start()], found[0][found.end(1) - found.start() :]
        return f"{before}{max(0, int(found[1]) + change)}{after}"

    return replaced(pattern, changed, count)


def reversed_lines(pattern: str) -> Edit:
    """The lines that match are in the opposite order."""

    def edit(text: str) -> str:
        lines = text.splitlines(keepends=True)
        places = [number for number, line in enumerate(lines) if re.search(pattern, line)]
        for place, line in zip(places, [lines[number] for number in reversed(places)]):
            lines[place] = line
        return "".join(lines)

    return edit


def _both_protocols(found: re.Match[str]) -> str:
    return found[0].replace("tcp", "\0").replace("udp", "tcp").replace("\0", "udp")


_LOCK = r"-A IMDS-GUARD-L\d+ "
_LISTED = _LOCK + r".*-m owner --[ug]id-owner \S+ .*"

IPTABLES: dict[str, Edit] = {
    "an allowed user is missing": without(_LOCK + r".*--uid-owner \S+ .*-j RETURN"),
    "an allowed group is missing": without(_LOCK + r".*--gid-owner \S+ .*-j RETURN"),
    "a denied user is missing": without(_LOCK + r".*--uid-owner \S+ .*-g IMDS-GUARD-DENY"),
    "a denied group is missing": without(_LOCK + r".*--gid-owner \S+ .*-g IMDS-GUARD-DENY"),
    "an endpoint is missing": without(r"-A IMDS-GUARD-[TU] "),
    "the default is missing": without(_LOCK + r"-g IMDS-GUARD-DENY"),
    "sockets of the kernel are not denied": without(r"! --uid-owner 0-4294967294"),
    "the most specific endpoint comes last": reversed_lines(r"-A IMDS-GUARD-T "),
    "allowed before denied": moved(_LISTED + "-j RETURN", behind="imds-guard-nothing|:IMDS-GUARD-DENY.*\n"),
    "our jump is behind other rules": replaced(r"-I OUTPUT 1 ", "-A OUTPUT "),
    "the first port": changed_number(r"--dport (\d+):", 1),
    "the last port": changed_number(r"--dport \d+:(\d+)", -1),
    "a shorter prefix": changed_number(r"-d \S+/(\d+)", -1),
    "a longer prefix": changed_number(r"-d \S+/([12]?\d) ", 1),
    "the first user of a range": changed_number(r"-m owner --uid-owner (\d+)-", 1),
    "the last user of a range": changed_number(r"-m owner --uid-owner \d+-(\d+)", -1),
    "the last group of a range": changed_number(r"--gid-owner \d+-(\d+)", 1),
    "a branch of the tree": changed_number(r"-A IMDS-GUARD-L\d+-[AD]\d+ .*--uid-owner \d+-(\d+) -g ", -1, count=0),
    "users are taken for groups": replaced(r"(?<!! )--uid-owner", "--gid-owner"),
    "groups are taken for users": replaced(r"--gid-owner (\S+)( --suppl-groups)?", r"--uid-owner \1"),
    "the primary group alone": replaced(r" --suppl-groups", ""),
    "ACCEPT in place of RETURN": replaced(r"-j RETURN", "-j ACCEPT"),
    "RETURN in place of a denial": replaced(rf"({_LOCK}.*)-g IMDS-GUARD-DENY", r"\1-j RETURN"),
    "a jump in place of a goto": replaced(r"^(-A IMDS-GUARD-[TU] .*)-g ", r"\1-j ", count=0),
    "a goto in place of a jump": replaced(r"-j (IMDS-GUARD-L\d+-D0)", r"-g \1"),
    "every packet of TCP": replaced(r" -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", ""),
    "a SYN with anything else": replaced(r"--tcp-flags FIN,SYN,RST,ACK SYN", "--tcp-flags SYN SYN"),
    "TCP and UDP are mixed up": replaced(r"^-A IMDS-GUARD-[TU] .*$", _both_protocols),
    "a rejection without a reset": replaced(r"-p tcp -j REJECT --reject-with tcp-reset", "-j DROP"),
    "a denial that is not written down": replaced(r"-j LOG .*", "-j RETURN"),
    "audit mode rejects": replaced(r"-j LOG .*", "-j REJECT"),
}

MARKS: dict[str, Edit] = {
    "no mark": without(r"-j MARK"),
    "another mark": replaced(r"--set-xmark 0x696d1064", "--set-xmark 0x696d1065"),
    "ACCEPT before the mark": moved(r"-A IMDS-GUARD-DENY -j MARK", behind=r"-A IMDS-GUARD-DENY -j ACCEPT"),
    "a marked packet meets the rules of others": without(r"-A IMDS-GUARD-DENY -j ACCEPT"),
    "filter does not reject what is marked": without(r"-m mark --mark"),
    "who is let through skips the rules of others": replaced(r"-j RETURN", "-j ACCEPT"),
}
"""In mangle, and in the first rule of filter."""

CHAIN: dict[str, Edit] = {
    "behind NAT": replaced(r"priority -101", "priority -99"),
    "another mark": replaced(r"0x696d1064", "0x696d1065", count=0),
    "every packet": replaced(r"meta mark 0x696d1064 counter", "counter"),
    "no reset": without(r"reject with tcp reset"),
    "TCP alone": without(r"reject with icmpx"),
    "it drops": replaced(r"reject with tcp reset", "drop"),
}


def _in_table(table: str, edit: Edit) -> Edit:
    """The edit, in the text of one table alone."""
    return lambda text: edit(text) if text.startswith(f"*{table}\n") else text


_CALLERS = r"-A IMDS-GUARD-R\d+ .*-g IMDS-GUARD-R\d+-F\d+"

FILTERS: dict[str, Edit] = {
    "a caller of a filter is missing": without(_CALLERS),
    "the last filter comes first": reversed_lines(_CALLERS),
    "everyone, without an owner, too": replaced(r"-m owner --uid-owner 0-4294967294 (-g IMDS-GUARD-R)", r"\1"),
    "who is on a list is led, and not let through": _in_table("nat", without(r"-A IMDS-GUARD-L\d+ .*-j RETURN")),
    "to another filter": changed_number(r"--to-destination 127\.169\.\d+\.(\d+)", 1, count=0),
    "to another target": changed_number(r"--to-destination 127\.169\.(\d+)", 1, count=0),
    "to another port": changed_number(r"--to-destination \S+:(\d+)", 1, count=0),
    "to nothing": without(r"-j DNAT"),
    "direct connects": _in_table("mangle", without(r"-A IMDS-GUARD -d 127\.169\.0\.0/16")),
    "any caller at the address of a filter": _in_table("filter", without(r"-A IMDS-GUARD -d 127\.169\.0\.0/16")),
    "any filter of the target": replaced(r"-d 127\.169\.(\d+)\.\d+/32", r"-d 127.169.\1.0/24", count=0),
    "callers of a filter at the endpoint": _in_table(
        "filter", replaced(r"^(-A IMDS-GUARD-R\d+-F\d+) -g IMDS-GUARD-DENY", r"\1 -j RETURN", count=0)
    ),
    "what a filter does not serve": _in_table(
        "mangle", replaced(r"^(-A IMDS-GUARD-R\d+-F\d+) -g IMDS-GUARD-DENY", r"\1 -j RETURN", count=0)
    ),
    "no mark": without(r"-A IMDS-GUARD-LED -j MARK"),
    "a packet with the mark meets the rules of others": without(r"-A IMDS-GUARD-LED -j ACCEPT"),
    "the mark elsewhere": without(r"-m mark --mark 0x696d1066"),
    "the account of the filters is missing": without(r"-A IMDS-GUARD-R\d+ -d .*-j RETURN"),
    "the account of the filters everywhere": replaced(
        r"^(-A IMDS-GUARD-R\d+) -d \S+ -p tcp -m tcp --dport \d+ (-m owner)", r"\1 \2", count=0
    ),
    "the default behind filters": replaced(r"^(-A IMDS-GUARD-R\d+) -j RETURN$", r"\1 -g IMDS-GUARD-DENY", count=0),
    "no default behind filters": without(r"-A IMDS-GUARD-R\d+ -g IMDS-GUARD-DENY"),
}
"""Of the rules for filters, in mangle, NAT and filter."""

FORWARD: dict[str, Edit] = {
    "an address is missing": without(r"-A IMDS-FORWARD .*-d "),
    "an endpoint is missing": without(r"-A IMDS-FORWARD-P .*--dport"),
    "the first port": changed_number(r"--dport (\d+):", 1),
    "a longer prefix": changed_number(r"-d \S+/([12]?\d) ", 1),
    "TCP and UDP are mixed up": replaced(r"^-A IMDS-FORWARD-P .*-g .*$", _both_protocols),
    "a SYN alone": replaced(r"! --tcp-flags SYN,ACK SYN", "! --tcp-flags FIN,SYN,RST,ACK SYN"),
    "each packet": without(r"! --tcp-flags SYN,ACK SYN"),
    "every answer": replaced(r"--ctdir REPLY -m tcp ! --tcp-flags SYN,ACK SYN", "--ctdir REPLY"),
    "each packet is an answer": replaced(r" -m conntrack --ctdir REPLY", ""),
    "packets that conntrack does not know": without(r"--ctstate INVALID,UNTRACKED"),
    "fragments of IPv4": without(r"-A IMDS-FORWARD-E .*-p tcp -f "),
    "fragments of UDP": without(r"-A IMDS-FORWARD-E -f -j RETURN"),
    "fragments of IPv6": without(r"-m frag -g IMDS-FORWARD-F"),
    "fragments that don't tell their protocol": without(r"-A IMDS-FORWARD-F -g "),
    "fragments of other protocols": without(r"! -p tcp"),
    "fragments of UDP without a port": replaced(r"^(-A IMDS-FORWARD-U) -g IMDS-FORWARD-D", r"\1 -j RETURN"),
    "first fragments of UDP": without(r"--fragfirst"),
    "our jump is behind other rules": replaced(r"-I FORWARD 1 ", "-A FORWARD "),
    "nothing is denied": replaced(r"^(-A IMDS-FORWARD-L\d+ .*)-j DROP", r"\1-j RETURN", count=0),
    "audit mode drops": replaced(r"^(-A IMDS-FORWARD-L\d+ .*)-j RETURN", r"\1-j DROP", count=0),
    "audit mode accepts": replaced(r"^(-A IMDS-FORWARD-L\d+ .*)-j RETURN", r"\1-j ACCEPT", count=0),
}

NFT_FORWARD: dict[str, Edit] = {
    "an address is missing": replaced(r"(daddr \{ [^,}]*), [^}]* (\} goto find)", r"\1 \2"),
    "an endpoint is missing": without(r"dport .*goto lock-"),
    "the first port": changed_number(r"dport \{ (\d+)-", 1),
    "a longer prefix": changed_number(r"daddr \{ \S+/([12]?\d) ", 1),
    "TCP and UDP are mixed up": replaced(r"^.*goto lock-.*$", _both_protocols),
    "each packet": without(r"tcp flags & \(syn \| ack\) != syn accept"),
    "every answer": replaced(
        r"ct direction reply tcp flags & \(syn \| ack\) != syn accept", "ct direction reply accept"
    ),
    "each packet is an answer": replaced(r"ct direction reply ", ""),
    "packets that conntrack does not know": without(r"ct state \{ invalid, untracked \}"),
    "fragments of IPv4": without(r"ip frag-off & 0x3fff"),
    "later fragments alone": replaced(r"0x3fff", "0x1fff"),
    "fragments of UDP": without(r"ip frag-off & 0x1fff"),
    "fragments of IPv6": without(r"exthdr frag exists"),
    "fragments that don't tell their protocol": replaced(
        r"exthdr frag exists jump", "exthdr frag exists meta l4proto tcp jump"
    ),
    "fragments of other protocols": without(r"meta l4proto != \{ tcp, udp \} accept"),
    "fragments of TCP to other addresses": without(r"meta l4proto tcp ip6 daddr != .*accept"),
    "fragments of UDP without a port": replaced(r"udp dport 1-65535 return", "meta l4proto udp return"),
    "a rejection without a reset": without(r"reject with tcp reset"),
    "nothing is denied": replaced(r"counter reject with tcp reset", "counter"),
    "audit mode drops fragments": replaced(r"counter accept", "counter drop", count=0),
}

NFT: dict[str, Edit] = {
    "allowed users are missing": without(r"meta skuid \{.*\} return"),
    "allowed groups are missing": without(r"meta skgid \{.*\} return"),
    "denied users are missing": without(r"meta skuid \{.*\} goto deny"),
    "denied groups are missing": without(r"meta skgid \{.*\} goto deny"),
    "an endpoint is missing": without(r"goto lock_"),
    "the default is missing": without(r"^\t\tgoto deny"),
    "the most specific endpoint comes last": reversed_lines(r"daddr .*goto lock_"),
    "allowed before denied": moved(r"meta sk[ug]id \{.*\} return", behind="^\t\t# "),
    "sockets of the kernel are allowed": replaced(r"meta skuid 0-4294967294 return", "return"),
    "the first port": changed_number(r"dport \{ (\d+)-", 1),
    "a longer prefix": changed_number(r"daddr \S+/([12]?\d) ", 1),
    "all of IPv6 is missing": without(r"meta nfproto ipv6"),
    "the first user of a range": changed_number(r"skuid \{ (\d+)-", 1),
    "users are taken for groups": replaced(r"skuid \{", "skgid {"),
    "groups are taken for users": replaced(r"skgid \{", "skuid {"),
    "a jump in place of a goto": replaced(r"goto lock_", "jump lock_", count=0),
    "every packet of TCP": replaced(r"tcp flags .* == syn jump", "meta l4proto tcp jump"),
    "UDP is missing": without(r"jump find_udp"),
    "TCP and UDP are mixed up": replaced(r"jump find_(udp)", "jump find_tcp"),
    "a rejection without a reset": without(r"reject with tcp reset"),
    "audit mode rejects": replaced(r"log prefix .*", "reject with icmpx port-unreachable"),
}
