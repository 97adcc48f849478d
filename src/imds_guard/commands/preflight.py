# SPDX-License-Identifier: Apache-2.0
"""The known metadata clients that a policy would deny."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from imds_guard.errors import BadPolicy, NotPermitted
from imds_guard.identity import NoSuchProcess, caller_of_pid, caller_of_user, user_name
from imds_guard.kernel.processes import process_ids
from imds_guard.policy.builtin import BUILT_IN, DefaultOn
from imds_guard.policy.decide import Caller, Decision, Destination, decide
from imds_guard.policy.model import Policy
from imds_guard.text import host_port

if TYPE_CHECKING:
    import psutil

_HTTP_PORT = 80

_INTERPRETER = re.compile(r"python[0-9.]*|(?:ba|da)?sh")


class Client(NamedTuple):
    """A program that fetches metadata."""

    name: str
    programs: tuple[str, ...]
    """File names of the program, or of its script."""
    presets: tuple[str, ...]
    """Presets with the addresses that it fetches from. Empty: the addresses that are locked by default everywhere."""
    user: str = "root"
    """The account that the package runs it as."""
    paths: tuple[str, ...] = ()
    """It is installed if one of these files exists."""


# Names and paths are from the file lists of the packages (Debian, Amazon Linux) and from the projects' repositories.
CLIENTS: tuple[Client, ...] = (
    Client("cloud-init", ("cloud-init",), (), paths=("/usr/bin/cloud-init",)),
    Client(
        "systemd-imdsd",
        ("systemd-imdsd", "systemd-imds"),
        (),
        user="systemd-imds",
        paths=("/usr/lib/systemd/systemd-imdsd",),
    ),
    Client("afterburn", ("afterburn",), (), paths=("/usr/bin/afterburn",)),
    Client(
        "amazon-ssm-agent",
        ("amazon-ssm-agent", "ssm-agent-worker"),
        ("aws",),
        paths=("/usr/bin/amazon-ssm-agent", "/snap/amazon-ssm-agent/current/amazon-ssm-agent"),
    ),
    Client(
        "amazon-cloudwatch-agent",
        ("amazon-cloudwatch-agent",),
        ("aws",),
        paths=("/opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent",),
    ),
    Client(
        "ec2-instance-connect",
        ("eic_harvest_hostkeys", "eic_run_authorized_keys", "eic_curl_authorized_keys"),
        ("aws",),
        user="ec2-instance-connect",
        paths=("/usr/share/ec2-instance-connect/eic_run_authorized_keys", "/opt/aws/bin/eic_run_authorized_keys"),
    ),
    Client("ecs-agent", ("amazon-ecs-init", "ecs-agent"), ("aws",), paths=("/usr/libexec/amazon-ecs-init",)),
    Client("kubelet", ("kubelet",), ("aws", "gcp", "azure"), paths=("/usr/bin/kubelet",)),
    Client("aws-node", ("aws-k8s-agent", "aws-vpc-cni"), ("aws",)),
    Client(
        "google_guest_agent",
        ("google_guest_agent", "google_guest_agent_manager"),
        ("gcp",),
        paths=("/usr/bin/google_guest_agent",),
    ),
    Client("google_osconfig_agent", ("google_osconfig_agent",), ("gcp",), paths=("/usr/bin/google_osconfig_agent",)),
    Client(
        "google_metadata_script_runner",
        ("google_metadata_script_runner",),
        ("gcp",),
        paths=("/usr/bin/google_metadata_script_runner",),
    ),
    Client("waagent", ("waagent", "walinuxagent"), ("azure",), paths=("/usr/sbin/waagent", "/usr/bin/waagent")),
    Client(
        "oracle-cloud-agent",
        ("oracle-cloud-agent",),
        ("oracle",),
        user="oracle-cloud-agent",
        paths=("/usr/libexec/oracle-cloud-agent/agent", "/snap/oracle-cloud-agent/current/agent"),
    ),
    Client(
        "aliyun-service", ("aliyun-service", "aliyun_assist_client"), ("alibaba",), paths=("/usr/sbin/aliyun-service",)
    ),
    Client("hc-utils", ("hc-ifscan",), ("hetzner",)),
    Client("scaleway-ecosystem", ("scw-fetch-ssh-keys",), ("scaleway",), paths=("/usr/sbin/scw-fetch-ssh-keys",)),
)


class ShutOut(NamedTuple):
    """A client that a policy would deny. ``pid`` is None for an installed client that does not run."""

    pid: int | None
    name: str
    user: str
    why: str


def shut_out(policy: Policy) -> list[ShutOut]:
    """Running metadata clients that ``policy`` would deny, by process ID. Their open connections are not considered.

    Processes that end meanwhile are left out, and processes that the caller may not inspect. Root may inspect all.
    """
    found = []
    for process in _processes():
        client = _client_of(process)
        denied = None if client is None else _judge(policy, client, process.pid)
        if denied is not None:
            found.append(denied)
    return sorted(found, key=lambda one: one.pid or 0)


def installed_shut_out(policy: Policy) -> list[ShutOut]:
    """Installed metadata clients whose account ``policy`` would deny, running or not."""
    found: list[ShutOut] = []
    for client in CLIENTS:
        if not any(os.path.exists(path) for path in client.paths):
            continue
        try:
            caller = caller_of_user(client.user)
        except BadPolicy:
            continue  # no such account: the package runs it as another user, if at all
        denied = _first_denied(policy, caller, _destinations(client))
        if denied is not None:
            why = _why(*denied, f"is an installed metadata client and needs {{}} as {client.user}")
            found.append(ShutOut(None, client.name, client.user, why))
    return found


def _judge(policy: Policy, client: Client, pid: int) -> ShutOut | None:
    """The client's process if the policy denies it an address that it needs."""
    try:
        caller = caller_of_pid(pid)
        denied = _first_denied(policy, caller, _destinations(client))
        if denied is None:
            return None
        why = _why(*denied, f"is a metadata client ({client.name}) and needs {{}}")
        return ShutOut(pid, _name(pid), user_name(caller.fsuid), why)
    except (NoSuchProcess, NotPermitted):
        return None


