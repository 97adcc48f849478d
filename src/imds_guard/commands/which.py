# SPDX-License-Identifier: Apache-2.0
"""Which guard a command is about: that of ``--cgroup``, else of the file's ``cgroup =``, else the machine's."""

from __future__ import annotations

import os

from imds_guard import CONFIG_PATH
from imds_guard.backends import choose
from imds_guard.errors import GuardError
from imds_guard.kernel.cgroup import is_root


def configured(cgroup: str | None, config: str | None = None) -> str | None:
    """The cgroup to guard; None for the machine. The root of the hierarchy is the machine, too.

    ``config`` is the option --config. A file that is missing, or that boot would not read, names no cgroup.
    """
    if cgroup is not None:
        return given(cgroup)
    path = CONFIG_PATH if config is None else config
    if not os.path.exists(path):
        return None
    from imds_guard.config.boot_file import cgroup_of  # noqa: PLC0415 -- start-up time: few machines name a cgroup

    return given(cgroup_of(path))


def given(cgroup: str | None) -> str | None:
    """``cgroup``, and None for the root of the hierarchy."""
    return None if cgroup is None or is_root(cgroup) else cgroup


def in_force(cgroup: str | None, config: str | None = None) -> str | None:
    """configured() for a command about what is in force.

    Where the configuration's cgroup has no guard and the machine has one, that is the one: boot puts the emergency lock
    on the machine.
    """
    found = configured(cgroup, config)
    if cgroup is not None or found is None or _has_guard(found):
        return found
    return None if _has_guard(None) else found


def _has_guard(cgroup: str | None) -> bool:
    """False also where it can't be asked, as for a cgroup that does not exist."""
    try:
        return bool(choose.running(cgroup))
    except GuardError:
        return False
