# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""``python_clients.py CLIENT FLAVOUR``: asks as a user of that library would, with its defaults.

Prints one line of JSON for each question: what was asked, what came, or what the library said, and the seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache
from types import SimpleNamespace
from typing import Any, Callable

Question = Callable[[], Any]
Questions = dict[str, Question]
"""``secret``: credentials, or user data. ``place``: the region or the zone."""


class Said(Exception):
    """What a program has printed."""


METADATA = "http://169.254.169.254"


def requests(flavour: str) -> Questions:
    import requests as library

    def get(path: str, headers: dict[str, str]) -> str:
        response = library.get(METADATA + path, headers=headers, timeout=10)
        response.raise_for_status()
        return response.text

    if flavour == "gcp":
        google = {"Metadata-Flavor": "Google"}
        above = "/computeMetadata/v1/instance/"
        return {
            "secret": lambda: get(above + "service-accounts/default/token", google),
            "place": lambda: get(above + "zone", google),
        }
    if flavour == "azure":
        azure = {"Metadata": "true"}
        token = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fmanagement.azure.com%2F"
        place = "/metadata/instance/compute/location?api-version=2021-02-01&format=text"
        return {"secret": lambda: get(token, azure), "place": lambda: get(place, azure)}

    def session() -> dict[str, str]:
        if flavour == "imdsv1":
            return {}
        wanted = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        response = library.put(METADATA + "/latest/api/token", headers=wanted, timeout=10)
        response.raise_for_status()
        return {"X-aws-ec2-metadata-token": response.text}

    def secret() -> str:
        above = "/latest/meta-data/iam/security-credentials/"
        return get(above + get(above, session()), session())

    return {"secret": secret, "place": lambda: get("/latest/meta-data/placement/region", session())}


def botocore(flavour: str) -> Questions:
    import botocore.session
    from botocore.utils import IMDSRegionProvider

    def secret() -> str | None:
        found = botocore.session.Session().get_credentials()
        return found.get_frozen_credentials().access_key if found else None

    return {"secret": secret, "place": lambda: IMDSRegionProvider(botocore.session.Session()).provide()}


def boto3(flavour: str) -> Questions:
    import boto3 as library

    def secret() -> str:
        """A signature needs credentials, and no network."""
        client = library.client("s3", region_name="eu-central-1")
        return client.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "key"})

    return {"secret": secret}


def aws_cli(flavour: str) -> Questions:
    def secret() -> str:
        command = [sys.executable, "-s", "-m", "awscli", "s3", "presign", "s3://bucket/key", "--region", "eu-central-1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Said(f"{done.stderr.strip()} (exit status {done.returncode})")
        return done.stdout

    return {"secret": secret}


def google_auth(flavour: str) -> Questions:
    import google.auth
    from google.auth.compute_engine import _metadata
    from google.auth.transport.requests import Request

    def secret() -> str:
        """As the client libraries of Google Cloud do: application default credentials."""
        credentials, _ = google.auth.default()
        credentials.refresh(Request())
        return credentials.token

    return {"secret": secret, "place": lambda: _metadata.get(Request(), "instance/zone")}


def azure_identity(flavour: str) -> Questions:
    from azure.identity import ManagedIdentityCredential

    return {"secret": lambda: ManagedIdentityCredential().get_token("https://management.azure.com/.default").token}


def cloud_init(flavour: str) -> Questions:
    """Its readers, one try each: at boot it tries for two minutes and more. Its secret is the user data."""
    if flavour == "gcp":
        return _cloud_init_gcp()
    return _cloud_init_azure() if flavour == "azure" else _cloud_init_aws(flavour == "imdsv2")


def _cloud_init_aws(has_sessions: bool) -> Questions:
    from cloudinit import helpers
    from cloudinit.sources import DataSourceEc2

    @cache
    def crawl() -> dict[str, Any]:
        limits = {"max_wait": 1, "timeout": 5}
        source = DataSourceEc2.DataSourceEc2({"datasource": {"Ec2": limits}}, None, helpers.Paths({}))
        # Without sessions it only asks clouds that speak AWS's language.
        names = DataSourceEc2.CloudNames
        type(source).cloud_name = names.AWS if has_sessions else names.UNKNOWN
        if not source.wait_for_metadata_service():
            raise Said("wait_for_metadata_service() found no service")
        return source.crawl_metadata()

    return {
        "secret": lambda: _text(crawl().get("user-data")),
        "place": lambda: crawl()["meta-data"]["placement"]["availability-zone"],
    }


def _cloud_init_gcp() -> Questions:
    from cloudinit.sources import DataSourceGCE

    @cache
    def read() -> dict[str, Any]:
        # Where the hardware is not Google's, it asks nothing.
        DataSourceGCE.platform_reports_gce = lambda: True
        found = DataSourceGCE.read_md(url_params=SimpleNamespace(num_retries=1, sec_between_retries=0))
        if found.get("reason"):
            raise Said(found["reason"])
        return found

    return {
        "secret": lambda: _text(read().get("user-data")),
        "place": lambda: read()["meta-data"]["availability-zone"],
    }


def _cloud_init_azure() -> Questions:
    # First, because of a circular import in it.
    from cloudinit.sources import DataSourceAzure
    from cloudinit.sources.azure import imds

    assert DataSourceAzure

    @cache
    def read() -> dict[str, Any]:
        return imds.fetch_metadata_with_api_fallback(retry_deadline=time.monotonic() + 1)

    return {
        "secret": lambda: _text(read()["compute"].get("userData")),
        "place": lambda: read()["compute"]["location"],
    }


def _text(value: bytes | str | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


CLIENTS = {
    "requests": requests,
    "botocore": botocore,
    "boto3": boto3,
    "aws-cli": aws_cli,
    "google-auth": google_auth,
    "azure-identity": azure_identity,
    "cloud-init": cloud_init,
}


def main(client: str, flavour: str) -> None:
    for name, question in CLIENTS[client](flavour).items():
        begin = time.monotonic()
        got, said = None, ""
        try:
            got = question()
        except Exception as error:  # noqa: BLE001 -- whatever it is, a user sees it
            said = str(error) if isinstance(error, Said) else f"{type(error).__name__}: {error}"
        seconds = round(time.monotonic() - begin, 2)
        print(json.dumps({"asked": name, "got": got, "said": said, "seconds": seconds}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
