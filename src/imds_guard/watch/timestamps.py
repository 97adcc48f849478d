# SPDX-License-Identifier: Apache-2.0
"""Times of the kernel's records, for people."""

from __future__ import annotations

import time


def wall_clock(boot_ns: int) -> float:
    """Seconds since the epoch for a time of CLOCK_BOOTTIME, by the clocks as they are now."""
    return time.time() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - boot_ns) / 1e9


def iso_time(seconds: float) -> str:
    """Seconds since the epoch as ``2026-11-21T07:40:00.123Z``."""
    milliseconds = int(seconds * 1000)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{whole}.{milliseconds % 1000:03d}Z"


def utc_text(seconds: float) -> str:
    """Seconds since the epoch as ``2026-11-21 07:40:00 UTC``."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def iso_time_of(boot_ns: int) -> str:
    """A time of CLOCK_BOOTTIME as ``2026-11-21T07:40:00.123Z``."""
    return iso_time(wall_clock(boot_ns))
