# SPDX-License-Identifier: Apache-2.0
"""Follows denials as they happen."""
