# SPDX-License-Identifier: Apache-2.0
"""Rules as text, run by interpreters of iptables and nft, and compared with ``decide()``."""
