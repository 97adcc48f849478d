# SPDX-License-Identifier: Apache-2.0
"""Attacks on filters: by their callers, and by others who want what a filter gives."""

from __future__ import annotations

from tests.adversary.model import Attack, Verdict

ATTACKS = (
    Attack(
        "filter-direct",
        "A connect to where a filter listens (127.169.T.F port 169): by its own callers, by others, mapped to IPv6, by "
        "`0.0.0.0` and `::`, by Fast Open",
        Verdict.BLOCKED,
        "These addresses are locked for everyone, root too. The hooks lead a caller there after they have judged it.",
        test="kernel/test_redirect.py",
    ),
    Attack(
        "filter-squatter",
        "Somebody else who listens at port 169, with `CAP_NET_BIND_SERVICE`: at the same address, at all addresses, on "
        "the interface `lo`, bound before the filter",
        Verdict.BLOCKED,
        "Each connect asks whether the socket that listens has the mark that root gave to the filter's.",
        test="kernel/test_redirect.py",
    ),
    Attack(
        "filter-killed",
        "Connects while the filter is killed (`kill -9`), starts, and gets other rules: 50 callers, with new "
        "connections and kept ones",
        Verdict.BLOCKED,
        "Without a listener that has the rules in force a caller is denied. Nothing falls back to a direct connection.",
        test="filter/test_under_load.py",
    ),
    Attack(
        "filter-orphan",
        "A process that holds the listener of a filter that has ended, such as a forked child",
        Verdict.BLOCKED,
        "Callers wait, and get nothing. `status` says so. systemd ends all processes of the service "
        "(`KillMode=control-group`).",
        test="filter/test_attacks.py",
    ),
    Attack(
        "filter-kept",
        "A connection that was opened under other rules and is kept open (keep-alive)",
        Verdict.BLOCKED,
        "A rule that changes gets a new listener, and the connections of the old one end after the response that is "
        "under way.",
        test="filter/test_attacks.py",
    ),
    Attack(
        "filter-socket",
        "Other kinds of sockets, and options: IPv4 mapped to IPv6, MPTCP, Fast Open, `SO_BINDTODEVICE`, `SO_MARK`, "
        "`IP_OPTIONS`, the source address of the endpoint or of a filter",
        Verdict.BLOCKED,
        "Each connect is led to the filter, or denied. A socket that is bound to an interface can't be led there.",
        test="filter/test_attacks.py",
    ),
    Attack(
        "filter-packets",
        "Raw sockets with `CAP_NET_RAW`: a connection made by hand, with IP options, in fragments, the later one first",
        Verdict.STRICT,
        "No connect happens, so nothing is led to a filter. Their packets are those of a socket that was not approved.",
        test="filter/test_attacks.py",
    ),
    Attack(
        "filter-namespace",
        "Another network namespace, with a listener of one's own at the address of a filter",
        Verdict.BLOCKED,
        "The hooks look for the listener in the network namespace of the caller, and that one has no mark.",
        test="filter/test_attacks.py",
    ),
    Attack(
        "filter-second-connect",
        "A socket that a caller of a filter has connected and disconnected, connected again by somebody else",
        Verdict.BLOCKED,
        "Every call of `connect` is judged anew. The mark of a filtered socket is good for its filter alone.",
        test="kernel/test_redirect.py",
    ),
    Attack(
        "filter-smuggling",
        "Requests that two servers read differently: `Transfer-Encoding`, two lengths, folded lines, dot segments, "
        "encoded slashes, other names for the method and the path",
        Verdict.BLOCKED,
        "Such requests are refused. What is passed on is a new request, made from the parts that were judged.",
        test="filter/test_corpus.py",
    ),
    Attack(
        "filter-any-bytes",
        "Any bytes at all, in any pieces",
        Verdict.BLOCKED,
        "Whatever was sent, each request that the metadata service receives is one that the rules allow.",
        test="filter/test_property.py",
    ),
    Attack(
        "filter-terminal",
        "Escapes for terminals in requests, and in responses of the metadata service",
        Verdict.BLOCKED,
        "Records have only what was parsed. No answer of the filter, no log, no line of `watch` or `report` has them.",
        test="filter/test_hostile_text.py",
    ),
    Attack(
        "filter-neighbour",
        "A machine on the same network that reaches the addresses of filters (`route_localnet=1`)",
        Verdict.BLOCKED,
        "The filter closes what does not come by the interface `lo`.",
        test="filter/test_arrival.py",
    ),
)
