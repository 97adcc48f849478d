# SPDX-License-Identifier: Apache-2.0
"""The Helm chart: what it renders to, what the API of Kubernetes takes, and which values are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from imds_guard import __version__
from imds_guard.config.read import parse_config
from imds_guard.policy.model import Mode
from tests.pypi import run_helm, validate_for_kubernetes
from tests.tree import every_command

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "imds-guard"
AS_POD = ROOT / "deploy" / "helm" / "as_pod.py"
ENTRY_POINT = ROOT / "packaging" / "image" / "node"
UNIT = ROOT / "src" / "imds_guard" / "data" / "systemd" / "imds-guard.service"

VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "open": {"state": "open"},
    "metrics": {"metrics": {"enabled": True, "directory": "/var/lib/metrics"}, "intervalSeconds": 60},
    "open-with-metrics": {"state": "open", "metrics": {"enabled": True}},
    "without-watch": {"watch": {"enabled": False}},
    "capabilities": {"privileged": False},
    "everything": {
        "image": {"digest": f"sha256:{'0' * 64}", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "config": 'mode = "audit"\n[lock.a]\npreset = ["aws", "eks"]\nusers = [0, 33]\n',
        "metrics": {"enabled": True},
        "maxUnavailable": "10%",
        "priorityClassName": "mine",
        "resources": {"limits": {"memory": "300Mi", "cpu": 1}},
        "tolerations": [],
        "nodeSelector": {"kubernetes.io/arch": "arm64"},
        "affinity": {},
        "podAnnotations": {"a/b": "c"},
        "podLabels": {"team": "x"},
        "nameOverride": "guard",
    },
}
"""The values that a case gives, beside the name of the image."""


class Rendered:
    """What the chart makes of some values."""

    def __init__(self, text: str) -> None:
        self.text = text
        manifests = [manifest for manifest in yaml.safe_load_all(text) if manifest]
        self.kinds = sorted(manifest["kind"] for manifest in manifests)
        self.by_kind = {manifest["kind"]: manifest for manifest in manifests}
        self.daemon_set: dict[str, Any] = self.by_kind["DaemonSet"]["spec"]
        self.template: dict[str, Any] = self.daemon_set["template"]
        self.pod: dict[str, Any] = self.template["spec"]
        self.config: str = self.by_kind["ConfigMap"]["data"]["config.toml"]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All of them, init containers first."""
        return [*self.pod["initContainers"], *self.pod["containers"]]

    @property
    def verbs(self) -> dict[str, list[str]]:
        """Container -> its arguments, which are verbs of the image."""
        return {container["name"]: container["args"] for container in self.containers}


def template(values: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """helm template with these values, in a file of their own."""
    image = {"repository": "registry.example.com/imds-guard-node", **values.get("image", {})}
    path = folder / "values.json"
    path.write_text(json.dumps({**values, "image": image}), encoding="utf-8")
    return run_helm(
        *("template", "guard", str(CHART), "--namespace", "kube-system", "--values", str(path)), home=folder
    )


def render(values: dict[str, Any], folder: Path) -> Rendered:
    """What must be accepted."""
    done = template(values, folder)
    assert done.returncode == 0, done.stderr
    return Rendered(done.stdout)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rendered]:
    """Every case, rendered."""
    return {name: render(values, tmp_path_factory.mktemp(name)) for name, values in VALUES.items()}


EVERY_CASE = pytest.mark.parametrize("case", VALUES)


# --- taken by the tools ---------------------------------------------------------------------------------------------


def test_helm_lint_finds_nothing(tmp_path: Path) -> None:
    done = run_helm("lint", "--strict", "--set", "image.repository=registry.example.com/x", str(CHART), home=tmp_path)
    assert (done.returncode, re.findall(r"\[(?:WARNING|ERROR)\].*", done.stdout)) == (0, []), done.stdout


