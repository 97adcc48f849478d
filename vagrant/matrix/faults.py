# SPDX-License-Identifier: Apache-2.0
"""Faults that the matrix must notice: each replaces one text by another, and names the row and tests that catch it."""

from __future__ import annotations

from dataclasses import dataclass

_CONNECT, _DECIDE, _GROUPS = "bpf/connect.h", "bpf/decide.h", "bpf/groups.h"
_INSTALLED = "vagrant/guest/test_1_installed.py"
_TABLE = "vagrant/guest/test_2_table.py"
_WHO_EBPF = (_INSTALLED, "-k", "ebpf and who_gets")
_WHO_IPTABLES = (_INSTALLED, "-k", "iptables and who_gets")
_ALLOWED_IS_REFUSED = r"EPERM.*== \['connected'"
_STRANGER_CONNECTS = r"AssertionError: \['.*connected"


@dataclass(frozen=True)
class Fault:
    """``old``, which occurs exactly once in ``file``, is replaced by ``new``. ``says`` is a pattern of the failure.

    The pattern tells the failure from that of a tree which does not even start.
    """

    name: str
    file: str
    old: str
    new: str
    row: str
    tests: tuple[str, ...]
    says: str


FAULTS = (
    Fault(
        "connect6 is not attached",
        "src/imds_guard/backends/ebpf/abi.py",
        "for name in HOOKS if not left_out.get(name))",
        'for name in HOOKS if not left_out.get(name) and name != "connect6")',
        "6.1-debian-12", _WHO_EBPF, _STRANGER_CONNECTS,
    ),
    Fault(
        "an IPv4 address written as IPv6 is forgotten",
        _CONNECT,
        "\tig_set_ipv6(&to, ctx->user_ip6);\n\treturn ig_may_be_locked(generation, &to);",
        "\tig_set_ipv6(&to, ctx->user_ip6);\n\treturn !ig_is_ipv4(&to) && ig_may_be_locked(generation, &to);",
        "6.1-debian-12", _WHO_EBPF, _STRANGER_CONNECTS,
    ),
    Fault(
        "only the primary group is read",
        _DECIDE,
        "group |= ig_judge_supplementary_groups(generation, number, list, caller);",
        "group |= list->zero;",
        "6.1-debian-12", _WHO_EBPF, _ALLOWED_IS_REFUSED,
    ),
    Fault(
        "the user ID is read at the offset of the group ID",
        _DECIDE,
        "caller->cred + IG_OFF_CRED_FSUID)",
        "caller->cred + IG_OFF_CRED_FSGID)",
        "6.1-debian-12", _WHO_EBPF, _ALLOWED_IS_REFUSED,
    ),
    Fault(
        "the loop over the groups ends after 32",
        _GROUPS,
        "\tif (len > IG_MAX_GROUPS)\n\t\treturn IG_READ_FAILED;\n",
        "\tif (len > 32)\n\t\tlen = 32;\n",
        "6.1-debian-12", _WHO_EBPF, _ALLOWED_IS_REFUSED,
    ),
    Fault(
        "root is always allowed",
        _DECIDE,
        "\tif (!(list->flags & IG_LIST_DEFAULT_ALLOW))\n\t\treturn IG_NOT_LISTED;\n",
        "\tif (caller->fsuid == 0)\n\t\treturn IG_ALLOWED_USER;\n"
        "\tif (!(list->flags & IG_LIST_DEFAULT_ALLOW))\n\t\treturn IG_NOT_LISTED;\n",
        "6.1-debian-12", _WHO_EBPF, _STRANGER_CONNECTS,
    ),
    Fault(
        "a container's processes count as the host's",
        _DECIDE,
        "return user && pid ? 0 : IG_CONTAINER;",
        "return 0;",
        "6.1-debian-12", (_INSTALLED, _TABLE, "-k", "ebpf and pid-namespace-root"), r"'allowed' == 'denied'",
    ),
    Fault(
        "a change does not wait for running hooks",
        "src/imds_guard/kernel/grace.py",
        'if os.sysconf("SC_NPROCESSORS_ONLN") > 1:',
        "if True:\n        return\n    elif False:",
        "6.12-debian-13",
        ("vagrant/guest/test_3_grace.py",),
        r"the denied caller got through",
    ),
    Fault(
        "on a single processor a change does not wait",
        "src/imds_guard/kernel/grace.py",
        'if os.sysconf("SC_NPROCESSORS_ONLN") > 1:',
        "if True:",
        "7.2-debian-12",
        ("vagrant/guest/test_3_grace.py",),
        r"the denied caller got through",
    ),
    Fault(
        "pins are made in the bpffs of the mount namespace of start",
        "src/imds_guard/kernel/bpffs.py",
        'for mount in mounts("bpf", "1")',
        'for mount in mounts("bpf", "self")',
        "6.18-debian-12", _WHO_EBPF, r"status|\['connected'|assert \[False",
    ),
    Fault(
        "the ring buffer is mapped in pages of 4 KiB",
        "src/imds_guard/kernel/ringbuf.py",
        "page = mmap.PAGESIZE",
        "page = 4096",
        "6.12-arm64-16k-debian-13",
        ("tests/kernel/test_ringbuf.py",),
        r"Invalid argument",
    ),
    Fault(
        "the rules for forwarded packets match no locked port",
        "src/imds_guard/backends/forwarded/by_nft.py",
        "chains[FIND] += [rule for number, endpoint in found for rule in _endpoint(number, endpoint)]",
        "chains[FIND] += []",
        "6.12-debian-13",
        ("tests/kernel/test_forwarded.py::test_nothing_is_forwarded_to_a_locked_port",),
        r"connected",
    ),
    Fault(
        "the rules of the fallback are appended, after an ACCEPT of somebody else",
        "src/imds_guard/backends/iptables/tables.py",
        'f"-I {anchor.builtin} 1 {anchor.jump}"',
        'f"-A {anchor.builtin} {anchor.jump}"',
        # start reads back what it wrote, and notices that the jump is not the first rule.
        "lockdown", _WHO_IPTABLES, r"connected|is degraded|before ours|iptables-save shows others",
    ),
    Fault(
        "the fallback forgets supplementary groups",
        "src/imds_guard/backends/iptables/rules.py",
        'arguments += ["--suppl-groups"]',
        "arguments += []",
        "iptables-legacy", _WHO_IPTABLES, r"ECONNREFUSED|suppl-groups|returncode=69",
    ),
)  # fmt: skip
