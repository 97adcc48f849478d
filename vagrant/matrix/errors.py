# SPDX-License-Identifier: Apache-2.0
"""Errors outside a guest. A failure inside a guest is a result, not an error."""

from __future__ import annotations


class MatrixError(Exception):
    """The matrix could not be prepared or read. The text is one sentence for the person who ran it."""
