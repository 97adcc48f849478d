# SPDX-License-Identifier: Apache-2.0
"""What can go wrong outside a guest. What goes wrong inside one is a result, not an error."""

from __future__ import annotations


class MatrixError(Exception):
    """The matrix could not be prepared or read; the text is one sentence for whoever ran it."""
