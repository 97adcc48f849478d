# SPDX-License-Identifier: Apache-2.0
"""Values for completion in a shell: names of this machine, and what is locked now. Whatever fails offers nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Callable

from click import Context, Parameter

from imds_guard.errors import GuardError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# Modules are imported where they are used: start-up time of commands.


def by(values: Callable[[Context, Parameter, str], list[CompletionItem]]) -> dict[str, Any]:
    """The keyword of an option or argument for its values. click 7, of Debian 11, completes no values."""
    return {"shell_complete": values} if hasattr(Parameter, "shell_complete") else {}


def users(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Accounts of the files alone: a name service may be slow, and have millions."""
    return _beginning_with(incomplete, _names("user"))


def groups(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Groups of the files alone."""
    return _beginning_with(incomplete, _names("group"))


def presets(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """The sets of built-in endpoints."""
    from imds_guard.policy.builtin import PRESETS  # noqa: PLC0415

    return _beginning_with(incomplete, PRESETS)


def endpoints(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """The addresses of the built-in endpoints."""
    from imds_guard.policy.builtin import BUILT_IN  # noqa: PLC0415

    return _beginning_with(incomplete, (str(entry.address) for entry in BUILT_IN))


def locked(ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
    """The endpoints that are locked now; the built-in ones where that can't be read."""
    from imds_guard.commands.look import active_policy  # noqa: PLC0415
    from imds_guard.policy.endpoint_syntax import format_endpoint  # noqa: PLC0415

    with suppress(GuardError, OSError):
        _, policy = active_policy(ctx.params.get("cgroup"))
        return _beginning_with(
            incomplete, (text for lock in policy.locks for one in lock.endpoints for text in format_endpoint(one))
        )
    return endpoints(ctx, param, incomplete)


def cgroups(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """The cgroups of one level: those in the folder that was typed, at first the top."""
    from imds_guard.kernel.mounts import mounts  # noqa: PLC0415

    with suppress(OSError, IndexError):
        top = mounts("cgroup2")[-1].path
        folder = os.path.dirname(incomplete) if incomplete.startswith(top + "/") else top
        found = [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
        return _beginning_with(incomplete, found)
    return []


def files(_ctx: Context, _param: Parameter, incomplete: str) -> list[CompletionItem]:
    """Files, which the shell itself lists."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415

    return [CompletionItem(incomplete, type="file")]


def _names(kind: str) -> list[str]:
    from imds_guard.kernel.accounts import names_in_files  # noqa: PLC0415

    return names_in_files(kind)


def _beginning_with(incomplete: str, words: Iterable[str]) -> list[CompletionItem]:
    """An answer has a line for each word, so one with other characters than printable ones is left out."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415

    return [CompletionItem(word) for word in sorted(set(words)) if word.startswith(incomplete) and word.isprintable()]
