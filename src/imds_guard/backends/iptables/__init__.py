# SPDX-License-Identifier: Apache-2.0
"""The fallback: owner rules of iptables in the network namespace of the calling thread.

render: policy to rules, parse: rules to policy, rules: one rule as text (all pure). programs: the commands that are
here. tables: iptables-save and -restore. form: in which tables, marks: the chain of nft, output_rules: a change of all
of them as a whole; our_chains: below one anchor. strangers: what others do that ours can't stand before. probe: which
form works?
"""

from __future__ import annotations

from imds_guard.backends.iptables.backend import IptablesBackend
from imds_guard.backends.iptables.differences import DIFFERENCES

__all__ = ["DIFFERENCES", "IptablesBackend"]
