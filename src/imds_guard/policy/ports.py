# SPDX-License-Identifier: Apache-2.0
"""Sets of ports as ranges: normal form, difference, intersection, membership."""

from __future__ import annotations

from collections.abc import Iterable

from imds_guard.errors import BadPolicy

Ports = tuple[tuple[int, int], ...]
"""Disjoint inclusive ranges in ascending order, never adjacent; ports in host byte order."""

NO_PORTS: Ports = ()
ALL_PORTS: Ports = ((0, 65535),)


def normal_ports(ranges: Iterable[tuple[int, int]]) -> Ports:
    """The same ports in normal form: disjoint ascending ranges that do not touch. Raises BadPolicy."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if not 0 <= low <= high <= 65535:
            raise BadPolicy(f"{low}-{high} is not a range of ports")
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def minus_ports(ports: Ports, removed: Ports) -> Ports:
    """The ports of ``ports`` that are not in ``removed``."""
    rest = list(ports)
    for low, high in removed:
        split: list[tuple[int, int]] = []
        for a, b in rest:
            if b < low or a > high:
                split.append((a, b))
                continue
            if a < low:
                split.append((a, low - 1))
            if b > high:
                split.append((high + 1, b))
        rest = split
    return tuple(rest)


def common_ports(one: Ports, other: Ports) -> Ports:
    """The ports that are in both."""
    return minus_ports(one, minus_ports(one, other))


def has_port(ports: Ports, port: int) -> bool:
    """True when ``port`` is in one of the ranges."""
    return any(low <= port <= high for low, high in ports)
