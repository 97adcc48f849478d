# SPDX-License-Identifier: Apache-2.0
"""Fuzzing: readers get input that nobody wrote for them."""
