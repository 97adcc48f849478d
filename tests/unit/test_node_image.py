# SPDX-License-Identifier: Apache-2.0
"""The node image: what it is built from, its entry point, and that docs, chart and test say the same.

vagrant/node-image builds it and runs it as a pod.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from imds_guard import CONFIG_PATH, __version__
from imds_guard.kernel import accounts, bpffs, lockfile
from imds_guard.kernel.namespaces import INITIAL_PID_NAMESPACE
from tests.unit.test_layers import SOURCES, imports_of
from vagrant.node import pod
from vagrant.node import run as node_run

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "packaging/image"
BUILD = (ROOT / "packaging/build-image").read_text(encoding="utf-8")
NODE = PARTS / "node"
PLATFORMS = (ROOT / "docs/platforms.md").read_text(encoding="utf-8")
CHART = ROOT / "deploy/helm/imds-guard"


def _oci() -> ModuleType:
    """packaging/image is no package: its parent has the name of a project on PyPI."""
    spec = importlib.util.spec_from_file_location("imds_guard_oci", PARTS / "oci.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


OCI = _oci()


def lines(name: str) -> list[str]:
    """A list of packaging/image, without comments and empty lines."""
    text = (PARTS / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


# --- what it is built from ------------------------------------------------------------------------------------------

PACKAGES = {
    "bcc": "python3-bpfcc",
    "click": "python3-click",
    "prometheus_client": "python3-prometheus-client",
    "psutil": "python3-psutil",
}
NOT_IN_THE_IMAGE = {
    "tomli": "Python 3.13 has tomllib",
    "tomlkit": "for saving: the configuration is a ConfigMap",
    "h11": "for the filter, a service of systemd",
}


def test_every_module_of_others_has_its_package() -> None:
    """Whatever src imports besides Python's own modules is in the image, or is known not to be needed there."""
    imported = {name.split(".")[0] for module in SOURCES for name in imports_of(module)}
    foreign = imported - set(sys.stdlib_module_names) - {"imds_guard", "tomllib"}
    assert foreign == {*PACKAGES, *NOT_IN_THE_IMAGE}
    assert set(PACKAGES.values()) <= set(lines("packages"))


def test_the_lists_are_in_order() -> None:
    """And nothing is both installed and left out."""
    wanted = [line for line in lines("packages") if not line.startswith("-")]
    without = [line[1:] for line in lines("packages") if line.startswith("-")]
    assert (wanted, without) == (sorted(set(wanted)), sorted(set(without)))
    assert set(wanted).isdisjoint(without)
    assert [line for line in lines("leave-out") if line.startswith(("/", ".")) or " " in line] == []


def test_the_module_is_laid_out_as_in_the_wheel() -> None:
    """The image is built without pip: build-image copies what pyproject.toml says."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'packages = ["src/imds_guard"]' in project
    assert '"bpf" = "imds_guard/bpf"\n\n' in project, "a second line: build-image must copy that, too"
    assert 'tar -C "$here/src/imds_guard" --exclude=__pycache__ -cf - . | tar -C "$module" -xf -' in BUILD
    assert 'tar -C "$here" -cf - bpf | tar -C "$module" -xf -' in BUILD


def test_the_image_and_the_node_of_the_test_are_of_one_release() -> None:
    """So that the test boots with packages of the same days."""
    assert re.findall(r"^suite=(\w+)$", BUILD, re.MULTILINE) == [node_run.NODE.suite]


def test_the_node_of_the_test_has_none_of_it() -> None:
    """Otherwise the test would not show that a node needs nothing."""
    wanted = {line for line in lines("packages") if not line.startswith("-")} - {"python3"}
    assert wanted.isdisjoint(node_run.NODE.packages)


# --- the archive ----------------------------------------------------------------------------------------------------


def read(content: bytes) -> dict[str, bytes]:
    """Name -> content of the regular files of a tar."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive if one.isreg()}  # type: ignore[union-attr]


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A small folder for a layer."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/program").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "usr/bin/program").chmod(0o700)
    (tmp_path / "usr/list").write_bytes(b"text")
    (tmp_path / "usr/list").chmod(0o640)
    (tmp_path / "bin").symlink_to("usr/bin")
    return tmp_path


