# SPDX-License-Identifier: Apache-2.0
"""The capabilities that each command takes (capabilities(7)): the least set that it works with.

Found by trying, and held by tests/system/test_privilege.py: with these alone a command works, and without any one of
them it is refused. The systemd units bound their processes by the same sets.
"""

from __future__ import annotations

import os

from imds_guard.errors import NotPermitted
from imds_guard.kernel.privileges import (
    CAP_BPF,
    CAP_DAC_OVERRIDE,
    CAP_DAC_READ_SEARCH,
    CAP_KILL,
    CAP_NET_ADMIN,
    CAP_NET_BIND_SERVICE,
    CAP_NET_RAW,
    CAP_SETGID,
    CAP_SETUID,
    CAP_SYS_ADMIN,
    CAP_SYS_PTRACE,
    missing_capabilities,
)

Capabilities = tuple[int, ...]

# CAP_SYS_ADMIN: programs, links and maps by their ID (bpf_prog_get_fd_by_id() in Linux asks for nothing less), by which
# every command tells what is attached from what it attached itself. It stands for CAP_BPF and CAP_PERFMON.
# CAP_NET_ADMIN: attaching, reading and writing iptables' rules, ending connections.
_GUARDING: Capabilities = (CAP_NET_ADMIN, CAP_SYS_ADMIN)

REQUIRED: dict[str, Capabilities] = {
    **dict.fromkeys(("start", "stop", "allow", "revoke", "verify", "ip-lockdown"), _GUARDING),
    **dict.fromkeys(("status", "check", "explain", "export", "report", "metrics"), _GUARDING),
    # Pinned maps alone. Before Linux c8644cd0efe7 ("bpf: refine kernel.unprivileged_bpf_disabled behaviour") (in
    # v5.19) every use of bpf(2) takes it where that switch is on.
    "watch": (CAP_BPF,),
    # A cgroup of its own at the top (a folder that even root may not write to), users of its own, and port 80.
    "demo": (*_GUARDING, CAP_DAC_OVERRIDE, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_NET_BIND_SERVICE),
    # Files of root's, and systemctl.
    "install-service": (),
    "uninstall-service": (),
}
"""By command. One that is not here anybody may run."""

MORE: dict[str, Capabilities] = {
    "whose processes connections are, and which network namespaces they live in": (CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH),
    "locks with groups in iptables: trying whether it matches them": (CAP_SETGID, CAP_SETUID, CAP_KILL),
    "iptables-legacy": (CAP_NET_RAW,),
}
"""What start, verify and the like do more with these; without them they say what is missing."""


def require_root(command: str) -> None:
    """Raises NotPermitted unless the effective user is root, with the capabilities that the command takes."""
    if os.geteuid() != 0:
        raise NotPermitted(f"imds-guard {command}: only root may; run it with sudo")
    lacking = missing_capabilities(REQUIRED.get(command, ()))
    if lacking:
        raise NotPermitted(
            f"imds-guard {command}: this process is root without {' and '.join(lacking)}; a unit, a container or a "
            "security module took that away, run it where it is not"
        )
