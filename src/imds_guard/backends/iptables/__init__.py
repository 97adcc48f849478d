# SPDX-License-Identifier: Apache-2.0
"""The fallback: owner rules of iptables in the network namespace of the calling thread.

render: policy to rules, parse: rules to policy, rules: one rule as text (all pure). programs: the commands that are
here. tables: iptables-save and -restore. our_chains: a change as a whole. probe: do owner rules work?
"""

from __future__ import annotations

from imds_guard.backends.iptables.backend import IptablesBackend
from imds_guard.backends.iptables.differences import DIFFERENCES

__all__ = ["DIFFERENCES", "IptablesBackend"]