def test_each_blob_has_the_digest_that_is_its_name(layer: Path) -> None:
    """From the index to the layers, sizes included; the config has the digests of the layers before compression."""
    content, digest = OCI.image([layer], "arm64", "1.2.3", 86400)
    files = read(content)
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}

    def follow(descriptor: dict[str, Any]) -> bytes:
        blob = files.pop("blobs/sha256/" + descriptor["digest"].removeprefix("sha256:"))
        assert descriptor["digest"] == f"sha256:{hashlib.sha256(blob).hexdigest()}"
        assert descriptor["size"] == len(blob)
        return blob

    (named,) = json.loads(files["index.json"])["manifests"]
    assert named["digest"] == digest
    assert named["annotations"]["org.opencontainers.image.ref.name"] == "localhost/imds-guard-node:1.2.3"
    manifest = json.loads(follow(named))
    config = json.loads(follow(manifest["config"]))
    (packed,) = [follow(one) for one in manifest["layers"]]
    unpacked = OCI.gzip.decompress(packed)
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(unpacked).hexdigest()}"]
    assert (config["architecture"], config["os"], config["created"]) == ("arm64", "linux", "1970-01-02T00:00:00Z")
    assert set(files) == {"oci-layout", "index.json"}


def test_times_owners_and_modes_are_set(layer: Path) -> None:
    """So that the image does not depend on who builds it, when, and with which umask."""
    tar = OCI.gzip.decompress(OCI._layer(layer, 86400).blob.content)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        found = {one.name: (one.uid, one.gid, one.mtime, oct(one.mode)) for one in archive}
    owner = (0, 0, 86400)
    assert found == {
        "bin": (*owner, "0o777"),
        "tmp": (*owner, "0o1777"),
        "usr": (*owner, "0o755"),
        "usr/bin": (*owner, "0o755"),
        "usr/bin/program": (*owner, "0o755"),
        "usr/list": (*owner, "0o644"),
    }


def test_the_same_files_give_the_same_archive(layer: Path) -> None:
    first = OCI.image([layer], "amd64", "1", 0)
    os.utime(layer / "usr/list", (1, 1))
    assert OCI.image([layer], "amd64", "1", 0) == first


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "usage: packaging/build-image"),
        (("one", "two"), "usage: packaging/build-image"),
        (("--arch",), "usage: packaging/build-image"),
        (("--unknown", "out"), "usage: packaging/build-image"),
        (("--arch", "s390x", "out"), "there is no image for the architecture 's390x': amd64 or arm64"),
    ],
)
def test_wrong_arguments_build_nothing(argv: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "packaging/build-image", *argv], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, said in done.stderr) == (64, True), done
    assert os.listdir(tmp_path) == []


# --- the entry point ------------------------------------------------------------------------------------------------

STUB = """#!/bin/sh
echo "$*" >>"$CALLS"
case $1 in
  start) exit "$START" ;;
  status) exit "$STATUS" ;;
  *) exit 1 ;;
esac
"""


READLINK = """#!/bin/sh
case $1 in
  /proc/self/ns/pid) echo "$PID_NAMESPACE" ;;
  /proc/self/ns/net) echo "$NETWORK" ;;
  /proc/1/ns/net) echo net:[7] ;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The calls of imds-guard, one a line. It is a program that does nothing and fails, except as START, STATUS say."""
    for name, text in (("imds-guard", STUB), ("readlink", READLINK)):
        (tmp_path / name).write_text(text, encoding="ascii")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PID_NAMESPACE", f"pid:[{INITIAL_PID_NAMESPACE}]")
    monkeypatch.setenv("NETWORK", "net:[7]")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


