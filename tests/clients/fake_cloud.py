# SPDX-License-Identifier: Apache-2.0
"""A metadata service that is strict about what real ones are strict about: AWS with and without sessions, GCP, Azure.

It notes every request in a file, so that a test can see what was asked, and how the caller called itself.
"""

from __future__ import annotations

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

ADDRESS = "169.254.169.254"
ACCESS_KEY = "ASIAFAKEFAKEFAKEFAKE"
GCP_TOKEN = "ya29.fake-token-of-gcp"
AZURE_TOKEN = "fake.token.azure"
USER_DATA = "#cloud-config\n# fake-user-data\n"
AZURE_USER_DATA = "ZmFrZS11c2VyLWRhdGE="
SECRETS = (ACCESS_KEY, GCP_TOKEN, AZURE_TOKEN, "fake-user-data", AZURE_USER_DATA)
AWS_REGION, GCP_ZONE, AZURE_LOCATION = "eu-central-7", "europe-west7-b", "westeurope7"
_SESSION = "fake-session-token=="
_FUTURE = "2999-01-01T00:00:00Z"
_FUTURE_SECONDS = 32_472_144_000

FLAVOURS = ("imdsv1", "imdsv2", "gcp", "azure")

_CREDENTIALS = {
    "Code": "Success",
    "LastUpdated": "2026-01-01T00:00:00Z",
    "Type": "AWS-HMAC",
    "AccessKeyId": ACCESS_KEY,
    "SecretAccessKey": "fake-secret",
    "Token": "fake-token",
    "Expiration": _FUTURE,
}
_IDENTITY = {"accountId": "000000000000", "instanceId": "i-0fake", "region": AWS_REGION}
_AWS = {
    "latest/meta-data/instance-id": "i-0fake",
    "latest/meta-data/local-hostname": "ip-10-0-0-1",
    "latest/meta-data/placement/availability-zone": f"{AWS_REGION}a",
    "latest/meta-data/placement/region": AWS_REGION,
    "latest/meta-data/iam/info": json.dumps({"Code": "Success", "InstanceProfileArn": "arn:fake"}),
    "latest/meta-data/iam/security-credentials/role": json.dumps(_CREDENTIALS),
    "latest/dynamic/instance-identity/document": json.dumps(_IDENTITY),
    "latest/dynamic/instance-identity/signature": "fake-signature",
    "latest/user-data": USER_DATA,
}
"""Leaves. A folder answers with the names in it: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html"""
_GCP = {
    "instance/id": "1234567890",
    "instance/hostname": "vm.c.project.internal",
    "instance/zone": f"projects/1/zones/{GCP_ZONE}",
    "instance/attributes/user-data": USER_DATA,
    "instance/attributes/ssh-keys": "user:ssh-ed25519 fake",
    "instance/service-accounts/default/aliases": "default\n",
    "instance/service-accounts/default/email": "robot@project.iam.gserviceaccount.com",
    "instance/service-accounts/default/scopes": "https://www.googleapis.com/auth/cloud-platform\n",
    "instance/service-accounts/default/token": json.dumps(
        {"access_token": GCP_TOKEN, "expires_in": 3600, "token_type": "Bearer"}
    ),
    "project/project-id": "project",
    "project/attributes/ssh-keys": "user:ssh-ed25519 fake",
    "universe/universe-domain": "googleapis.com",
}
"""Below /computeMetadata/v1/: https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys"""
_AZURE_INSTANCE = {
    "compute": {"location": AZURE_LOCATION, "name": "vm", "vmId": "fake-id", "userData": AZURE_USER_DATA},
    "network": {"interface": []},
}
_AZURE_IDENTITY = {
    "access_token": AZURE_TOKEN,
    "client_id": "fake-client",
    "expires_in": "3600",
    "expires_on": str(_FUTURE_SECONDS),
    "ext_expires_in": "3600",
    "not_before": "0",
    "resource": "https://management.azure.com/",
    "token_type": "Bearer",
}


class Answer(NamedTuple):
    """Of the service."""

    status: int
    body: str = ""
    kind: str = "text/plain"


_NOT_FOUND = Answer(404, "Not Found")


def answer(flavour: str, method: str, target: str, headers: dict[str, str]) -> Answer:
    """What a cloud of this flavour answers. Names of headers are in lower case."""
    url = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
    path = url.path.strip("/")
    if flavour == "gcp":
        return _gcp(method, path, query, headers)
    if flavour == "azure":
        return _azure(method, path, query, headers)
    return _aws(flavour == "imdsv2", method, path, headers)


def _aws(has_sessions: bool, method: str, path: str, headers: dict[str, str]) -> Answer:
    """https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configuring-instance-metadata-service.html"""
    if path == "latest/api/token":
        return _aws_session(has_sessions, method, headers)
    if method not in ("GET", "HEAD"):
        return Answer(405)
    if has_sessions and headers.get("x-aws-ec2-metadata-token") != _SESSION:
        return Answer(401, "Unauthorized")
    version, _, rest = path.partition("/")
    if not path:
        return Answer(200, "2009-04-04\n2021-03-23\nlatest")
    path = f"latest/{rest}" if version[:2] == "20" else path
    return _leaf_or_names(_AWS, path)


