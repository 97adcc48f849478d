# SPDX-License-Identifier: Apache-2.0
"""The capabilities that each command needs (capabilities(7)): the smallest set with which it works.

Held by tests/system/test_privilege.py: with these alone a command works, and without any one of them it is refused.

Some commands do more with further capabilities, and without them print what they could not do. CAP_SYS_PTRACE and
CAP_DAC_READ_SEARCH find the processes that hold a connection, and their network namespaces. CAP_SETGID, CAP_SETUID and
CAP_KILL try whether iptables matches groups. iptables-legacy needs CAP_NET_RAW. The systemd units grant all of these.
"""

from __future__ import annotations

import os

from imds_guard.errors import NotPermitted
from imds_guard.kernel.privileges import (
    CAP_BPF,
    CAP_DAC_OVERRIDE,
    CAP_KILL,
    CAP_NET_ADMIN,
    CAP_NET_BIND_SERVICE,
    CAP_SETGID,
    CAP_SETUID,
    CAP_SYS_ADMIN,
    missing_capabilities,
)

Capabilities = tuple[int, ...]

# CAP_SYS_ADMIN opens programs, links and maps by ID (bpf_prog_get_fd_by_id() in Linux accepts nothing less), by which
# every command finds out which of the attached programs are ours. It includes CAP_BPF and CAP_PERFMON.
# CAP_NET_ADMIN attaches programs, reads and writes iptables rules, and ends connections.
_GUARDING: Capabilities = (CAP_NET_ADMIN, CAP_SYS_ADMIN)

REQUIRED: dict[str, Capabilities] = {
    **dict.fromkeys(("start", "stop", "allow", "revoke", "mode", "verify", "ip-lockdown"), _GUARDING),
    **dict.fromkeys(("status", "check", "explain", "export", "report", "metrics"), _GUARDING),
    # It opens pinned maps alone. Before Linux c8644cd0efe7 ("bpf: refine kernel.unprivileged_bpf_disabled behaviour")
    # (in v5.19) every use of bpf(2) needs CAP_BPF where that sysctl is set.
    "watch": (CAP_BPF,),
    # It makes a cgroup in the topmost directory (whose mode denies writing), acts as other users and serves port 80.
    "demo": (*_GUARDING, CAP_DAC_OVERRIDE, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_NET_BIND_SERVICE),
    # It takes port 169, marks its sockets, and becomes another user.
    "filter": (*_GUARDING, CAP_NET_BIND_SERVICE, CAP_SETGID, CAP_SETUID),
    # Only files of root and systemctl.
    "install-service": (),
    "uninstall-service": (),
}
"""By command. Anybody may run a command that is not listed."""


def require_root(command: str) -> None:
    """Raises NotPermitted unless the effective user is root, with the capabilities that the command needs."""
    if os.geteuid() != 0:
        raise NotPermitted(f"{command} needs root: run it with sudo")
    lacking = missing_capabilities(REQUIRED.get(command, ()))
    if lacking:
        raise NotPermitted(
            f"imds-guard {command}: this process is root without {' and '.join(lacking)}, which a unit, a container or "
            "a security module took away; run it outside of that"
        )
