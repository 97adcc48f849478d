# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the filter before and after a reboot: a metadata service, and callers."""

from __future__ import annotations

import errno
import http.client
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from imds_guard.kernel.children import run_in_child
from imds_guard.kernel.credentials import become
from vagrant.guest.service import UNIT, journal, show, systemctl
from vagrant.guest.world import ACTIVE, ONE, OTHERS, PATIENCE_S, STRANGER, command
from vagrant.waiting import wait_until

ADDRESS = "169.254.42.42"
"""The listeners of the other tests, at the address of EC2, speak no HTTP."""
FILTER = "imds-guard-filter.service"
ACCOUNT = "imds-guard-filter"
REGION, SECRET = "/latest/meta-data/placement/region", "/latest/meta-data/iam/security-credentials/role"
CONFIG = Path("/etc/imds-guard/config.toml")
RULES = 'allow = ["GET /*/meta-data/placement/**"]'
OTHER_RULES = 'allow = ["GET /**"]\ndeny = ["/*/meta-data/placement/**"]'
TEXT = f"""\
[lock.default]
endpoints = ["{ADDRESS}:80,tcp"]
users = ["root", {ONE}]

[filter.region]
locks = ["default"]
users = [{STRANGER}]
{RULES}
"""


class _Metadata(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answers every path."""
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True


@contextmanager
def metadata_service() -> Iterator[None]:
    """An HTTP server at ADDRESS, on lo. conftest.py has made sure that there is no other interface."""
    subprocess.run(["ip", "addr", "replace", f"{ADDRESS}/32", "dev", "lo"], check=True)  # noqa: S607  (the guest's)
    server = _Server((ADDRESS, 80), _Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


def ask(uid: int, *paths: str, source: str = "") -> list[str]:
    """The status of a GET of each path by a new process of this user, or the errno of its connect.

    ``source``: the address that it is bound to.
    """

    def inside() -> list[str]:
        become((uid,) * 3, (OTHERS,) * 3, ())
        return [_status(path, source) for path in paths]

    return run_in_child(inside, timeout_s=PATIENCE_S)


def _status(path: str, source: str) -> str:
    bound = (source, 0) if source else None
    connection = http.client.HTTPConnection(ADDRESS, 80, timeout=60, source_address=bound)
    try:
        connection.request("GET", path)
        return str(connection.getresponse().status)
    except http.client.HTTPException as error:
        return type(error).__name__
    except OSError as error:
        return errno.errorcode[error.errno or errno.ETIMEDOUT]
    finally:
        connection.close()


def wait_until_active() -> None:
    """Waits until the service of the filters is active."""
    wait_until(lambda: show(FILTER, "ActiveState") == "active", lambda: journal(FILTER), PATIENCE_S)


def kill_under_load(*denied: str) -> None:
    """kill -9 while a caller asks: systemd starts the service again; meanwhile the caller is denied at once."""
    seen: set[str] = set()
    over = threading.Event()

    def storm() -> None:
        while not over.is_set():
            seen.update(ask(STRANGER, *[SECRET] * 50))

    thread = threading.Thread(target=storm)
    thread.start()
    for _ in range(2):
        wait_until_active()
        os.kill(int(show(FILTER, "MainPID")), signal.SIGKILL)
        wait_until_active()
    over.set()
    thread.join()
    assert {"403", denied[0]} <= seen <= {"403", *denied, "ECONNRESET", "RemoteDisconnected"}, seen


def reload_with_other_rules(text: str) -> None:
    """The command hands new listeners to the process that runs. ``text``: the configuration, which comes back."""
    pid = show(FILTER, "MainPID")
    for rules, expected in ((OTHER_RULES, ["403", "200"]), (RULES, ["200", "403"])):
        CONFIG.write_text(text.replace(RULES, rules), encoding="utf-8")
        systemctl("reload", UNIT)
        assert ask(STRANGER, REGION, SECRET) == expected, journal(FILTER)
    assert show(FILTER, "MainPID") == pid
    assert command("status").returncode == ACTIVE


def assert_filtered(denied: str = "EPERM") -> None:
    """The filtered user gets what the rules say, the allowed one everything, root too."""
    wait_until_active()
    assert ask(STRANGER, REGION, SECRET) == ["200", "403"], journal(FILTER)
    assert ask(ONE, REGION, SECRET) == ["200", "200"]
    assert ask(STRANGER + 1, REGION) == [denied]
