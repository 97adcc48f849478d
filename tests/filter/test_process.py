# SPDX-License-Identifier: Apache-2.0
"""The service as a process: its places, its user, its socket for commands, and a metadata service in a namespace."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.errors import GuardError
from imds_guard.filter import place as places
from imds_guard.filter.client import FilterClient
from imds_guard.filter.place import Place, listen_at
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.filters import FilterRules, Target
from tests.filter.scene import ACCOUNT, METADATA, serve_metadata

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes port 169 and another user in a namespace")

TARGET = Target(ipaddress.ip_address(METADATA), 80)
REGION = FilterRules(("GET /latest/meta-data/placement/**",))
MORE = FilterRules(("GET /latest/**",))


def place(number: int, rules: FilterRules, digest: int) -> Place:
    return Place(f"127.169.1.{number}", "region", TARGET, digest, rules)


def no_mark(fd: int, digest: int) -> None:
    """Instead of the map of marks, which needs a guard."""


@pytest.fixture
def sandbox(folder: Path) -> Iterator[Sandbox]:
    with Sandbox((METADATA,)) as one:
        one.spawn(serve_metadata)
        yield one


def start(sandbox: Sandbox, *wanted: Place) -> int:
    """The process ID of a service that is ready."""
    from imds_guard.filter import run

    # A path: abstract addresses are of one network namespace. Any user can send to it, as to that of systemd.
    with tempfile.TemporaryDirectory() as above, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        os.chmod(above, 0o755)
        path = os.path.join(above, "notify")
        notified.bind(path)
        os.chmod(path, 0o666)
        notified.settimeout(10)

        def serve() -> None:
            os.environ["NOTIFY_SOCKET"] = path
            os.environ["WATCHDOG_USEC"] = "200000"
            run.run([(one, listen_at(one, no_mark)) for one in wanted], ACCOUNT)

        pid = sandbox.spawn(serve)
        assert notified.recv(1000) == b"READY=1\nSTATUS=serving %d addresses" % len(wanted)
        assert [notified.recv(1000) for _ in range(2)] == [b"WATCHDOG=1", b"WATCHDOG=1"]
    return pid


def ask(path: str, number: int = 1) -> str:
    """The status of a GET, and the body. Runs inside of the sandbox."""
    with socket.create_connection((f"127.169.1.{number}", places.PORT), 5) as one:
        one.sendall(f"GET {path} HTTP/1.1\r\nHost: {METADATA}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := one.recv(65536):
            answer += data
    return f"{answer.split(b' ')[1].decode()} {answer.partition(bytes([13, 10, 13, 10]))[2].decode().strip()}"


def in_sandbox(sandbox: Sandbox, path: str, number: int = 1) -> str:
    return sandbox.call(lambda: ask(path, number))


def test_it_serves_as_a_user_without_capabilities(sandbox: Sandbox) -> None:
    pid = start(sandbox, place(1, REGION, 11))
    assert in_sandbox(sandbox, "/latest/meta-data/placement/region") == "200 /latest/meta-data/placement/region"
    assert in_sandbox(sandbox, "/latest/user-data").startswith("403 imds-guard: filter 'region' refuses")
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert set(fields["Uid"].split()) == {str(ACCOUNT.uid)}
    assert set(fields["Gid"].split()) == {str(ACCOUNT.gid)}
    assert fields["Groups"].split() == []
    assert {int(fields[key], 16) for key in ("CapEff", "CapPrm", "CapAmb")} == {0}
    assert fields["NoNewPrivs"].strip() == "1"


def test_sigterm_ends_it_at_once(sandbox: Sandbox) -> None:
    pid = start(sandbox, place(1, REGION, 11))
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    sandbox._spawned.remove(pid)
    assert status == 0
    with pytest.raises(GuardError, match=r"ConnectionRefusedError"):
        in_sandbox(sandbox, "/latest/meta-data/placement/region")


def test_a_command_hands_new_listeners_over(sandbox: Sandbox, folder: Path) -> None:
    """The service has no right to make them. Old ones are closed: a number can come back with another meaning."""
    start(sandbox, place(1, REGION, 11))

    def command() -> list[object]:
        client = FilterClient.open()
        assert client is not None
        with client:
            found: list[object] = [client.places()]
            for new in (place(2, MORE, 22), place(1, MORE, 12)):
                left = client.keep({(new.address, new.digest)})
                with listen_at(new, no_mark) as listener:
                    client.serve(new, listener)
                found += [left, client.places(), ask("/latest/user-data", int(new.address[-1]))]
            return found

    assert sandbox.call(command) == [
        {("127.169.1.1", 11)},
        set(),
        {("127.169.1.2", 22)},
        "200 /latest/user-data",
        set(),
        {("127.169.1.1", 12)},
        "200 /latest/user-data",
    ]


def test_a_command_reads_the_refusals_and_follows_them(sandbox: Sandbox, folder: Path) -> None:
    start(sandbox, place(1, REGION, 11))

    def command() -> tuple[dict[str, object], list[dict[str, object]]]:
        import select

        client, follower = FilterClient.open(), FilterClient.open()
        assert client is not None
        assert follower is not None
        with client, follower:
            follower.follow()
            client.places()  # the service has read the follower's request, too
            for number in range(250):
                ask(f"/latest/{number % 125}")
            found: list[dict[str, object]] = []
            while len(found) < 250:
                assert select.select([follower], [], [], 5)[0]
                found += follower.read()
            return client.report(), found

    report, followed = sandbox.call(command)
    rows = report["rows"]
    assert isinstance(rows, list)
    assert (len(rows), {row["count"] for row in rows}, report["left_out"]) == (125, {2}, 0)
    assert report["counters"] == [{"filter": "region", "outcome": "refused", "count": 250}]
    assert [one["path"] for one in followed] == [f"/latest/{number % 125}" for number in range(250)]


def test_only_root_reaches_the_socket_for_commands(sandbox: Sandbox, folder: Path) -> None:
    start(sandbox, place(1, REGION, 11))
    found = os.stat(folder / "filter.sock")
    assert (found.st_uid, found.st_mode & 0o777, os.stat(folder).st_mode & 0o777) == (0, 0o600, 0o700)


def test_without_a_service_there_is_no_client(folder: Path) -> None:
    """Also where the socket of one that has ended is left."""
    assert FilterClient.open() is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(folder / "filter.sock"))
    assert FilterClient.open() is None


@pytest.mark.parametrize("answer", [b"", b"[]", b"{", b'{"places": 5}', b'{"places": [["a"]]}', b"[" * 5000, b"\xff"])
def test_a_service_that_answers_nonsense_is_an_error(folder: Path, answer: bytes) -> None:
    """It is not root, and may have been taken over."""
    import threading

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(folder / "filter.sock"))
        server.listen(1)

        def serve() -> None:
            one, _ = server.accept()
            with one:
                one.recv(65536)
                if answer:
                    one.send(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        client = FilterClient.open()
        assert client is not None
        with client, pytest.raises(GuardError):
            client.places()
        thread.join()


def test_a_place_goes_through_a_message_unchanged() -> None:
    one = place(3, FilterRules(("GET /a", "PUT /b"), ("/c",), "ec2-metadata-filter", ("curl/",), True, True), 2**64 - 1)
    assert places.place_of(json.loads(json.dumps(one.values()))) == one


def test_a_place_that_somebody_else_has_is_an_error_with_its_address(sandbox: Sandbox) -> None:
    def squat() -> str:
        with socket.socket() as one:
            one.bind(("0.0.0.0", places.PORT))
            one.listen(1)
            try:
                listen_at(place(1, REGION, 11), no_mark)
            except GuardError as error:
                return str(error)
            return ""

    said = sandbox.call(squat)
    assert said.startswith("listening at 127.169.1.1:169 for filter 'region': EADDRINUSE")
