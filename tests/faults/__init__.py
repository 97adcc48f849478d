# SPDX-License-Identifier: Apache-2.0
"""Tests: what the guard does when the system refuses."""
