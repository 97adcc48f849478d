#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Turns the rendered chart into the pod of one node, and its ConfigMap, for a machine without a cluster.

helm template imds-guard deploy/helm/imds-guard --set image.repository=localhost/imds-guard-node | deploy/helm/as_pod.py

--part init is a pod of the init container alone, --part main one of the others: podman 5.4 gives hostPID to containers
that are no init containers, so "podman kube play" can't run the whole pod. Needs PyYAML (python3-yaml).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import yaml


def as_pod(manifest: dict[str, Any], part: str) -> dict[str, Any]:
    """The pod that a DaemonSet makes, with the DaemonSet's name. Any other object as it is."""
    if manifest["kind"] != "DaemonSet":
        return manifest
    name, template = manifest["metadata"]["name"], manifest["spec"]["template"]
    # The only policy that the pods of a DaemonSet can have.
    spec = {"restartPolicy": "Always", **template["spec"]}
    if part != "all":
        init = spec.pop("initContainers")
        if part == "init":
            name, spec = f"{name}-init", {**spec, "restartPolicy": "Never", "containers": init}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **template["metadata"]}, "spec": spec}


def main() -> None:
    """From standard input to standard output."""
    parser = argparse.ArgumentParser(description="Turns the rendered chart into the pod of one node.")
    parser.add_argument("--part", choices=["all", "init", "main"], default="all", help="which containers; all of them")
    part = parser.parse_args().part
    manifests = [as_pod(manifest, part) for manifest in yaml.safe_load_all(sys.stdin) if manifest]
    yaml.safe_dump_all(manifests, sys.stdout, sort_keys=False)


if __name__ == "__main__":
    main()
