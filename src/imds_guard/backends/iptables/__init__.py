# SPDX-License-Identifier: Apache-2.0
"""The fallback: owner rules of iptables in the network namespace of the calling thread.

render: Policy -> rules (pure). parse: rules -> Policy (pure). tables: iptables-save and -restore. probe: does it work?
"""

from __future__ import annotations

from imds_guard.backends.iptables.backend import IptablesBackend
from imds_guard.backends.iptables.differences import DIFFERENCES

__all__ = ["DIFFERENCES", "IptablesBackend"]
