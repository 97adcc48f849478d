# SPDX-License-Identifier: Apache-2.0
"""The pod of the node image in its plainest form, as objects for "podman kube play"."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

CONFIG = """\
[lock.default]
endpoints = ["169.254.169.254", "fd00:ec2::254"]
users = ["metadata-client"]
groups = ["metadata-readers"]
"""
MOUNTS = {
    "config": "/etc/imds-guard",
    "run": "/run/imds-guard",
    "xtables-lock": "/run/xtables.lock",
    "bpffs": "/sys/fs/bpf",
    "tmp": "/tmp",  # noqa: S108 -- in the container
    "metrics": "/metrics",
}
"""Volume -> its path in each container."""
HOST_PATHS = {
    "run": ("/run/imds-guard", "DirectoryOrCreate"),
    "xtables-lock": ("/run/xtables.lock", "FileOrCreate"),
    "bpffs": ("/sys/fs/bpf", "Directory"),
    "metrics": ("/run/node-exporter", "DirectoryOrCreate"),
}
"""Volume -> its path on the node, and the type of hostPath."""

MEMORY_MIB = 256
"""The limit of each container. The compiler is what needs most of it."""


def objects(image: str) -> list[dict[str, Any]]:
    """The ConfigMap and the pod."""
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": "imds-guard"}},
        {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
    ]
    volumes += [{"name": name, "hostPath": {"path": path, "type": kind}} for name, (path, kind) in HOST_PATHS.items()]
    main = {**_container("guard", "keep", image), "env": _environment()}
    spec = {
        "hostPID": True,
        "hostNetwork": True,
        "dnsPolicy": "Default",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Always",
        "initContainers": [_container("lock", "lock", image)],
        "containers": [main, _container("watch", "watch", image)],
        "volumes": volumes,
    }
    return [
        {**_head("ConfigMap"), "data": {"config.toml": CONFIG}},
        {**_head("Pod"), "spec": spec},
    ]


def load(path: Path) -> list[dict[str, Any]]:
    """The objects of a YAML file, such as the chart's. Needs PyYAML (python3-yaml)."""
    yaml: Any = importlib.import_module("yaml")  # nothing else here needs it
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def _head(kind: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": "imds-guard"}}


def _container(name: str, word: str, image: str) -> dict[str, Any]:
    return {
        "name": name,
        "image": image,
        "args": [word],
        "resources": {"limits": {"memory": f"{MEMORY_MIB}Mi"}},
        "securityContext": {"privileged": True, "readOnlyRootFilesystem": True, "runAsUser": 0},
        "volumeMounts": [
            {"name": volume, "mountPath": path, "readOnly": volume == "config"} for volume, path in MOUNTS.items()
        ],
    }


def _environment() -> list[dict[str, str]]:
    values = {"IMDS_GUARD_INTERVAL": "5", "IMDS_GUARD_METRICS": f"{MOUNTS['metrics']}/imds_guard.prom"}
    return [{"name": name, "value": value} for name, value in values.items()]
