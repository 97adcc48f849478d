# SPDX-License-Identifier: Apache-2.0
"""Which known clients would lose the metadata service if a policy came into force."""

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

if TYPE_CHECKING:
    import psutil

HTTP = 80

_INTERPRETER = re.compile(r"python[0-9.]*|(?:ba|da)?sh")


class Client(NamedTuple):
    """A program that is known to fetch metadata."""

    name: str
    programs: tuple[str, ...]
    """File names of the program or of its script."""
    presets: tuple[str, ...]
    """Where it fetches from: presets of the built-in table; empty for every cloud's default addresses."""
    user: str = "root"
    """The account that its package runs it as."""
    paths: tuple[str, ...] = ()
    """Files of which one is there when it is installed."""


# Names and paths: the packages' own file lists (Debian, Amazon Linux, and the projects' repositories).
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
    """Someone whom a policy would deny. ``pid`` is None for a client that is installed and does not run now."""

    pid: int | None
    name: str
    user: str
    why: str


def shut_out(policy: Policy) -> list[ShutOut]:
    """Running metadata clients that ``policy`` would deny. Open connections are the business of connections.py.

    A process that ends meanwhile is left out, and so is one that the caller may not look at: as root every one is seen.
    """
    found: dict[int, ShutOut] = {}
    for process in _processes():
        client = _client_of(process)
        if client is not None:
            _judge(
                policy,
                found,
                process.pid,
                _destinations(client),
                f"is a metadata client ({client.name}) and needs {{}}",
            )
    return [found[pid] for pid in sorted(found)]


def installed_shut_out(policy: Policy) -> list[ShutOut]:
    """Known clients that are installed and whose account ``policy`` would deny, running or not."""
    found: list[ShutOut] = []
    for client in CLIENTS:
        if not any(os.path.exists(path) for path in client.paths):
            continue
        try:
            caller = caller_of_user(client.user)
        except BadPolicy:
            continue  # its account is not there: the package runs it as somebody else, if at all
        denied = _first_denied(policy, caller, _destinations(client))
        if denied is not None:
            why = _why(*denied, f"is an installed metadata client and needs {{}} as {client.user}")
            found.append(ShutOut(None, client.name, client.user, why))
    return found


def _judge(
    policy: Policy, found: dict[int, ShutOut], pid: int, destinations: Sequence[Destination], sentence: str
) -> None:
    """Adds the process to ``found`` when one of the destinations would be denied to it."""
    if pid in found:
        return
    try:
        caller = caller_of_pid(pid)
        denied = _first_denied(policy, caller, destinations)
        if denied is not None:
            found[pid] = ShutOut(pid, _name(pid), user_name(caller.fsuid), _why(*denied, sentence))
    except (NoSuchProcess, NotPermitted):
        return


def _first_denied(
    policy: Policy, caller: Caller, destinations: Sequence[Destination]
) -> tuple[Destination, Decision] | None:
    for destination in destinations:
        decision = decide(policy, caller, destination)
        if not decision.allowed:
            return destination, decision
    return None


def _why(destination: Destination, decision: Decision, sentence: str) -> str:
    host = f"[{destination.address}]" if destination.address.version == 6 else str(destination.address)
    return f"{sentence.format(f'{host}:{destination.port}')}: {decision.reason.label} in lock {decision.lock!r}"


def _destinations(client: Client) -> tuple[Destination, ...]:
    """Where a client fetches from, by the built-in table."""
    return tuple(
        Destination(entry.address, HTTP)
        for entry in BUILT_IN
        if (set(client.presets) & set(entry.presets) if client.presets else entry.default_on is DefaultOn.EVERY_MACHINE)
    )


# --- what runs now --------------------------------------------------------------------------------------------------


def _processes() -> Iterator[psutil.Process]:
    """Those that may be a known client's; psutil says which of them are, and is imported only if there are any."""
    known = [os.fsencode(word) for client in CLIENTS for word in (*client.programs, *client.paths)]
    for pid in process_ids():
        words = _words(pid)
        if any(word in words for word in known):
            import psutil  # noqa: PLC0415 -- start-up time: it takes half as long as all the rest

            with suppress(psutil.NoSuchProcess):
                yield psutil.Process(pid)


def _words(pid: int) -> bytes:
    """All that the name of a process is made of; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as comm, open(f"/proc/{pid}/cmdline", "rb") as command_line:
            return comm.read() + command_line.read()
    except OSError:
        return b""


def _client_of(process: psutil.Process) -> Client | None:
    """The known client that a process is, by its name or by the program or script that it runs."""
    import psutil  # noqa: PLC0415

    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None  # it keeps its name until it is waited for, and connects no more
        program = _program(process.cmdline())
        names = {process.name(), os.path.basename(program)}
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    return next((client for client in CLIENTS if names & set(client.programs) or program in client.paths), None)


def _program(cmdline: Sequence[str]) -> str:
    """The program of a command line, or the script when that is an interpreter: ``python3 -u /usr/sbin/waagent``."""
    words = list(cmdline)
    if words and _INTERPRETER.fullmatch(os.path.basename(words[0])):
        words = [word for word in words[1:] if not word.startswith("-")]
    return words[0] if words else ""


def _name(pid: int) -> str:
    import psutil  # noqa: PLC0415

    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        raise NoSuchProcess(f"there is no process {pid}") from None
