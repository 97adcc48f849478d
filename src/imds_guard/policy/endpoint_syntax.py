# SPDX-License-Identifier: Apache-2.0
"""The syntax of an ENDPOINT argument: ``ADDR[/LEN][:PORTS][,PROTOCOL]`` or ``[V6][/LEN][:PORTS][,PROTOCOL]``.

PORTS is ``*``, or ports and ranges joined by ``+`` (``80``, ``80+443``, ``8000-8100``), or ``!`` before such a list for
all other ports. PROTOCOL is tcp, udp or any. Without ports, a built-in address has the ports of the built-in table
(TCP, without DNS and DHCP). Otherwise, no ports means all ports, and no protocol means TCP and UDP.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from imds_guard.errors import BadPolicy
from imds_guard.policy.builtin import builtin, builtin_at
from imds_guard.policy.model import Address, Endpoint, Network, Protocol
from imds_guard.policy.ports import ALL_PORTS, NO_PORTS, Ports, has_port, minus_ports, normal_ports
from imds_guard.text import host_port

_BRACKETED = r"\[([^\[\]]*)\](?:/([^:]*))?(?::(.*))?"
_DECIMAL = r"0|[1-9][0-9]{0,9}"
_LEADING_ZERO = r"(?:^|[.:])0[0-9]+(?:\.[0-9]+)+|[0-9]\.0[0-9]"
_PROTOCOLS = ("tcp", "udp", "any")


def parse_endpoint(text: str) -> Endpoint:
    """The endpoint that ``text`` means. Raises BadPolicy: one sentence that quotes ``text``."""
    try:
        return _parse(text)
    except _NotAnEndpoint as error:
        raise BadPolicy(f"{text!r} is not an endpoint: {error}") from None


_WEB_PORTS = ("80", "443", "8080", "8443")


def doubts_about(texts: Iterable[str]) -> list[str]:
    """A sentence for each IPv6 address without brackets whose end may be meant as a port: ``fd00::1:80``."""
    found = []
    for text in texts:
        address, _, last = text.partition(",")[0].rpartition(":")
        if "::" in address and last in _WEB_PORTS and not address.startswith("["):
            found.append(f"{text!r} was taken as an address without a port; for port {last} write [{address}]:{last}")
    return found


class _NotAnEndpoint(ValueError):
    """The reason, as the second half of a sentence."""


def _parse(text: str) -> Endpoint:
    if not text:
        raise _NotAnEndpoint("it is empty")
    if any(character.isspace() for character in text):
        raise _NotAnEndpoint("it contains white space")
    head, protocol = _split_protocol(text)
    address_text, length_text, ports_text = _split_head(head)
    network = _network(address_text, length_text)
    if network.prefixlen == network.max_prefixlen and int(network.network_address) == 0:
        raise _NotAnEndpoint(
            "the unspecified address can't be locked: a connect to it goes to this machine, and the address that it "
            "reaches there is checked"
        )
    entry = builtin_at(network)
    if ports_text is None and entry is not None:
        ports, protocol = entry.endpoint.tcp, protocol or "tcp"
    else:
        ports = ALL_PORTS if ports_text is None else _ports(ports_text)
    return Endpoint(
        network,
        tcp=NO_PORTS if protocol == "udp" else ports,
        udp=NO_PORTS if protocol == "tcp" else ports,
    )


def _split_protocol(text: str) -> tuple[str, str | None]:
    head, comma, protocol = text.partition(",")
    if not comma:
        return head, None
    if protocol not in _PROTOCOLS:
        raise _NotAnEndpoint(f"{protocol!r} is not a protocol (tcp, udp or any)")
    return head, protocol


def _split_head(head: str) -> tuple[str, str | None, str | None]:
    """(address, length, ports); length and ports are None when they are absent."""
    if head.startswith("["):
        return _split_bracketed(head)
    if head.count(":") >= 2:
        return _split_bare_v6(head)
    prefix, colon, ports = head.partition(":")
    address, slash, length = prefix.partition("/")
    return address, length if slash else None, ports if colon else None


def _split_bracketed(head: str) -> tuple[str, str | None, str | None]:
    match = re.fullmatch(_BRACKETED, head)
    if match is None:
        raise _NotAnEndpoint("only /LENGTH and :PORTS may follow the brackets, as in [fd00:ec2::254]:80")
    if ":" not in match[1]:
        raise _NotAnEndpoint("brackets are for IPv6 addresses only")
    return match[1], match[2], match[3]


def _split_bare_v6(head: str) -> tuple[str, str | None, str | None]:
    """An IPv6 address without brackets, which has no ports. Ports are refused where they can be recognised as such."""
    address, slash, length = head.partition("/")
    if ":" in length:
        length, _, ports = length.partition(":")
        raise _NotAnEndpoint(f"an IPv6 address with ports needs brackets: [{address}]/{length}:{ports}")
    before, _, last = address.rpartition(":")
    if _is_builtin(before):
        raise _NotAnEndpoint(f"an IPv6 address with ports needs brackets: [{before}]:{last}")
    return address, length if slash else None, None


def _is_builtin(text: str) -> bool:
    try:
        return builtin(ipaddress.ip_address(text)) is not None
    except ValueError:
        return False


def _network(address_text: str, length_text: str | None) -> Network:
    address = _address(address_text)
    length = address.max_prefixlen if length_text is None else _length(length_text, address)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if mapped is not None and length >= 96:
        address, length = mapped, length - 96
    network: Network
    if isinstance(address, ipaddress.IPv4Address):
        network = ipaddress.IPv4Network((int(address), length), strict=False)
    else:
        network = ipaddress.IPv6Network((int(address), length), strict=False)
    if network.network_address != address:
        raise _NotAnEndpoint(
            f"{address} has bits set after its prefix: write {network} for the whole prefix, {address} for the address"
        )
    return network


def _address(text: str) -> Address:
    if not text:
        raise _NotAnEndpoint("the address is missing")
    if "%" in text:
        raise _NotAnEndpoint("an address is locked on every interface: leave out the scope (%...)")
    # Python 3.9.0 to 3.9.4 read leading zeros as decimal; the C library reads them as octal (CVE-2021-29921).
    if re.search(_LEADING_ZERO, text) and "." in text:
        raise _NotAnEndpoint("a number with a leading zero is octal to some programs and decimal to others")
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise _NotAnEndpoint(f"{text!r} is not an IP address (host names are not looked up)") from None


def _length(text: str, address: Address) -> int:
    if re.fullmatch(_DECIMAL, text) is None or int(text) > address.max_prefixlen:
        raise _NotAnEndpoint(f"{text!r} is not a prefix length (0 to {address.max_prefixlen})")
    return int(text)


def _ports(text: str) -> Ports:
    if text == "*":
        return ALL_PORTS
    negated = text.startswith("!")
    listed = normal_ports(_range(item) for item in (text[1:] if negated else text).split("+"))
    ports = minus_ports(ALL_PORTS, listed) if negated else listed
    if not ports:
        raise _NotAnEndpoint("no port is left")
    return ports


def _range(item: str) -> tuple[int, int]:
    low, dash, high = item.partition("-")
    first = _port(low)
    last = _port(high) if dash else first
    if last < first:
        raise _NotAnEndpoint(f"the range of ports {item} runs backwards")
    return first, last


def _port(text: str) -> int:
    if re.fullmatch(_DECIMAL, text) is None or int(text) > 65535:
        raise _NotAnEndpoint(f"{text!r} is not a port (80, 80+443, 8000-8100, !53 or *)")
    return int(text)


# --- endpoints as text ----------------------------------------------------------------------------------------------


def format_endpoint(endpoint: Endpoint) -> list[str]:
    """The arguments that mean ``endpoint``: one, or one for each protocol when their ports differ."""
    entry = builtin_at(endpoint.network)
    if entry is not None and entry.endpoint == endpoint:
        return [_format_address(endpoint.network, "")]
    all_ports = "" if entry is None else ":*"
    if endpoint.tcp == endpoint.udp:
        return [_format_address(endpoint.network, format_ports(endpoint.tcp, all_ports))]
    return [
        _format_address(endpoint.network, format_ports(ports, all_ports)) + "," + protocol
        for ports, protocol in ((endpoint.tcp, "tcp"), (endpoint.udp, "udp"))
        if ports
    ]


def endpoint_argument(address: Address, port: int, protocol: Protocol | None = None) -> str:
    """The shortest argument for an address that has this port: DNS, for example, is not among a built-in one's."""
    text = str(address)
    ports = parse_endpoint(text).ports(protocol or Protocol.TCP)
    if has_port(ports, port):
        return text
    return host_port(address, port) + ("" if protocol is None else f",{protocol.value}")


def format_ports(ports: Ports, all_ports: str = ":*") -> str:
    """``:80+443`` or ``:!53``, whichever has fewer parts; the text ``all_ports`` for all ports."""
    if ports == ALL_PORTS:
        return all_ports
    others = minus_ports(ALL_PORTS, ports)
    sign, shown = ("!", others) if len(others) < len(ports) else ("", ports)
    return ":" + sign + "+".join(str(low) if low == high else f"{low}-{high}" for low, high in shown)


def _format_address(network: Network, ports: str) -> str:
    address = str(network.network_address)
    length = "" if network.prefixlen == network.max_prefixlen else f"/{network.prefixlen}"
    if network.version == 6 and ports:
        address = f"[{address}]"
    return address + length + ports
