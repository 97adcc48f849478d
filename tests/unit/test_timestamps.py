# SPDX-License-Identifier: Apache-2.0
"""Times of the kernel as times of day."""

from __future__ import annotations

import time

import pytest

from imds_guard.watch.timestamps import iso_time, wall_clock


def test_a_time_since_boot_is_a_time_of_day() -> None:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert abs(wall_clock(now) - time.time()) < 0.5
    assert abs(wall_clock(now - 5_000_000_000) - time.time() + 5) < 0.5


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "1970-01-01T00:00:00.000Z"), (1_795_247_999.9999, "2026-11-21T07:59:59.999Z")]
)
def test_times_are_in_utc(seconds: float, text: str) -> None:
    assert iso_time(seconds) == text
