# SPDX-License-Identifier: Apache-2.0
"""The end of each backend, after all its other tests."""

from __future__ import annotations

from vagrant.guest.world import INACTIVE, STRANGER, command, done, everywhere, left, reach


def test_stop(backend: str) -> None:
    """Everybody can connect again, and nothing of imds-guard is left."""
    done("stop")
    assert command("status").returncode == INACTIVE
    assert reach(STRANGER) == everywhere("connected")
    assert left() == []
