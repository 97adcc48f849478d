# SPDX-License-Identifier: Apache-2.0
"""The commands of README.md and docs/operations.md, in the order in which an operator runs them, and what each must do.

tests/unit/test_walk.py compares them with the two pages: a command that is in a page is here, or in NOT_WALKED with the
reason.
"""

from __future__ import annotations

from typing import NamedTuple

EVERYBODY = frozenset({"root", "member", "deploy", "www-data"})
"""Who tries to connect after each command. ``member`` has canAccessIP as a supplementary group."""
LISTED = frozenset({"root", "member"})
SAVED = frozenset({"root", "member", "deploy"})


class Line(NamedTuple):
    """A command as a page has it, without ``sudo``, and with ``imds-guard`` for ``./run``."""

    written: str
    passes: frozenset[str]
    """Who gets through afterwards."""
    says: str = ""
    """A regular expression for what it prints."""
    status: int = 0
    typed: str = ""
    """What is typed in place of a line with placeholders."""


def _of_www_data(written: str, passes: frozenset[str], says: str = "") -> Line:
    return Line(written, passes, says, typed=written.replace("NAME", "www-data"))


FIRST_LOCK = (
    Line("imds-guard demo", EVERYBODY, r"stranger +169\.254\.169\.254 +answered +EPERM"),
    Line("imds-guard check", EVERYBODY, r"ebpf: works here"),
    Line("imds-guard endpoints", EVERYBODY, r"169\.254\.169\.254"),
    Line("imds-guard start --group canAccessIP --create-group", frozenset({"member"}), r"endpoints locked"),
    Line("imds-guard status", frozenset({"member"}), r"active \(ebpf\)"),
    Line("imds-guard explain --user www-data 169.254.169.254", frozenset({"member"}), r"denied: not-listed", status=1),
    Line("imds-guard stop", EVERYBODY, r"removed every hook"),
)
"""README.md, "First lock"."""

DAY_1 = (
    Line("imds-guard check --user root", EVERYBODY, r"start would take: ebpf"),
    Line("imds-guard start --group canAccessIP --user root --mode audit", EVERYBODY, r"which denies nobody"),
    Line("imds-guard report", EVERYBODY, r"imds-guard allow --user www-data"),
    Line("imds-guard start --group canAccessIP --user root --save", LISTED, r"mode: audit -> enforce"),
    Line("imds-guard allow --user deploy --save", SAVED, r"\+ user deploy"),
    Line("imds-guard install-service --watch --verify --now", SAVED, r"imds-guard\.service"),
    Line(
        "imds-guard start --group canAccessIP --create-group --user root --mode audit", EVERYBODY, r"enforce -> audit"
    ),
    Line("imds-guard mode enforce", LISTED, r"audit -> enforce"),
    Line("systemctl reload imds-guard", SAVED),
)
"""README.md, "From audit to enforcement", and docs/operations.md, "Day 1"."""

DAY_2 = (
    _of_www_data("imds-guard allow --user NAME --save", EVERYBODY, r"\+ user www-data"),
    _of_www_data("imds-guard revoke --user NAME --save", SAVED, r"- user www-data"),
    _of_www_data("imds-guard allow --user NAME --for 15m", EVERYBODY, r"\+ user www-data"),
    Line("imds-guard status", EVERYBODY, r"until|for 15m|takes? it back"),
    Line("systemctl reload imds-guard", SAVED),
    Line("imds-guard mode audit", EVERYBODY, r"enforce -> audit"),
    Line("imds-guard mode enforce", SAVED),
    Line("imds-guard explain --pid N ENDPOINT", SAVED, r"allowed", typed="imds-guard explain --pid 1 169.254.169.254"),
    Line("imds-guard report", SAVED, r"www-data"),
    Line("journalctl -u imds-guard-watch", SAVED, r"verdict=denied .*user=www-data"),
    Line("journalctl -t imds-guard", SAVED, r"policy changed: command=revoke"),
    Line("imds-guard stop", EVERYBODY, r"systemctl stop imds-guard stops it, too"),
    Line("systemctl restart imds-guard", SAVED),
    Line("imds-guard verify --repair", SAVED),
    Line("systemctl stop imds-guard", EVERYBODY),
    Line("imds-guard start", SAVED, r"endpoints locked"),
    Line("imds-guard stop --all", EVERYBODY, r"removed every hook"),
    Line("systemctl restart imds-guard", SAVED),
    Line("rm -r /sys/fs/bpf/imds-guard", EVERYBODY),
    Line("systemctl restart imds-guard", SAVED),
)
"""docs/operations.md, "Day 2" and "Troubleshooting"."""

