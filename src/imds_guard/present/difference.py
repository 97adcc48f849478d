# SPDX-License-Identifier: Apache-2.0
"""What a command changes, as text and as JSON."""

from __future__ import annotations

from typing import Any

from imds_guard.identity import group_name, user_name
from imds_guard.policy.difference import Difference, ListChange
from imds_guard.policy.difference_pairs import Endpoints
from imds_guard.policy.difference_text import Names, difference_lines
from imds_guard.policy.endpoint_syntax import format_endpoint
from imds_guard.present.policy import identities_values
from imds_guard.present.wrap import named, wrapped


def names_of_both() -> Names:
    """Names with IDs, as the accounts of this machine have them."""
    return Names(lambda uid: named(uid, user_name(uid)), lambda gid: named(gid, group_name(gid)))


def change_lines(found: Difference | None) -> list[str]:
    """A line for each change. None where the policy before could not be read, of which a warning tells."""
    return (
        []
        if found is None
        else [part for line in difference_lines(found, names_of_both()) for part in wrapped("", line, "    ")]
    )


def difference_values(found: Difference | None) -> dict[str, Any] | None:
    """The same as plain values for JSON; None where the policy before could not be read."""
    if found is None:
        return None
    return {
        "locked": _texts(found.locked),
        "unlocked": _texts(found.unlocked),
        "lists": [_list_values(one) for one in found.lists],
        "others": [
            {"before": one.before.value, "after": one.after.value, "endpoints": _texts(one.endpoints)}
            for one in found.others
        ],
        "settings": {one.name: {"before": one.before, "after": one.after} for one in found.settings},
        "filters": {
            "added": list(found.filters_added),
            "removed": list(found.filters_removed),
            "changed": list(found.filters_changed),
        },
        "many_groups": _texts(found.many_groups),
        "locks_less": bool(found.opening),
    }


def _list_values(one: ListChange) -> dict[str, Any]:
    return {
        "list": one.kind,
        "change": "added" if one.added else "removed",
        "endpoints": None if one.endpoints is None else _texts(one.endpoints),
        **identities_values(one.who),
    }


def _texts(endpoints: Endpoints) -> list[str]:
    return [text for endpoint in endpoints for text in format_endpoint(endpoint)]