def _first_denied(
    policy: Policy, caller: Caller, destinations: Sequence[Destination]
) -> tuple[Destination, Decision] | None:
    for destination in destinations:
        decision = decide(policy, caller, destination)
        if not decision.allowed:
            return destination, decision
    return None


def _why(destination: Destination, decision: Decision, sentence: str) -> str:
    where = host_port(destination.address, destination.port)
    return f"{sentence.format(where)}: {decision.reason.label} in lock {decision.lock!r}"


def _destinations(client: Client) -> tuple[Destination, ...]:
    """The addresses that a client fetches from, from the built-in table."""
    return tuple(
        Destination(entry.address, _HTTP_PORT)
        for entry in BUILT_IN
        if (set(client.presets) & set(entry.presets) if client.presets else entry.default_on is DefaultOn.EVERY_MACHINE)
    )


# --- what runs now --------------------------------------------------------------------------------------------------


def _processes() -> Iterator[psutil.Process]:
    """Processes whose name or command line has a known name in it. _client_of() decides which of them are clients.

    psutil is imported only if there are any.
    """
    known = [os.fsencode(name) for client in CLIENTS for name in (*client.programs, *client.paths)]
    for pid in process_ids():
        text = _name_and_command_line(pid)
        if any(name in text for name in known):
            import psutil  # noqa: PLC0415 -- start-up time: psutil takes half as long as all other imports

            with suppress(psutil.NoSuchProcess):
                yield psutil.Process(pid)


def _name_and_command_line(pid: int) -> bytes:
    """Empty when the process has ended."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as comm, open(f"/proc/{pid}/cmdline", "rb") as command_line:
            return comm.read() + command_line.read()
    except OSError:
        return b""


def _client_of(process: psutil.Process) -> Client | None:
    """The known client with the name of this process, or with the program or script that the process runs."""
    import psutil  # noqa: PLC0415

    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None  # a zombie keeps its name, but makes no connections
        program = _program(process.cmdline())
        names = {process.name(), os.path.basename(program)}
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    return next((client for client in CLIENTS if names & set(client.programs) or program in client.paths), None)


def _program(command_line: Sequence[str]) -> str:
    """The program of a command line; the script if that is an interpreter: ``python3 -u /usr/sbin/waagent``."""
    arguments = list(command_line)
    if arguments and _INTERPRETER.fullmatch(os.path.basename(arguments[0])):
        arguments = [argument for argument in arguments[1:] if not argument.startswith("-")]
    return arguments[0] if arguments else ""


def _name(pid: int) -> str:
    import psutil  # noqa: PLC0415

    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        raise NoSuchProcess(f"there is no process {pid}") from None
