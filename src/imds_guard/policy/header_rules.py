# SPDX-License-Identifier: Apache-2.0
"""Built-in checks of headers, which keep out requests that a program was tricked into (SSRF)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Headers = Sequence[tuple[str, str]]
"""Names in lower case, and values without white space around them, in the order of the request."""

EC2_METADATA_FILTER = "ec2-metadata-filter"
HEADER_RULES = (EC2_METADATA_FILTER,)

USER_AGENTS = ("aws-chalice/", "aws-cli/", "aws-sdk-", "Boto3/", "Botocore/", "Cloud-Init/")
"""Source: https://github.com/stefansundin/ec2-metadata-filter at 1f09506, main.go. Earlier versions lack the last."""

IMDSV2_TOKEN = "x-aws-ec2-metadata-token"  # noqa: S105 -- the name of a header
"""Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-v2-how-it-works.html."""


class HeaderRefusal(NamedTuple):
    """The rule that refused a request by its headers."""

    rule: str


def values_of(headers: Headers, name: str) -> list[str]:
    """The values of all lines with this name."""
    return [value for key, value in headers if key == name]


def check_ec2_metadata_filter(headers: Headers, user_agents: Sequence[str]) -> HeaderRefusal | None:
    """The rules of ec2-metadata-filter, in its order: X-Forwarded-For, Metadata-Flavor, then User-Agent.

    The original looks at the first line of each header. Here a header that it looks at and that comes twice is refused,
    so that no other server can mean another line. docs/filter.md has the table.
    """
    forwarded = values_of(headers, "x-forwarded-for")
    if len(forwarded) > 1 or any(forwarded):
        return HeaderRefusal("X-Forwarded-For")
    flavor = values_of(headers, "metadata-flavor")
    agent = values_of(headers, "user-agent")
    if len(flavor) > 1:
        return HeaderRefusal("Metadata-Flavor")
    if flavor == ["Amazon"]:
        return None
    if len(agent) == 1 and agent[0].startswith(tuple(user_agents or USER_AGENTS)):
        return None
    return HeaderRefusal("User-Agent")