@pytest.mark.parametrize(
    ("started", "status", "ended"),
    [
        (0, 0, 0),  # the policy is in force
        (65, 1, 0),  # the configuration is unusable: the emergency lock
        (65, 0, 0),  # the configuration is unusable: what was in force stays
        (65, 3, 1),  # on_error = "open"
        (69, 3, 1),
        (69, 4, 1),
    ],
)
def test_lock_fails_only_where_nothing_is_locked(
    started: int, status: int, ended: int, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that fails is started again: that would help only where nothing is locked."""
    monkeypatch.setenv("START", str(started))
    monkeypatch.setenv("STATUS", str(status))
    assert subprocess.run([NODE, "lock"], capture_output=True, timeout=60, check=False).returncode == ended
    assert calls.read_text(encoding="ascii").splitlines()[0] == "start --boot"


@pytest.mark.parametrize(
    ("word", "each_round"),
    [
        ("keep", ["verify --repair", "metrics --textfile /metrics/x.prom", "sleep 0.05"]),
        ("watch", ["watch", "sleep 0.05"]),
        ("idle", ["metrics --textfile /metrics/x.prom", "sleep 0.05"]),
    ],
)
def test_the_long_running_words_end_on_sigterm_alone(
    word: str, each_round: list[str], calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever imds-guard says; and they end at once, with 0."""
    calls.unlink()
    os.mkfifo(calls)
    (calls.parent / "sleep").write_text(
        '#!/bin/sh\necho "sleep $*" >>"$CALLS"\nexec /bin/sleep "$1"\n', encoding="ascii"
    )
    (calls.parent / "sleep").chmod(0o755)
    monkeypatch.setenv("IMDS_GUARD_INTERVAL", "0.05")
    monkeypatch.setenv("IMDS_GUARD_METRICS", "/metrics/x.prom")
    with open(calls, "r+b", buffering=0) as told, subprocess.Popen([NODE, word], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for expected in each_round * 3:
            assert _line(told.fileno()) == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        # To the end of the pipe: nothing that was started is left.
        assert select.select([process.stderr], [], [], 30)[0]
        assert b"ending; what is locked stays locked" in process.stderr.read()


def _line(fd: int) -> str:
    """The next line of a pipe."""
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([fd], [], [], 60)[0], f"nothing more after {line!r}"
        line += os.read(fd, 1)
    return line.decode("ascii").rstrip()


@pytest.mark.parametrize(
    ("variable", "namespace", "advice"),
    [
        ("PID_NAMESPACE", "pid:[4026532260]", "hostPID: true; podman run --pid=host"),
        ("NETWORK", "net:[8]", "hostNetwork: true"),
        ("NETWORK", "", "may not look at PID 1"),
    ],
)
@pytest.mark.parametrize("word", ["lock", "keep", "watch", "unlock", "idle"])
def test_a_container_apart_from_the_node_is_refused(
    word: str, variable: str, namespace: str, advice: str, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of a lock by iptables with the names of the image."""
    monkeypatch.setenv(variable, namespace)
    done = subprocess.run([NODE, word], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, advice in done.stderr) == (78, True), done
    assert calls.read_text(encoding="ascii") == ""


def test_unlock_stops(calls: Path) -> None:
    assert subprocess.run([NODE, "unlock"], check=False, timeout=60).returncode == 1, "that of imds-guard"
    assert calls.read_text(encoding="ascii") == "stop\n"


@pytest.mark.parametrize("argv", [(), ("status",), ("--help",)])
def test_another_word_is_refused(argv: tuple[str, ...], calls: Path) -> None:
    done = subprocess.run([NODE, *argv], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 64
    assert "there are lock, keep, watch, unlock and idle" in done.stderr
    assert calls.read_text(encoding="ascii") == ""


# --- docs, chart and test say the same ------------------------------------------------------------------------------


def test_the_image_starts_as_the_docs_say() -> None:
    assert OCI.CONFIG["Entrypoint"] == ["/usr/bin/imds-guard-node"]
    assert OCI.CONFIG["Cmd"] == ["keep"]
    assert f"{accounts.VARIABLE}=/proc/1/root" in OCI.CONFIG["Env"]
    assert 'cp -- "$parts/node" "$root/usr/bin/imds-guard-node"' in BUILD


def test_the_words_are_in_the_docs() -> None:
    words = re.findall(r"^# imds-guard-node (\w+) ", NODE.read_text(encoding="utf-8"), re.MULTILINE)
    assert words == ["lock", "keep", "watch", "unlock", "idle"]
    section = PLATFORMS.split("\n## The node image\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == words


def test_the_mounts_are_in_the_docs() -> None:
    """The table of paths: in the container, and on the node."""
    section = PLATFORMS.split("\n## The node image\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(/\S+)` \| (.*?) \|", section, re.MULTILINE))
    assert set(rows) == set(pod.MOUNTS.values())
    for name, (path, _) in pod.HOST_PATHS.items():
        if name != "metrics":  # any folder that node_exporter reads
            assert f"`{path}`" in rows[pod.MOUNTS[name]]


def test_the_paths_are_those_of_the_source() -> None:
    assert pod.MOUNTS["config"] == os.path.dirname(CONFIG_PATH)
    assert pod.HOST_PATHS["run"][0] == pod.MOUNTS["run"] == lockfile.FOLDER
    assert pod.HOST_PATHS["bpffs"][0] == pod.MOUNTS["bpffs"] == bpffs.USUAL_PATH


def test_the_chart_mounts_the_same() -> None:
    """Paths in the container, paths on the node, and only words that the entry point has."""
    template = (CHART / "templates/_pod.tpl").read_text(encoding="utf-8")
    assert set(re.findall(r"mountPath: (\S+)", template)) == set(pod.MOUNTS.values())
    on_node = {path for name, (path, _) in pod.HOST_PATHS.items() if name != "metrics"}
    assert {path for path in re.findall(r"  path: (/\S+)", template)} == on_node
    for line in re.findall(r"args: \[(.*)\]", template):
        for word in re.findall(r'"?(\w+)"?', re.sub(r"\{\{ternary|\{\{|ternary|\(.*\)|\}\}", "", line)):
            assert f"imds-guard-node {word} " in NODE.read_text(encoding="utf-8")


def test_the_pod_of_the_test_names_this_version() -> None:
    assert node_run._version() == __version__
