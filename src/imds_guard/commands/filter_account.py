# SPDX-License-Identifier: Apache-2.0
"""The account that the filters run as. A package makes it; install-service --filter makes it elsewhere."""

from __future__ import annotations

from imds_guard.errors import GuardError, Unsupported
from imds_guard.kernel import accounts
from imds_guard.kernel.run import run
from imds_guard.policy.filters import FILTER_USER

_HOME, _SHELL, _COMMENT = "/nonexistent", "/usr/sbin/nologin", "filter of imds-guard"


def make() -> list[str]:
    """Makes the account unless it exists. Returns what was done. Raises GuardError."""
    if accounts.user_by_name(FILTER_USER) is not None:
        return []
    if accounts.other_root() is not None:
        raise Unsupported(
            f"making the account {FILTER_USER}: names are those below {accounts.other_root()}; make it there"
        )
    done = run(
        [
            *("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", _HOME),
            *("--shell", _SHELL, "--comment", _COMMENT, FILTER_USER),
        ]
    )
    if done.status != 0:
        raise GuardError(f"useradd could not make the account {FILTER_USER}: {done.complaint}")
    return [f"made the account {FILTER_USER}"]


def remove() -> list[str]:
    """Removes the account if there is one. No file belongs to it. Returns what was done. Raises GuardError."""
    if accounts.user_by_name(FILTER_USER) is None or accounts.other_root() is not None:
        return []
    done = run(["userdel", FILTER_USER])
    if done.status != 0:
        raise GuardError(f"userdel could not remove the account {FILTER_USER}: {done.complaint}")
    run(["groupdel", FILTER_USER])  # where userdel leaves it: USERGROUPS_ENAB in login.defs(5)
    return [f"removed the account {FILTER_USER}"]
