# SPDX-License-Identifier: Apache-2.0
"""Tests: every way around a lock that we know, tried for real."""