WRONG = (
    Line("imds-guard start --group canAccesIP", SAVED, r"did you mean canAccessIP\?", status=78),
    Line("imds-guard stat", SAVED, r"did you mean status\?", status=2),
    Line("imds-guard start --user nobodyy", SAVED, r"did you mean nobody\?", status=78),
)
"""What an operator mistypes: nothing changes."""

AFTER_REBOOT = (
    Line("imds-guard status", SAVED, r"active \(ebpf\)"),
    Line("journalctl -u imds-guard", SAVED, r"imds-guard is active \(ebpf\)"),
)

BROKEN_FILE = (
    Line("systemctl restart imds-guard", SAVED, status=1),
    Line("imds-guard check", SAVED, r"config\.toml:\d+", status=78),
    Line("journalctl -u imds-guard", SAVED, r"config\.toml:\d+"),
)
"""At 3 a.m.: somebody has edited the file and has left a word in it. The policy in force stays."""

REMOVAL = (
    Line("imds-guard uninstall-service", SAVED),
    Line("imds-guard stop", EVERYBODY, r"removed every hook"),
    Line("imds-guard status", EVERYBODY, r"inactive", status=3),
)

WALKED = (*FIRST_LOCK, *DAY_1, *DAY_2, *WRONG, *AFTER_REBOOT, *BROKEN_FILE, *REMOVAL)

_ELSEWHERE = "tests/system/test_packages.py and test_rpm.py install, upgrade and remove the packages"
_SYNOPSIS = "it stands for others"
NOT_WALKED = {
    "packaging/build-deb && sudo apt install ./dist/imds-guard_*_all.deb": _ELSEWHERE,
    "apt remove": _ELSEWHERE,
    "apt remove imds-guard": _ELSEWHERE,
    "apt purge": _ELSEWHERE,
    "apt install --allow-downgrades ./imds-guard_OLD_all.deb": "tests/release has the way back to an earlier version",
    "imds-guard ARGUMENT...": _SYNOPSIS,
    "imds-guard test": "it runs the tests themselves",
    "imds-guard start --group canAccessIP --user root": "the same as with --save",
    "imds-guard start --nobody --ip 10.1.2.3:8080,tcp --ip '[fd00:1234::1]:80+443'": "tests/system/test_cli.py",
    "imds-guard start --deny-user www-data": "tests/system/test_cli.py",
    "imds-guard allow --user deploy --ip 169.254.169.254": "tests/system/test_cli.py",
    "imds-guard allow --user NAME": "the same as with --save",
    "imds-guard revoke --timer NAME": "vagrant/guest/test_5_service.py",
    "imds-guard start --cgroup PATH": "tests/kernel/test_other_guards.py",
    "imds-guard install-service --filter": "vagrant/guest/test_5_filter.py",
    "imds-guard explain --pid N 169.254.169.254": "as explain --pid N ENDPOINT",
    "imds-guard explain --user U ENDPOINT": "as explain --user www-data 169.254.169.254",
    "systemctl soft-reboot": "vagrant/guest/test_5_after_soft_reboot.py",
    "systemctl isolate rescue.target": "vagrant/guest/test_5_service.py",
    "systemctl restart imds-guard-filter": "vagrant/guest/test_5_filter.py",
    "systemctl status imds-guard-filter": "vagrant/guest/test_5_filter.py",
    "journalctl -u imds-guard-filter": "vagrant/guest/test_5_filter.py",
    "systemctl disable imds-guard": "uninstall-service does it, too",
}
"""A command of the pages -> where it is tried, or why not."""
