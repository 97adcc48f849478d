# SPDX-License-Identifier: Apache-2.0
"""``--save``: the policy in force, written to the configuration for the next boot."""

from __future__ import annotations

import os

from imds_guard.backends import choose
from imds_guard.commands import preflight, temporary
from imds_guard.commands.options import GuardOptions
from imds_guard.commands.turn import lock_name
from imds_guard.config.read import Config, load_config
from imds_guard.config.store import check_saving_to, save_config
from imds_guard.errors import BadPolicy, GuardError
from imds_guard.policy.emergency import is_emergency
from imds_guard.policy.model import Policy


def check_saving(policy: Policy, without_root: bool, path: str) -> None:
    """Raises GuardError unless save() would succeed and the next boot shut out no installed metadata client."""
    if is_emergency(policy):
        raise BadPolicy("saving the policy in force: it is the emergency lock; correct the configuration instead")
    check_saving_to(path)
    check_next_boot(policy, without_root)


def check_next_boot(policy: Policy, without_root: bool) -> None:
    """Raises BadPolicy when ``policy`` would shut an installed metadata client out, unless ``without_root``."""
    shut_out = [] if without_root else preflight.installed_shut_out(policy)
    if shut_out:
        names = "; ".join(f"{one.name} {one.why}" for one in shut_out)
        raise BadPolicy(
            f"keeping the policy for the next boot: it would shut out {names}; allow the account, or add --without-root"
        )


def save(policy: Policy, options: GuardOptions, path: str) -> str:
    """Writes the policy in force to ``path`` and its drop-ins, and says where it stands now.

    Options that are not given keep what the file says.

    What ``allow --for`` has allowed is left out: it ends.
    """
    try:
        policy = temporary.without(policy, temporary.rights(lock_name(options.cgroup)))
        kept = load_config(path, use_stored_ids=True) if os.path.exists(path) else Config(policy)
        cgroup = options.cgroup or kept.cgroup
        wanted = kept._replace(
            policy=policy,
            backend=kept.backend if options.backend == choose.AUTO else options.backend,
            cgroup=cgroup,
            forwarded=None if cgroup is not None else options.forwarded or kept.forwarded,
            resolve_groups=options.resolve_groups or kept.resolve_groups,
        )
        written = save_config(wanted, path, options.presets)
    except GuardError as error:
        raise GuardError(f"saving the policy, which is in force until the next boot: {error}") from error
    return f"saved the policy to {' and '.join(written or [path])}"


def not_saved(path: str, advice: str = "; --save keeps it") -> str:
    """How long a policy holds that was not saved, as a sentence."""
    if os.path.exists(path):
        return f"not saved: it holds until {path} is loaded again (boot, reload, restart, upgrade){advice}"
    return f"not saved, and there is no {path}: it holds until the next boot{advice}"