@EVERY_CASE
@pytest.mark.parametrize("version", ["1.30", "1.33", "1.37"])
def test_the_api_of_kubernetes_takes_it(rendered: dict[str, Rendered], case: str, version: str, tmp_path: Path) -> None:
    """The oldest version that Chart.yaml allows, one between, and the newest that is known here."""
    path = tmp_path / "manifests.yaml"
    path.write_text(rendered[case].text, encoding="utf-8")
    assert validate_for_kubernetes(path, version) == ""


def test_the_api_refuses_what_is_no_pod(rendered: dict[str, Rendered], tmp_path: Path) -> None:
    """So the test above can fail."""
    path = tmp_path / "manifests.yaml"
    path.write_text(rendered["defaults"].text.replace("hostPID:", "hostPid:"), encoding="utf-8")
    assert "hostPid" in validate_for_kubernetes(path, "1.37")


def test_the_oldest_version_is_the_one_that_the_chart_says() -> None:
    assert chart()["kubeVersion"] == ">=1.30.0-0"


# --- refused by the schema ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"imgae": {}}, "imgae"),
        ({"image": {"repo": "x"}}, "repo"),
        ({"image": {"repository": "Registry/x"}}, "repository"),
        ({"image": {"repository": "registry.example.com/x y"}}, "repository"),
        ({"image": {"tag": "-x"}}, "tag"),
        ({"image": {"digest": "sha256:0"}}, "digest"),
        ({"image": {"pullPolicy": "never"}}, "pullPolicy"),
        ({"imagePullSecrets": ["registry"]}, "imagePullSecrets"),
        ({"imagePullSecrets": [{"nam": "registry"}]}, "nam"),
        ({"state": "opne"}, "state"),
        ({"state": "Open"}, "state"),
        ({"state": True}, "state"),
        ({"config": ""}, "config"),
        ({"config": " \n"}, "config"),
        ({"config": {"lock": {}}}, "config"),
        ({"intervalSeconds": 0}, "intervalSeconds"),
        ({"intervalSeconds": "5m"}, "intervalSeconds"),
        ({"watch": True}, "watch"),
        ({"watch": {"enabled": "yes"}}, "enabled"),
        ({"metrics": {"enable": True}}, "enable"),
        ({"metrics": {"directory": "metrics"}}, "directory"),
        ({"privileged": "false"}, "privileged"),
        ({"maxUnavailable": 0}, "maxUnavailable"),
        ({"maxUnavailable": "0%"}, "maxUnavailable"),
        ({"maxUnavailable": "101%"}, "maxUnavailable"),
        ({"maxSurge": 1}, "maxSurge"),
        ({"priorityClassName": ""}, "priorityClassName"),
        ({"resources": {"limit": {}}}, "limit"),
        ({"resources": {"limits": {"memory": [1]}}}, "memory"),
        ({"tolerations": {"operator": "Exists"}}, "tolerations"),
        ({"nodeSelector": {"a": 1}}, "nodeSelector"),
        ({"affinity": []}, "affinity"),
        ({"podAnnotations": {"a": True}}, "podAnnotations"),
        ({"podLabels": ["a"]}, "podLabels"),
        ({"nameOverride": "My_Guard"}, "nameOverride"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_a_wrong_value_is_refused_and_named(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    done = template(values, tmp_path)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert named in done.stderr


def test_without_an_image_it_says_where_one_comes_from(tmp_path: Path) -> None:
    done = run_helm("template", "guard", str(CHART), home=tmp_path)
    assert done.returncode != 0
    assert "packaging/build-image" in done.stderr


def objects(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of the schema whose keys it lists, with its path."""
    if "properties" in schema:
        yield path, schema
        for name, below in schema["properties"].items():
            yield from objects(below, f"{path}/{name}")
    if "items" in schema:
        yield from objects(schema["items"], f"{path}[]")


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    return found


def defaults() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return found


def test_the_schema_refuses_unknown_keys_everywhere() -> None:
    assert [path for path, found in objects(schema()) if found.get("additionalProperties") is not False] == []


def test_the_schema_and_the_defaults_have_the_same_keys() -> None:
    free = {"resources", "affinity"}
    listed = {path: set(found["properties"]) for path, found in objects(schema()) if "[]" not in path}
    assert listed.pop("") - {"global"} == set(defaults())
    assert {path: keys for path, keys in listed.items() if path[1:] not in free} == {
        f"/{name}": set(value)
        for name, value in defaults().items()
        if isinstance(value, dict) and value and name not in free
    }


# --- what it is made of ---------------------------------------------------------------------------------------------


def chart() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    return found


def test_the_version_is_this_one() -> None:
    assert (chart()["version"], chart()["appVersion"]) == (__version__, __version__)


@EVERY_CASE
def test_it_is_a_daemon_set_and_a_configuration(rendered: dict[str, Rendered], case: str) -> None:
    """So no account, no role, nothing that a hook leaves behind."""
    assert rendered[case].kinds == ["ConfigMap", "DaemonSet"]
    assert "helm.sh/hook" not in rendered[case].text


@EVERY_CASE
def test_the_pod_is_in_the_node_s_namespaces_and_knows_no_secret(rendered: dict[str, Rendered], case: str) -> None:
    pod = rendered[case].pod
    assert (pod["hostPID"], pod["hostNetwork"], pod["automountServiceAccountToken"]) == (True, True, False)
    assert "serviceAccountName" not in pod


def test_it_runs_on_all_nodes_before_others_are_considered(rendered: dict[str, Rendered]) -> None:
    pod = rendered["defaults"].pod
    assert (pod["priorityClassName"], pod["tolerations"]) == ("system-node-critical", [{"operator": "Exists"}])


@EVERY_CASE
def test_no_container_is_restarted_for_a_degraded_lock(rendered: dict[str, Rendered], case: str) -> None:
    """No probe restarts one; readiness is what status says."""
    probes = {
        (container["name"], key): value
        for container in rendered[case].containers
        for key, value in container.items()
        if key.endswith("Probe")
    }
    locked = VALUES[case].get("state") != "open"
    assert list(probes) == ([("guard", "readinessProbe")] if locked else [])
    assert [probe["exec"]["command"] for probe in probes.values()] == [["imds-guard", "status"]] * locked


@EVERY_CASE
def test_the_end_of_a_pod_opens_nothing(rendered: dict[str, Rendered], case: str) -> None:
    assert [container for container in rendered[case].containers if "lifecycle" in container] == []


@EVERY_CASE
def test_old_pods_end_before_new_ones_begin(rendered: dict[str, Rendered], case: str) -> None:
    """Otherwise the verify of an old pod would close what a new one has opened."""
    strategy = rendered[case].daemon_set["updateStrategy"]
    assert strategy["type"] == "RollingUpdate"
    assert set(strategy["rollingUpdate"]) == {"maxUnavailable"}


def test_a_container_locks_before_the_others_begin(rendered: dict[str, Rendered]) -> None:
    assert rendered["defaults"].verbs == {"lock": ["lock"], "guard": ["keep"], "watch": ["watch"]}
    assert rendered["without-watch"].verbs == {"lock": ["lock"], "guard": ["keep"]}


def test_open_unlocks_and_nothing_locks_again(rendered: dict[str, Rendered]) -> None:
    assert rendered["open"].verbs == {"unlock": ["unlock"], "guard": ["idle"]}


@EVERY_CASE
def test_a_verb_is_one_of_the_image(rendered: dict[str, Rendered], case: str) -> None:
    known = set(re.findall(r"^# imds-guard-node ([a-z]+) ", ENTRY_POINT.read_text(encoding="utf-8"), re.MULTILINE))
    assert {verb for words in rendered[case].verbs.values() for verb in words} <= known


@EVERY_CASE
def test_every_volume_is_mounted_and_every_mount_is_a_volume(rendered: dict[str, Rendered], case: str) -> None:
    volumes = {volume["name"] for volume in rendered[case].pod["volumes"]}
    assert {mount["name"] for container in rendered[case].containers for mount in container["volumeMounts"]} == volumes


@EVERY_CASE
def test_it_sees_of_the_node_s_files_only_these(rendered: dict[str, Rendered], case: str) -> None:
    """All else is reached through PID 1."""
    paths = {volume["hostPath"]["path"] for volume in rendered[case].pod["volumes"] if "hostPath" in volume}
    assert paths - {"/var/lib/metrics", defaults()["metrics"]["directory"]} == {
        *("/run/imds-guard", "/run/xtables.lock", "/sys/fs/bpf"),
    }


def test_metrics_are_written_where_the_node_exporter_reads(rendered: dict[str, Rendered]) -> None:
    pod = rendered["metrics"].pod
    (directory,) = (volume["hostPath"]["path"] for volume in pod["volumes"] if volume["name"] == "metrics")
    (mount,) = (one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "metrics")
    environment = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    assert directory == "/var/lib/metrics"
    assert environment == {"IMDS_GUARD_INTERVAL": "60", "IMDS_GUARD_METRICS": f"{mount['mountPath']}/imds_guard.prom"}
    assert [one["name"] for one in rendered["defaults"].pod["containers"][0]["env"]] == ["IMDS_GUARD_INTERVAL"]


@EVERY_CASE
def test_every_container_has_a_read_only_root(rendered: dict[str, Rendered], case: str) -> None:
    contexts = [container["securityContext"] for container in rendered[case].containers]
    assert {(one["readOnlyRootFilesystem"], one["runAsUser"]) for one in contexts} == {(True, 0)}
    assert {one["privileged"] for one in contexts} == {case != "capabilities"}


def test_the_capabilities_are_those_of_the_unit(rendered: dict[str, Rendered]) -> None:
    """And one to mount a BPF filesystem where the node has none, which the unit need not do (systemd mounts it).

    CAP_NET_BIND_SERVICE is for listeners of filters: the image has no h11, so it has no filters.
    """
    lines = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    of_the_unit = {name[len("CAP_") :] for line in lines for name in line.split()}
    for container in rendered["capabilities"].containers:
        given = container["securityContext"]["capabilities"]
        assert given["drop"] == ["ALL"]
        assert set(given["add"]) - {"SYS_CHROOT"} == of_the_unit - {"NET_BIND_SERVICE"}


@EVERY_CASE
def test_the_image_is_the_one_that_was_named(rendered: dict[str, Rendered], case: str) -> None:
    digest = VALUES[case].get("image", {}).get("digest")
    reference = f"@{digest}" if digest else f":{__version__}"
    images = {container["image"] for container in rendered[case].containers}
    assert images == {f"registry.example.com/imds-guard-node{reference}"}


# --- the configuration ----------------------------------------------------------------------------------------------


def test_the_configuration_arrives_as_it_was_written(rendered: dict[str, Rendered]) -> None:
    assert rendered["everything"].config == VALUES["everything"]["config"]
    assert rendered["defaults"].config == defaults()["config"]


def test_the_default_configuration_is_one_and_lets_root_of_the_node(rendered: dict[str, Rendered]) -> None:
    """Root fetches metadata on nearly every cloud: a default that denied root would break nodes."""
    policy = parse_config(rendered["defaults"].config, "config.toml", dmi_text="").policy
    assert [(lock.allow.users, lock.allow.groups) for lock in policy.locks] == [(frozenset({0}), frozenset())]


def checksum(rendered: Rendered) -> str:
    found: str = rendered.template["metadata"]["annotations"]["checksum/config"]
    return found


def test_a_change_of_the_configuration_makes_new_pods_and_nothing_else_does(
    rendered: dict[str, Rendered], tmp_path: Path
) -> None:
    before = rendered["defaults"]
    assert checksum(rendered["metrics"]) == checksum(before)
    after = render({"config": before.config.replace("root", "daemon")}, tmp_path)
    assert checksum(after) != checksum(before)
    assert after.pod == before.pod


def test_pods_are_found_by_their_labels(rendered: dict[str, Rendered]) -> None:
    for found in rendered.values():
        wanted = found.daemon_set["selector"]["matchLabels"].items()
        assert wanted <= found.template["metadata"]["labels"].items()


# --- what is said after the installation ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["defaults", "open", "without-watch"])
def test_the_notes_have_commands_that_exist(case: str, tmp_path: Path) -> None:
    values = tmp_path / "values.json"
    values.write_text(json.dumps({**VALUES[case], "image": {"repository": "registry.example.com/x"}}), encoding="utf-8")
    words = ("install", "guard", str(CHART), "--dry-run=client", "--namespace", "kube-system", "--values", str(values))
    done = run_helm(*words, home=tmp_path)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.split("NOTES:")[1]
    assert "helm uninstall guard -n kube-system" in notes
    assert ("-c watch" in notes) == (case == "defaults")
    for command in re.findall(r"-- imds-guard ([a-z-]+)", notes):
        every_command()[command].make_context(command, [])


# --- the page for users ---------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8").split("## Kubernetes")[1].split("\n## ")[0]


def test_the_values_on_the_page_are_accepted_and_only_count_denials(tmp_path: Path) -> None:
    (block,) = re.findall(r"^   ```\n(   image:.*?)^   ```$", PAGE, re.MULTILINE | re.DOTALL)
    values: dict[str, Any] = yaml.safe_load(block)
    assert parse_config(render(values, tmp_path).config, "config.toml", dmi_text="").policy.mode is Mode.AUDIT


def test_the_page_has_a_source_for_each_agent() -> None:
    rows = PAGE.split("<!-- agents -->")[1].split("<!-- /agents -->")[0].strip().splitlines()[2:]
    assert len(rows) > 10
    assert [row for row in rows if "](https://" not in row.strip("|").split("|")[-1]] == []


# --- the pod alone --------------------------------------------------------------------------------------------------


def pod_alone(manifests: str, part: str, folder: Path) -> dict[str, Any]:
    """What as_pod.py makes of rendered manifests, by kind. The API must take it."""
    command = [sys.executable, str(AS_POD), "--part", part]
    done = subprocess.run(command, input=manifests, stdout=subprocess.PIPE, text=True, check=True)
    path = folder / f"{part}.yaml"
    path.write_text(done.stdout, encoding="utf-8")
    assert validate_for_kubernetes(path, "1.37") == ""
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}


@EVERY_CASE
def test_the_pod_alone_is_the_daemon_set_s(rendered: dict[str, Rendered], case: str, tmp_path: Path) -> None:
    found = pod_alone(rendered[case].text, "all", tmp_path)
    assert set(found) == {"ConfigMap", "Pod"}
    assert found["ConfigMap"] == rendered[case].by_kind["ConfigMap"]
    assert found["Pod"]["spec"] == {"restartPolicy": "Always", **rendered[case].pod}


def test_its_parts_have_each_container_once(rendered: dict[str, Rendered], tmp_path: Path) -> None:
    whole = rendered["defaults"].pod
    parts = {part: pod_alone(rendered["defaults"].text, part, tmp_path)["Pod"] for part in ("init", "main")}
    assert [parts[part]["metadata"]["name"] for part in parts] == ["imds-guard-init", "imds-guard"]
    assert [parts[part]["spec"]["restartPolicy"] for part in parts] == ["Never", "Always"]
    assert [parts[part]["spec"]["containers"] for part in parts] == [whole["initContainers"], whole["containers"]]
    assert [part for part in parts if "initContainers" in parts[part]["spec"]] == []
