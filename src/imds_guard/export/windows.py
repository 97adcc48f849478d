# SPDX-License-Identifier: Apache-2.0
"""A policy for Windows Firewall, as a PowerShell script.

The principals of a blocking rule are an SDDL string: (A;;CC;;;SID) names an account that the rule blocks,
(D;;CC;;;SID) one that it does not. Source: https://docs.aws.amazon.com/AWSEC2/latest/WindowsGuide/instance-metadata-limiting-access.html
"""

from __future__ import annotations

from collections.abc import Iterable

from imds_guard.export.exported import Exported, note_containers
from imds_guard.export.rules import format_ports, heading
from imds_guard.identity import group_name, user_name
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Protocol, Verdict
from imds_guard.policy.ports import ALL_PORTS
from imds_guard.text import some_of

_HEAD = """\
$ErrorActionPreference = 'Stop'
function Get-Sid([string] $Name) {
    if ($Name -eq 'root') { return 'S-1-5-18' }  # the system itself
    (New-Object Security.Principal.NTAccount($Name)).Translate([Security.Principal.SecurityIdentifier]).Value
}
function Get-Aces([string] $Kind, [string[]] $Names) {
    -join ($Names | ForEach-Object { "($Kind;;CC;;;$(Get-Sid $_))" })
}
Get-NetFirewallRule -Group 'imds-guard' -ErrorAction SilentlyContinue | Remove-NetFirewallRule"""


def windows(policy: Policy) -> Exported:
    """A rule for each endpoint and protocol. The script looks up names where it runs, and stops at an unknown name."""
    exported = Exported()
    note_containers(policy, exported)
    exported.remarks.append(
        "every rule that matches blocks: a locked prefix also blocks an address in it that another lock allows"
    )
    exported.remarks.append(
        "user root becomes the system account (S-1-5-18); all groups of an access token are checked"
    )
    lines = [_HEAD]
    for number, lock in enumerate(policy.locks):
        lines += _lock(number, lock, policy.mode, exported)
    exported.text = "\n".join([*exported.comments("Run with: powershell -File FILE.ps1, elevated"), *lines, ""])
    return exported


def _lock(number: int, lock: Lock, mode: Mode, exported: Exported) -> list[str]:
    allowed, denied = _names(lock.allow), _names(lock.deny)
    if allowed[1]:
        exported.remarks.append(
            f"lock {lock.name!r} allows IDs without a name here, which are denied: {_some_ids(allowed[1])}"
        )
    if denied[1] and (lock.default is Verdict.ALLOW or lock.allow.groups):
        exported.weakenings.append(
            f"lock {lock.name!r} denies IDs without a name on this machine: {_some_ids(denied[1])}"
        )
    variable = f"$principals{number}"
    lines = [heading(lock)]
    if lock.default is Verdict.ALLOW:
        lines.append(f"{variable} = 'O:LSD:' + (Get-Aces 'A' {_array(denied[0])})")
        return lines + ([] if not denied[0] else _rules(lock, mode, variable))
    lines.append(f"{variable} = 'O:LSD:' + (Get-Aces 'D' {_array(allowed[0])}) + '(A;;CC;;;WD)'")
    lines += _rules(lock, mode, variable)
    if denied[0] and allowed[0]:
        # The rule above does not block denied accounts that are members of an allowed group.
        lines.append(f"{variable} = 'O:LSD:' + (Get-Aces 'A' {_array(denied[0])})")
        lines += _rules(lock, mode, variable)
    return lines


def _names(identities: Identities) -> tuple[list[str], list[int]]:
    """(names of accounts and groups, IDs without a name)."""
    names: list[str] = []
    nameless: list[int] = []
    for ids, name_of in ((identities.users, user_name), (identities.groups, group_name)):
        for number in sorted(ids):
            name = name_of(number)
            if name == str(number):
                nameless.append(number)
            else:
                names.append(name)
    return names, nameless


def _some_ids(ids: list[int]) -> str:
    return some_of([str(number) for number in ids], 5)


def _array(names: Iterable[str]) -> str:
    return "@(" + ", ".join(_quoted(name) for name in names) + ")"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _rules(lock: Lock, mode: Mode, variable: str) -> list[str]:
    enabled = "False" if mode is Mode.AUDIT else "True"
    head = f"New-NetFirewallRule -Group 'imds-guard' -DisplayName {_quoted('imds-guard: ' + lock.name)}"
    return [
        f"{head} -Enabled {enabled} -Direction Outbound -Action Block -Profile Any {_where(endpoint, protocol)} "
        f"-LocalUser {variable} | Out-Null"
        for endpoint in lock.endpoints
        for protocol in Protocol
        if endpoint.ports(protocol)
    ]


def _where(endpoint: Endpoint, protocol: Protocol) -> str:
    ports = endpoint.ports(protocol)
    port = "" if ports == ALL_PORTS else " -RemotePort " + _array(format_ports(ports, "-"))
    return f"-RemoteAddress '{endpoint.network}' -Protocol {protocol.value.upper()}{port}"