def _aws_session(has_sessions: bool, method: str, headers: dict[str, str]) -> Answer:
    if not has_sessions:
        return _NOT_FOUND
    if method != "PUT":
        return Answer(405)
    if "x-forwarded-for" in headers:
        return Answer(403)
    ttl = headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
    return Answer(200, _SESSION) if ttl.isdigit() and 1 <= int(ttl) <= 21_600 else Answer(400)


def _leaf_or_names(leaves: dict[str, str], path: str) -> Answer:
    if path in leaves:
        return Answer(200, leaves[path])
    below = [leaf[len(path) + 1 :] if path else leaf for leaf in leaves if not path or leaf.startswith(f"{path}/")]
    names = sorted({name.partition("/")[0] + ("/" if "/" in name else "") for name in below})
    return Answer(200, "\n".join(names)) if names else _NOT_FOUND


def _gcp(method: str, path: str, query: dict[str, str], headers: dict[str, str]) -> Answer:
    """https://cloud.google.com/compute/docs/metadata/querying-metadata"""
    if not path:
        return Answer(200, "computeMetadata/\n")
    begin = "computeMetadata/v1"
    if path != begin and not path.startswith(f"{begin}/"):
        return _NOT_FOUND
    if headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in headers:
        return Answer(403, "Missing Metadata-Flavor:Google header.")
    if method not in ("GET", "HEAD"):
        return Answer(405)
    path = path[len(begin) + 1 :]
    if query.get("recursive", "").lower() == "true":
        return Answer(200, json.dumps(_tree(path)), "application/json")
    kind = "application/json" if path.endswith("/token") else "text/plain"
    return _leaf_or_names(_GCP, path)._replace(kind=kind)


def _tree(path: str) -> dict[str, object]:
    made: dict[str, object] = {}
    for leaf, value in _GCP.items():
        if leaf.startswith(f"{path}/") or not path:
            *folders, name = leaf[len(path) + 1 if path else 0 :].split("/")
            place = made
            for folder in folders:
                place = place.setdefault(folder, {})  # type: ignore[assignment]
            place[name] = value.split() if name in ("aliases", "scopes") else value
    return made


def _azure(method: str, path: str, query: dict[str, str], headers: dict[str, str]) -> Answer:
    """https://learn.microsoft.com/en-us/azure/virtual-machines/instance-metadata-service"""
    refusal = json.dumps({"error": "invalid_request", "error_description": "Required metadata header not specified"})
    if headers.get("metadata", "").lower() != "true" or "x-forwarded-for" in headers:
        return Answer(400, refusal, "application/json")
    if method != "GET" or "api-version" not in query:
        return Answer(405 if method != "GET" else 400, "{}", "application/json")
    if path == "metadata/identity/oauth2/token":
        found: object = _AZURE_IDENTITY if "resource" in query else None
    else:
        found = {"metadata": {"instance": _AZURE_INSTANCE}}
        for segment in path.split("/"):
            found = found.get(segment) if isinstance(found, dict) else None
    if found is None:
        return Answer(404, "{}", "application/json")
    if query.get("format") == "text" and isinstance(found, str):
        return Answer(200, found)
    return Answer(200, json.dumps(found), "application/json")


_SERVERS = {"gcp": "Metadata Server for VM", "azure": "IMDS/150.870.65.1854"}


class Cloud:
    """A service whose flavour is the text of a file, and which adds a line of JSON for each request to another file."""

    def __init__(self, folder: Path) -> None:
        self._flavour = folder / "flavour"
        self._log = folder / "requests"

    def become(self, flavour: str) -> None:
        """The flavour from now on. Forgets the requests."""
        self._flavour.write_text(flavour, encoding="ascii")
        self._log.write_text("", encoding="ascii")

    def received(self) -> list[dict[str, str]]:
        """Method, target and User-Agent of each request since become()."""
        return [json.loads(line) for line in self._log.read_text(encoding="ascii").splitlines()]

    def listen(self) -> ThreadingHTTPServer:
        """A server that listens already. Call it inside of a namespace with this address only."""
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                cloud._note(self.command, self.path, self.headers.get("User-Agent") or "")
                flavour = cloud._flavour.read_text(encoding="ascii")
                headers = {name.lower(): value for name, value in self.headers.items()}
                said = answer(flavour, self.command, self.path, headers)
                self.server_version, self.sys_version = _SERVERS.get(flavour, "EC2ws"), ""
                self.send_response(said.status)
                self.send_header("Content-Type", said.kind)
                if flavour == "gcp":
                    self.send_header("Metadata-Flavor", "Google")
                self.send_header("Content-Length", str(len(said.body)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else said.body.encode())

            do_GET = do_HEAD = do_PUT = do_POST = _answer

            def log_message(self, format: str, *args: object) -> None:
                """Nothing on stderr."""

        ThreadingHTTPServer.daemon_threads = True
        return ThreadingHTTPServer((ADDRESS, 80), Handler)

    def _note(self, method: str, target: str, user_agent: str) -> None:
        line = json.dumps({"method": method, "target": target, "user_agent": user_agent}) + "\n"
        fd = os.open(self._log, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, line.encode("ascii"))
        finally:
            os.close(fd)
