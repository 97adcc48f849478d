# SPDX-License-Identifier: Apache-2.0
"""The addresses of the table, for each of the three address families: IPv4, IPv6 and mapped IPv4."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One row of the table becomes three, one per family. Each field is an address or a prefix of that family."""

    name: str
    locked: str
    """The locked address, as the caller writes it."""
    other: str
    """A second locked address, for policies with two locks."""
    beside: str
    """The locked address plus one. It is never locked by itself."""
    wireserver: str
    loopback: str
    unspecified: str
    prefix: str
    """A prefix with ``locked`` and ``beside`` in it, as a policy writes it."""
    shorter_prefix: str
    """A shorter prefix, which covers ``prefix``."""
    everything: str
    filter_address: str = "127.169.200.7"
    """An address where no filter listens, and could. It is of IPv4 always."""


IPV4 = Family(
    name="ipv4",
    locked="169.254.169.254",
    other="169.254.170.2",
    beside="169.254.169.255",
    wireserver="168.63.129.16",
    loopback="127.0.0.1",
    unspecified="0.0.0.0",
    prefix="169.254.169.0/24",
    shorter_prefix="169.254.0.0/16",
    everything="0.0.0.0/0",
)
IPV6 = Family(
    name="ipv6",
    locked="fd00:ec2::254",
    other="fd00:ec2::23",
    beside="fd00:ec2::255",
    wireserver="fd00:16::16",
    loopback="::1",
    unspecified="::",
    prefix="fd00:ec2::/64",
    shorter_prefix="fd00:ec2::/32",
    everything="::/0",
)
MAPPED = Family(
    name="mapped",
    locked="::ffff:169.254.169.254",
    other="::ffff:169.254.170.2",
    beside="::ffff:169.254.169.255",
    wireserver="::ffff:168.63.129.16",
    loopback="::ffff:127.0.0.1",
    unspecified="::ffff:0.0.0.0",
    prefix="::ffff:169.254.169.0/120",
    shorter_prefix="::ffff:169.254.0.0/112",
    everything="0.0.0.0/0",
    filter_address="::ffff:127.169.200.7",
)
FAMILIES = (IPV4, IPV6, MAPPED)

LINK_LOCAL = "fe80::a9fe:a9fe"

# The first one becomes the primary address of lo.
ADDRESSES = (
    IPV4.locked,
    IPV4.other,
    IPV4.beside,
    IPV4.wireserver,
    IPV6.locked,
    IPV6.other,
    IPV6.beside,
    IPV6.wireserver,
    LINK_LOCAL,
    "fe80::a9fe:a9ff",
)
LOOPBACK = (IPV4.loopback, IPV6.loopback, IPV4.filter_address)
PORTS = (53, 67, 80, 169, 443, 8080, 20480)
