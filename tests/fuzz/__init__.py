# SPDX-License-Identifier: Apache-2.0
"""Tests: readers that are fed with what nobody wrote for them."""
