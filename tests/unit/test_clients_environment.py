# SPDX-License-Identifier: Apache-2.0
"""What ./run clients says when a client can't be had, and that each file it takes from PyPI or npm is a known one."""

from __future__ import annotations

import json
import re

import pytest

from tests.clients import environment

OLD_NODE = """npm error code EBADENGINE
npm error engine Unsupported engine
npm error notsup Not compatible with your version of node/npm: @aws-sdk/core@3.981.2
npm error notsup Required: {"node":">=20.0.0"}
npm error notsup Actual:   {"node":"v18.20.4","npm":"9.2.0"}
npm error A complete log of this run can be found in: ...
"""


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (
            OLD_NODE,
            "Not compatible with your version of node/npm: @aws-sdk/core@3.981.2 "
            'Required: {"node":">=20.0.0"} Actual:   {"node":"v18.20.4","npm":"9.2.0"}',
        ),
        (
            "npm error code ENOTFOUND\nnpm error network no such host\n".replace("\\n", "\n"),
            "npm error network no such host",
        ),
        ("Collecting boto3\nERROR: No matching distribution\nhint: ...", "ERROR: No matching distribution"),
        ("one\n\ntwo\n", "two"),
        ("", "it said nothing"),
    ],
)
def test_the_complaint(said: str, complaint: str) -> None:
    assert environment._complaint(said) == complaint


def test_every_file_has_its_hash() -> None:
    wanted = (environment.HERE / "requirements.txt").read_text(encoding="utf-8")
    entries = re.findall(r"^\S+==\S+(?: \\\n {4}--hash=sha256:[0-9a-f]{64})+$", wanted, re.M)
    assert len(entries) == len(re.findall(r"==", wanted)) > 20
    lock = json.loads((environment.HERE / "package-lock.json").read_text(encoding="utf-8"))
    assert not [
        name for name, one in lock["packages"].items() if name and not one.get("integrity", "").startswith("sha512-")
    ]
