# SPDX-License-Identifier: Apache-2.0
"""Builds the node image, boots a node for it, and runs the tests of test_node.py there.

The node is not a row of the matrix: its userland is one of its own, and the tree is in it only as the image.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vagrant.matrix import accel, cache, guest, job, kernel, table, userland, wheel
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.process import run
from vagrant.node import pod

HERE = Path(__file__).resolve().parent
INPUTS = ("bpf", "packaging/build-image", "packaging/image", "src")
"""What the image is built from, besides Debian's packages."""
NODE = table.Userland(
    name="node",
    suite="trixie",
    python="3.13",
    bcc="",
    packages=(
        *("ca-certificates", "catatonit", "conmon", "crun", "dbus", "iproute2", "kmod", "netavark", "passwd", "podman"),
        *("procps", "python3", "systemd", "systemd-sysv", "util-linux"),
    ),
    tools=("iniconfig==2.1.0", "packaging==25.0", "pluggy==1.6.0", "pygments==2.19.2", "pytest==8.4.2"),
)
"""A node that runs pods, with neither bcc nor iptables nor nft nor imds-guard. Python is for the tests."""
MEMORY_MIB = 3072
"""The image and the containers are in a tmpfs, since the root is read-only."""


def main(arguments: Sequence[str]) -> int:
    """Exit status: that of pytest in the guest, 3 for a lost guest, 2 where something could not be prepared."""
    parser = argparse.ArgumentParser(prog="node-image", description=__doc__)
    parser.add_argument("--kernel", default="6.12", help="a kernel of kernels.toml (default: 6.12)")
    parser.add_argument("--accel", choices=("auto", "tcg", "kvm"), default="auto")
    parser.add_argument("--deadline", type=float, default=1800, metavar="SECONDS", help="for the guest (1800)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="this image, in place of one that is built")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder for console.log and results/")
    parser.add_argument("--pod", type=Path, metavar="FILE", help="YAML of another pod: the chart's")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="imds-guard-node-") as scratch:
            folder = (options.keep or Path(scratch)).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            return _run(options, Path(scratch), folder)
    except MatrixError as error:
        sys.stderr.write(f"node-image: {error}\n")
        return 2


def image() -> Path:
    """The image of this tree, which is built unless the cache has it."""
    folder = cache.entry("node-images", "amd64", {"inputs": _content()}, _build)
    return folder / "image.tar"


def _build(draft: Path) -> None:
    sys.stderr.write("node-image: building the image (one to two minutes)\n")
    run([str(job.TREE / "packaging/build-image"), "--arch", "amd64", str(draft / "image.tar")], deadline_s=1800)


def _content() -> str:
    found = hashlib.sha256()
    for name in INPUTS:
        top = job.TREE / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                found.update(f"{path.relative_to(job.TREE)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _run(options: argparse.Namespace, scratch: Path, folder: Path) -> int:
    matrix = table.load()
    if options.kernel not in matrix.kernels:
        raise MatrixError(f"there is no kernel {options.kernel}; there are: {', '.join(matrix.kernels)}")
    booted = guest.Guest(
        kernel.fetch(matrix.archive, matrix.kernels[options.kernel]), userland.fetch(matrix.archive, NODE),
        memory_mib=MEMORY_MIB, accel=accel.choose(matrix, options.accel), systemd=True,
    )  # fmt: skip
    work = scratch / "job.tar"
    files = {"image.tar": options.image or image(), "before-systemd": HERE / "before-systemd"}
    files |= {f"suite/vagrant/{name}": HERE.parent / name for name in ("__init__.py", "waiting.py", "node")}
    files["pod.json"] = _pod(options, scratch)
    tools = {"tools": wheel.test_tools(NODE.tools, NODE.python)}
    argv = ["python3", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=suite"]
    argv += ["--tb=short", "--durations=8", "--junitxml=/results/junit.xml"]
    argv += ["suite/vagrant/node/test_node.py", *options.pytest]
    job.write(work, job.command(argv, "."), files, {"PYTHONPATH": "/job/tools:/job/suite"}, tools)
    return _end(guest.boot(booted, work, folder, options.deadline, _show), folder)


def _pod(options: argparse.Namespace, scratch: Path) -> Path:
    """The objects of the pod as JSON."""
    objects = pod.load(options.pod) if options.pod else pod.objects(f"localhost/imds-guard-node:{_version()}")
    path = scratch / "pod.json"
    path.write_text(json.dumps(objects), encoding="ascii")
    return path


def _version() -> str:
    text = (job.TREE / "src/imds_guard/__init__.py").read_text(encoding="utf-8")
    return text.split('__version__ = "')[1].split('"')[0]


def _show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


def _end(outcome: guest.Outcome, folder: Path) -> int:
    if outcome.status is None:
        sys.stderr.write(f"{guest.console_tail(folder)}\nnode-image: the guest was lost: {outcome.lost}\n")
        return 3
    word = "passed" if outcome.status == 0 else f"failed (pytest's exit status {outcome.status})"
    sys.stderr.write(f"node-image: {word} after {outcome.seconds:.0f} s\n")
    return outcome.status
