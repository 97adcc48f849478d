# SPDX-License-Identifier: Apache-2.0
"""The adversary: every way round a lock that we know, tried for real, and what comes of it."""
