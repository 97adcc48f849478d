# SPDX-License-Identifier: Apache-2.0
"""Denials as they happen."""
