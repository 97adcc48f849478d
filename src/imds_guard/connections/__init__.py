# SPDX-License-Identifier: Apache-2.0
"""Connections that were opened before the policy came into force."""
