# SPDX-License-Identifier: Apache-2.0
"""Where iptables decides otherwise than decide() and eBPF. Commands report it, and rows of the tests show it."""

from __future__ import annotations

from imds_guard.backends.iptables.form import Form
from imds_guard.policy.filters import targets
from imds_guard.policy.model import Policy, Protocol, Verdict

DIFFERENCES: dict[str, str] = {
    "refusal": "a denied connect ends with ECONNREFUSED, where eBPF gives EPERM",
    "opener": "the process that opened the socket is judged (its credentials at socket(2)), not the one that connects",
    "network-namespace": "only this network namespace is judged: packets of containers and others with a network of "
    "their own pass FORWARD, where no owner is known",
    "containers": "callers in containers that share this network are judged by their IDs as if they were the host's",
    "user-namespace": "a caller in a user namespace is judged by its IDs on the host, also where the default is allow",
    "udp-connect": "connect() of a UDP socket sends nothing and succeeds; its first datagram is refused",
    "unspecified": "0.0.0.0 and :: are judged by the address that the kernel chose for them, where eBPF must guess",
    "groups": "all groups of a caller are compared, however many they are",
    "rewritten": "where a DNAT or REDIRECT rule of this machine changes the address, the one from before and the new "
    "one are judged, and both must be open to the caller",
    "filter-ipv6": "callers of filters are denied at IPv6 endpoints: they are led to a filter by IPv4 alone",
    "filter-listener": "whoever has the right to bind port 169 can listen in place of a dead filter: rules can't ask "
    "which socket listens there",
    "open": "a TCP connection is judged by its first packet: one that was open before goes on",
}
"""Key -> sentence. Tests refer to the keys."""


WEAKER: dict[Form, str] = {
    Form.MANGLE: "nft does not work here, so a rule that another program puts before ours in OUTPUT lets packets pass; "
    "status names it; install nftables and start again",
    Form.FILTER: "marks do not work here, so a rule that another program puts before ours in OUTPUT lets packets pass, "
    "and a DNAT or REDIRECT rule in nat OUTPUT does, too; status names them",
}
"""What the lesser forms can't hold against."""


def notes(policy: Policy, form: Form | None = None) -> list[str]:
    """The differences that matter for this policy, and what the form of the rules that are in force can't do.

    Which errno a denied connect gets is not among them.
    """
    keys = ["opener", "network-namespace"]
    if policy.containers is Verdict.DENY:
        keys.append("containers")
    lines = [DIFFERENCES[key] for key in keys]
    lenient = sorted(lock.name for lock in policy.locks if lock.default is Verdict.ALLOW)
    if lenient:
        lines.append(
            f"lock {', '.join(map(repr, lenient))} allows by default: a listed user who may use /etc/subuid can take "
            "another ID in a user namespace and slip past its deny lists, which eBPF prevents"
        )
    if any(endpoint.ports(Protocol.UDP) for lock in policy.locks for endpoint in lock.endpoints):
        lines.append(DIFFERENCES["udp-connect"])
    if policy.filters:
        is_ipv6 = any(one.address.version == 6 for one in targets(policy))
        lines.append(DIFFERENCES["filter-listener"])
        lines += [DIFFERENCES["filter-ipv6"]] if is_ipv6 else []
    if form in WEAKER:
        lines.append(WEAKER[form])
    return [f"iptables: {line}" for line in lines]
