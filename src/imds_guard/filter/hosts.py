# SPDX-License-Identifier: Apache-2.0
"""The names by which clients call a metadata service."""

from __future__ import annotations

from imds_guard.policy.filters import Target

_NAMES = (
    # https://cloud.google.com/compute/docs/metadata/overview; the short names: google-auth, compute/_metadata.py
    *("metadata.google.internal", "metadata.google.internal.", "metadata.goog", "metadata"),
    # EC2's resolver has a name for it: https://forums.aws.amazon.com/thread.jspa?threadID=17126
    *("instance-data", "instance-data.ec2.internal"),
    # https://www.tencentcloud.com/document/product/213/4934
    "metadata.tencentyun.com",
)


def host_names(target: Target) -> frozenset[str]:
    """What Host may say, in lower case: the address or a known name, with or without the port."""
    literal = f"[{target.address}]" if target.address.version == 6 else str(target.address)
    names = (literal, *_NAMES)
    return frozenset((*names, *(f"{name}:{target.port}" for name in names)))


def host_header(target: Target) -> str:
    """What Host says to the metadata service."""
    literal = f"[{target.address}]" if target.address.version == 6 else str(target.address)
    return literal if target.port == 80 else f"{literal}:{target.port}"
