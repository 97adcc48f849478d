# SPDX-License-Identifier: Apache-2.0
"""Real clients of metadata services, through the lock and its filters: ``./run clients``, not ``./run test``."""
