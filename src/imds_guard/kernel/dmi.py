# SPDX-License-Identifier: Apache-2.0
"""Reads the firmware's description of the machine (/sys/class/dmi/id, drivers/firmware/dmi-id.c in Linux)."""

from __future__ import annotations

import os

DMI_FOLDER = "/sys/class/dmi/id"

# Serial numbers and UUIDs are left out: only root may read them, and they name no cloud.
_FIELDS = (
    "sys_vendor",
    "product_name",
    "product_version",
    "product_family",
    "bios_vendor",
    "bios_version",
    "board_vendor",
    "board_name",
    "board_asset_tag",
    "chassis_vendor",
    "chassis_asset_tag",
)


def dmi_text(folder: str = DMI_FOLDER) -> str:
    """The DMI fields that name a vendor or a product, one per line; empty without DMI (arm64 without UEFI)."""
    found: list[str] = []
    for field in _FIELDS:
        try:
            with open(os.path.join(folder, field), encoding="utf-8", errors="replace") as file:
                found.append(file.read().strip())
        except OSError:
            continue
    return "\n".join(field for field in found if field)
