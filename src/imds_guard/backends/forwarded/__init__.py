# SPDX-License-Identifier: Apache-2.0
"""Forwarded packets: rules of our own keep them from the locked endpoints, with either backend.

A machine that routes (an appliance without source/destination check, a host of containers or virtual machines) knows no
owner of such packets. So none of them may begin a connection to a locked port, whoever the policy allows. The rules are
there whether or not the machine forwards now: Docker switches that on later. ``decide_forwarded()`` says what they do.
"""

from imds_guard.backends.forwarded.forwarded import Forwarded
from imds_guard.backends.forwarded.places import Count, Counts
from imds_guard.backends.forwarded.record import DROP, LEAVE
from imds_guard.backends.forwarded.state import Forwarding, ForwardingState

__all__ = ["DROP", "LEAVE", "Count", "Counts", "Forwarded", "Forwarding", "ForwardingState"]
