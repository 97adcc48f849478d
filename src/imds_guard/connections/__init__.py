# SPDX-License-Identifier: Apache-2.0
"""Connections that are older than the policy."""
