# SPDX-License-Identifier: Apache-2.0
"""``demo``: who gets through before and after locking.

It runs in a network namespace and a cgroup of its own, with a fake metadata service. Nothing reaches the machine's
network, no policy of the machine is touched, and nothing is left behind.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import textwrap
from collections.abc import Sequence
from typing import Callable, NamedTuple

from imds_guard.backends import Backend, choose
from imds_guard.kernel import listeners, netns
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Caller, Decision, Destination, decide
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
from imds_guard.policy.ports import ALL_PORTS, minus_ports

IPV4, IPV6, MAPPED = "169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254"
_PORT = 80
_ANSWER = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 19\r\n\r\nfake-instance-role\n"
_WAIT_S = 3.0

ANSWERED = "answered"

# IDs that no account has on most machines. An account with one of them is not affected: nothing runs as these users
# outside the namespace. No user ID equals a group ID.
_LISTED_USER, _MEMBER, _STRANGER = 61_001, 61_002, 61_003
_LISTED_GROUP, _OTHER_GROUP = 62_001, 62_002


class DemoCaller(NamedTuple):
    """A caller of the demonstration."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = DemoCaller("root", 0, 0)
LISTED = DemoCaller("listed user", _LISTED_USER, _OTHER_GROUP)
MEMBER = DemoCaller("member of group", _MEMBER, _OTHER_GROUP, (_OTHER_GROUP, _LISTED_GROUP))
STRANGER = DemoCaller("stranger", _STRANGER, _OTHER_GROUP)

LEGEND = f"Allowed: user {_LISTED_USER} and members of group {_LISTED_GROUP}. The metadata service is a fake."


ATTEMPTS: tuple[tuple[DemoCaller, str], ...] = (
    (ROOT, IPV4),
    (LISTED, IPV4),
    (LISTED, IPV6),
    (MEMBER, IPV4),
    (STRANGER, IPV4),
    (STRANGER, IPV6),
    (STRANGER, MAPPED),
)


class DemoRow(NamedTuple):
    """One caller's request before and after locking: ``answered``, or the name of an errno."""

    caller: str
    address: str
    before: str
    after: str
    why: str
    decision: Decision

    @property
    def as_decided(self) -> bool:
        """True when the kernel did what decide() says."""
        return (self.after == ANSWERED) == self.decision.allowed


class DemoResult(NamedTuple):
    """The rows, and the policy and the backend that they were made with."""

    rows: tuple[DemoRow, ...]
    policy: Policy
    backend: str

    @property
    def whole(self) -> bool:
        """True when everybody got through before, and the kernel did what decide() says after."""
        return all(row.before == ANSWERED and row.as_decided for row in self.rows)


def demo_policy() -> Policy:
    """Locks TCP on every port but DNS; allows one user and the members of one group."""
    ports = minus_ports(ALL_PORTS, ((53, 53),))
    endpoints = tuple(Endpoint(ipaddress.ip_network(address), tcp=ports) for address in (IPV4, IPV6))
    allow = Identities(frozenset({_LISTED_USER}), frozenset({_LISTED_GROUP}))
    return make_policy([Lock("demo", endpoints, allow=allow)])


def demo(wanted: str) -> DemoResult:
    """Runs the demonstration with the backend ``wanted``, or for ``auto`` with the first that works here."""
    checked = choose.examine(None, choose.candidates(wanted, None), None, False)
    chosen = next((one.backend.name for one in checked if one.refusal is None), None)
    if chosen is None:
        raise choose.refused(checked)
    if chosen == "ebpf":
        return run_demo(lambda cgroup: choose.make("ebpf", cgroup))
    return run_demo(lambda _: choose.make("iptables"), inside=True)


