# SPDX-License-Identifier: Apache-2.0
"""The known metadata clients that a policy would deny.

A process may call itself as it likes, and as many as they like may do so. So each user's processes are looked at by a
child that can be abandoned, those of root first, and those of one kind are counted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from imds_guard.errors import BadPolicy, NotPermitted
from imds_guard.identity import NoSuchProcess, caller_of_pid, caller_of_user, user_name
from imds_guard.kernel import untrusted
from imds_guard.kernel.abandonable import Limits, Unanswered, Worker
from imds_guard.kernel.name_service import NoAnswer
from imds_guard.kernel.processes import Process, by_user
from imds_guard.kernel.untrusted import Description
from imds_guard.policy.builtin import BUILT_IN, DefaultOn
from imds_guard.policy.decide import Caller, Decision, Destination, decide
from imds_guard.policy.model import Policy
from imds_guard.text import host_port

_HTTP_PORT = 80

_INTERPRETER = re.compile(rb"python[0-9.]*|(?:ba|da)?sh")
LIMITS = Limits(total_s=5.0)
"""2,600 processes take 0.3 s."""
MAX_KINDS = 20
"""Of processes that are listed; the rest is counted."""


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
    """Safe to print."""
    user: str
    why: str
    processes: int = 1
    """How many processes of this user are denied as the same client. ``pid`` is the first, ``name`` its name."""


class Preflight(NamedTuple):
    """The running clients that a policy would deny, and which processes were not looked at."""

    shut_out: tuple[ShutOut, ...] = ()
    more: int = 0
    """Processes beyond MAX_KINDS."""
    hung: tuple[int, ...] = ()
    """Processes that did not show their command line in time; at most LIMITS.hung."""
    not_asked: int = 0
    """Processes that were left out, because of those that hung or because the total time was over."""


def shut_out(policy: Policy, limits: Limits = LIMITS) -> Preflight:
    """Running metadata clients that ``policy`` would deny. Their open connections are not considered.

    Processes that end meanwhile are left out, and processes that the caller may not inspect. Root may inspect all. A
    process whose command line hangs is judged by its name alone.
    """
    found: dict[tuple[str, str, str], ShutOut] = {}
    more = not_asked = 0
    hung: list[int] = []

    def work(question: _Question) -> _Denied | None:
        return _examine(policy, question)

    with Worker(work) as worker:
        everyone = [_Question(process) for process in by_user()]
        for question, answer in worker.ask_each(everyone, limits, lambda one: one.process.uid):
            denied = answer
            if denied is Unanswered.HUNG:
                hung.append(question.process.pid)
                denied = worker.ask(question._replace(command_line=False), limits.share_s)
            not_asked += answer is Unanswered.NOT_ASKED
            if isinstance(denied, _Denied):
                more += not _count(found, _named(denied))
    return Preflight(tuple(found.values()), more, tuple(hung), not_asked)


def _named(one: _Denied) -> _Denied:
    """With the user's name. It is not looked up in the child: a name service that hangs is no fault of the process."""
    return one._replace(shut_out=one.shut_out._replace(user=user_name(int(one.shut_out.user))))


def _count(found: dict[tuple[str, str, str], ShutOut], one: _Denied) -> bool:
    """False where it would be one kind too many."""
    key = (one.client, one.shut_out.user, one.shut_out.why)
    known = found.get(key)
    if known is None and len(found) >= MAX_KINDS:
        return False
    found[key] = one.shut_out if known is None else known._replace(processes=known.processes + 1)
    return True


def installed_shut_out(policy: Policy) -> list[ShutOut]:
    """Installed metadata clients whose account ``policy`` would deny, running or not."""
    found: list[ShutOut] = []
    for client in CLIENTS:
        if not any(os.path.exists(path) for path in client.paths):
            continue
        try:
            caller = caller_of_user(client.user)
        except (BadPolicy, NoAnswer):
            continue  # no such account: the package runs it as another user, if at all
        denied = _first_denied(policy, caller, _destinations(client))
        if denied is not None:
            why = _why(*denied, f"is an installed metadata client and needs {{}} as {client.user}")
            found.append(ShutOut(None, client.name, client.user, why))
    return found


def _judge(policy: Policy, client: Client, described: Description, pid: int) -> ShutOut | None:
    """The client's process if the policy denies it an address that it needs."""
    try:
        caller = caller_of_pid(pid)
    except (NoSuchProcess, NotPermitted):
        return None
    denied = _first_denied(policy, caller, _destinations(client))
    if denied is None:
        return None
    why = _why(*denied, f"is a metadata client ({client.name}) and needs {{}}")
    return ShutOut(pid, described.program, str(caller.fsuid), why)


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


class _Question(NamedTuple):
    process: Process
    command_line: bool = True


class _Denied(NamedTuple):
    client: str
    shut_out: ShutOut


def _examine(policy: Policy, question: _Question) -> _Denied | None:
    """Runs in the child. A zombie keeps its name, but makes no connections."""
    pid = question.process.pid
    described = untrusted.describe(pid, command_line=question.command_line)
    client = None if described is None or described.is_zombie else _client_of(described, question.command_line)
    if described is None or client is None:
        return None
    denied = _judge(policy, client, described, pid)
    return None if denied is None else _Denied(client.name, denied)


def _client_of(described: Description, command_line: bool) -> Client | None:
    """The known client with the name of this process, or with the program or script that the process runs.

    The kernel cuts names off after 15 bytes. Without a command line that is all there is to know.
    """
    program = _program(described.command_line)
    known = _known(command_line)
    return next((known[one] for one in (described.name, os.path.basename(program), program) if one in known), None)


@cache
def _known(whole_names: bool) -> dict[bytes, Client]:
    """The client of each name of a program, and of each path of one."""
    names = {os.fsencode(name)[: None if whole_names else 15]: client for client in CLIENTS for name in client.programs}
    return {**names, **{os.fsencode(path): client for client in CLIENTS for path in client.paths}}


def _program(command_line: Sequence[bytes]) -> bytes:
    """The program of a command line; the script if that is an interpreter: ``python3 -u /usr/sbin/waagent``."""
    arguments = list(command_line)
    if arguments and _INTERPRETER.fullmatch(os.path.basename(arguments[0])):
        arguments = [argument for argument in arguments[1:] if not argument.startswith(b"-")]
    return arguments[0] if arguments else b""
