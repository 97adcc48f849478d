# SPDX-License-Identifier: Apache-2.0
"""Where the listeners of filters are: 127.169.T.F, port 169. T is the number of the target, F that of the filter.

The address says who connects and where to, so that no record of a connection is needed. filter_numbers.py hands the
numbers out.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from imds_guard.policy.filters import FILTER_NETWORK, FILTER_PORT, Target
from imds_guard.policy.model import Address, Protocol


def listener_address(target: int, number: int) -> ipaddress.IPv4Address:
    """127.169.T.F."""
    return FILTER_NETWORK[target << 8 | number]


def numbers_in(address: Address) -> tuple[int, int]:
    """T and F of the address of a listener."""
    return int(address) >> 8 & 0xFF, int(address) & 0xFF


def is_filter_address(address: Address, port: int, protocol: Protocol) -> bool:
    """True for the place of a listener. An IPv4-mapped address is not one: pass unmapped() addresses."""
    return address.version == 4 and address in FILTER_NETWORK and port == FILTER_PORT and protocol is Protocol.TCP


class Listener(NamedTuple):
    """What has to listen for one filter and one target, under the policy in force."""

    target: Target
    filter: str
    """Its name."""
    digest: int
    """Of the target and the rules: the mark that the listening socket needs."""
    target_number: int
    """T."""
    number: int
    """F."""

    @property
    def address(self) -> ipaddress.IPv4Address:
        """127.169.T.F."""
        return listener_address(self.target_number, self.number)