def run_demo(make_backend: Callable[[str], Backend], *, inside: bool = False) -> DemoResult:
    """Lets every caller try, locks, and lets every caller try again.

    ``make_backend`` takes the path of the demonstration's cgroup. With ``inside`` the backend works in the
    demonstration's network namespace, as iptables must. Raises Unsupported, NotPermitted.
    """
    policy = demo_policy()
    with Sandbox(_addresses()) as sandbox:
        sandbox.serve_with(_listen, _serve_forever)
        backend = make_backend(sandbox.cgroup)
        before = _try_all(sandbox)
        try:
            _run(sandbox, inside, lambda: backend.check(policy))
            _run(sandbox, inside, lambda: backend.apply(policy))
            after = _try_all(sandbox)
        finally:
            _run(sandbox, inside, backend.remove)
    rows = tuple(
        _row(policy, caller, address, *outcomes) for (caller, address), outcomes in zip(_attempts(), zip(before, after))
    )
    return DemoResult(rows, policy, backend.name)


def _run(sandbox: Sandbox, inside: bool, step: Callable[[], object]) -> None:
    if inside:
        sandbox.call(step, timeout_s=60)
    else:
        step()


def _row(policy: Policy, caller: DemoCaller, address: str, before: str, after: str) -> DemoRow:
    decision = decide(
        policy,
        Caller(caller.uid, caller.gid, frozenset(caller.groups)),
        Destination(ipaddress.ip_address(address), _PORT),
    )
    return DemoRow(caller.name, address, before, after, _why(decision), decision)


def _why(decision: Decision) -> str:
    return "not listed" if decision.matched is None else f"{decision.matched[0]} is listed"


# --- the callers ----------------------------------------------------------------------------------------------------


def _try_all(sandbox: Sandbox) -> list[str]:
    return [sandbox.call(lambda one=one, to=to: _request(one, to)) for one, to in _attempts()]  # type: ignore[misc]


def _addresses() -> tuple[str, ...]:
    return (IPV4, IPV6) if netns.has_ipv6() else (IPV4,)


def _attempts() -> list[tuple[DemoCaller, str]]:
    """Those of ATTEMPTS that this kernel knows addresses for."""
    return [(caller, to) for caller, to in ATTEMPTS if ":" not in to or netns.has_ipv6()]


def _request(caller: DemoCaller, address: str) -> str:
    """Asks the service as the caller. Runs in a child: the IDs are taken for good."""
    become(uids=(caller.uid,) * 3, gids=(caller.gid,) * 3, groups=caller.groups)
    with socket.socket(listeners.family(address)) as client:
        client.settimeout(_WAIT_S)
        try:
            client.connect((address, _PORT))
            client.sendall(b"GET /latest/meta-data/ HTTP/1.0\r\n\r\n")
            status = client.recv(64).split(b"\r\n")[0]
        except socket.timeout:
            return "no answer"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
    return ANSWERED if status == b"HTTP/1.0 200 OK" else "another answer"


# --- the fake service -----------------------------------------------------------------------------------------------


def _listen() -> list[socket.socket]:
    return [one for one in listeners.listen(_addresses(), (_PORT,)) if one.type == socket.SOCK_STREAM]


def _serve_forever(sockets: list[socket.socket]) -> None:
    listeners.each_ready(sockets, _answer)


def _answer(listening: socket.socket) -> None:
    client = listening.accept()[0]
    with client:
        client.settimeout(_WAIT_S)
        client.recv(4096)
        client.sendall(_ANSWER)


# --- the table ------------------------------------------------------------------------------------------------------

_HEAD = ("WHO", "ASKS", "BEFORE", "AFTER", "WHY")
_GAP = "  "
_MIN_WIDTH = 10


def render(rows: Sequence[DemoRow], width: int = 80) -> str:
    """The rows as a table. The last column is wrapped to keep lines within ``width`` columns."""
    cells = [_HEAD, *((row.caller, row.address, row.before, row.after, row.why) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD) - 1)]
    indent = sum(widths) + len(_GAP) * len(widths)
    lines: list[str] = []
    for line in cells:
        first, *more = textwrap.wrap(line[-1], max(width - indent, _MIN_WIDTH))
        lines.append(_GAP.join(word.ljust(size) for word, size in zip(line, widths)) + _GAP + first)
        lines.extend(" " * indent + rest for rest in more)
    return "\n".join(lines)
