# SPDX-License-Identifier: Apache-2.0
"""read_packet(): what counts of a packet, row by row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.policy.model import Protocol
from imds_guard.policy.packet import ETHERTYPE_IPV4, ETHERTYPE_IPV6, ROUTING, Fragment, Packet, read_packet
from tests.packet_rows import (
    DATAGRAM,
    FIRST_HEADER,
    FROM4,
    FROM6,
    IPV4,
    IPV6,
    LATER,
    OTHER,
    SEGMENT_ROUTING,
    TO4,
    TO6,
    UNREADABLE,
    ipv4,
    ipv6,
)
from tests.packets import ACK, SYN, UDP, Ipv6, extension, tcp


def described(packet: Packet | None) -> str:
    """A packet in the words of tests/packet_rows.py."""
    if packet is None:
        return "no IP packet"
    if packet.fragment is Fragment.LATER:
        return LATER
    if not packet.readable:
        return UNREADABLE
    if packet.protocol is None:
        return OTHER
    flags = f", flags {packet.tcp_flags:#04x}" if packet.protocol is Protocol.TCP else ""
    first = "first fragment: " if packet.fragment is Fragment.FIRST else ""
    return f"{first}{packet.protocol.value} {packet.source_port} > {packet.destination_port}{flags}"


@pytest.mark.parametrize("row", IPV4)
def test_ipv4(row: str) -> None:
    data, expected = IPV4[row]
    assert described(read_packet(ETHERTYPE_IPV4, data)) == expected


@pytest.mark.parametrize("row", IPV6)
def test_ipv6(row: str) -> None:
    data, expected = IPV6[row]
    assert described(read_packet(ETHERTYPE_IPV6, data)) == expected


@pytest.mark.parametrize("ethertype", [0, 0x0806, 0x0008, 0xDD86, 0x88CC])
def test_what_is_not_ip_has_no_address(ethertype: int) -> None:
    assert read_packet(ethertype, ipv4()) is None
    assert read_packet(ethertype, ipv6()) is None


def test_the_addresses_are_those_of_the_ip_header() -> None:
    """Not those of a routing header. An IPv4-mapped address is the IPv4 address."""
    assert read_packet(ETHERTYPE_IPV4, ipv4()) == Packet(
        FROM4, TO4, protocol=Protocol.TCP, source_port=40_000, destination_port=80, tcp_flags=SYN
    )
    routed = read_packet(ETHERTYPE_IPV6, ipv6(extension(ROUTING, 2, SEGMENT_ROUTING), payload=tcp(1, 2, ACK)))
    assert routed == Packet(FROM6, TO6, protocol=Protocol.TCP, source_port=1, destination_port=2, tcp_flags=ACK)
    mapped = Ipv6(FROM6.packed, bytes(10) + b"\xff\xff" + TO4.packed, UDP).packet(DATAGRAM)
    read = read_packet(ETHERTYPE_IPV6, mapped)
    assert read is not None
    assert read.destination == TO4


def test_an_unreadable_packet_keeps_what_was_read() -> None:
    assert read_packet(ETHERTYPE_IPV4, ipv4(UDP, b"")) == Packet(FROM4, TO4, readable=False, protocol=Protocol.UDP)
    first = read_packet(ETHERTYPE_IPV6, ipv6(FIRST_HEADER, payload=b""))
    assert first == Packet(FROM6, TO6, Fragment.FIRST, readable=False, protocol=Protocol.TCP)


@given(st.sampled_from((ETHERTYPE_IPV4, ETHERTYPE_IPV6)), st.binary(max_size=120))
def test_any_bytes_are_read(ethertype: int, data: bytes) -> None:
    packet = read_packet(ethertype, data)
    assert (packet is None) == (len(data) < (20 if ethertype == ETHERTYPE_IPV4 else 40))


@given(st.sampled_from([*IPV4.values(), *IPV6.values()]), st.data())
def test_cutting_a_packet_never_shows_another_port(row: tuple[bytes, str], data: st.DataObject) -> None:
    """A packet that is cut short is the same packet, or says less."""
    whole = row[0]
    ethertype = ETHERTYPE_IPV4 if whole in (one for one, _ in IPV4.values()) else ETHERTYPE_IPV6
    full, cut = read_packet(ethertype, whole), read_packet(ethertype, whole[: data.draw(st.integers(0, len(whole)))])
    if cut is not None and full is not None and cut.readable:
        assert cut.protocol in (full.protocol, None)
        assert cut.destination_port == full.destination_port
