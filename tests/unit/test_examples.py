# SPDX-License-Identifier: Apache-2.0
"""The examples are valid for the tools that read them, and use commands and keys that imds-guard has."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from imds_guard.commands.service import UNITS
from imds_guard.config.read import parse_config
from tests.tools import missing, need
from tests.tree import every_command

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(path for path in EXAMPLES.rglob("*") if path.is_file())
CLOUD_INIT = EXAMPLES / "cloud-init" / "user-data.yaml"
PACKER = EXAMPLES / "packer" / "imds-guard.pkr.hcl"
TERRAFORM = EXAMPLES / "terraform" / "main.tf"
ANSIBLE = EXAMPLES / "ansible"
PROMETHEUS = EXAMPLES / "prometheus"


def not_of_the_gate(program: str) -> None:
    """Skips when it is missing. The gate does not install it: Debian lacks it, or it fetches metadata (cloud-init)."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def passes(*command: str, cwd: Path = EXAMPLES) -> None:
    """Runs a tool that must exit with 0."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- checked by the tools --------------------------------------------------------------------------------------------


def test_yamllint_finds_nothing() -> None:
    need("yamllint")
    passes("yamllint", "--strict", ".")


def test_ansible_lint_finds_nothing(tmp_path: Path) -> None:
    need("ansible-lint")
    # In a copy, because it leaves a cache beside the files.
    shutil.copytree(ANSIBLE, tmp_path / "ansible")
    passes("ansible-lint", "--offline", "--nocolor", "playbook.yml", cwd=tmp_path / "ansible")


def test_cloud_init_takes_the_user_data() -> None:
    not_of_the_gate("cloud-init")
    # In a network namespace of its own, so that it reaches no metadata service.
    passes("unshare", "--map-root-user", "--net", "cloud-init", "schema", "--config-file", str(CLOUD_INIT))


def run_lines(folder: Path, checksum: str) -> list[str]:
    """The programs that runcmd of the user data calls, each of them one that does nothing, but for sha256sum.

    cloud-init makes one script for sh of the lines (cloudinit.util.shellify()).
    """
    lines = CLOUD_INIT.read_text(encoding="utf-8").partition("\nruncmd:\n")[2].splitlines()
    script = "".join(f"{line.strip()[2:]}\n" for line in lines).replace("PUT-THE-SHA256-HERE", checksum)
    package, called = folder / "imds-guard.deb", folder / "called"
    package.write_bytes(b"")
    for name in ("curl", "apt-get", "systemctl", "imds-guard"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} >>{called}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    subprocess.run(
        ["sh", "-c", script.replace("/run/imds-guard.deb", str(package))],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        capture_output=True,
        check=False,
    )
    return called.read_text(encoding="utf-8").split()


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""The SHA-256 of no bytes."""


@pytest.mark.parametrize(
    ("checksum", "called"),
    [(EMPTY, ["curl", "apt-get", "systemctl", "imds-guard"]), (EMPTY.replace("e", "f"), ["curl"])],
)
def test_a_package_with_another_checksum_is_not_installed(tmp_path: Path, checksum: str, called: list[str]) -> None:
    assert run_lines(tmp_path, checksum) == called


def test_packer_takes_the_template() -> None:
    not_of_the_gate("packer")
    passes("packer", "fmt", "-check", "-diff", str(PACKER))
    passes("packer", "validate", "-syntax-only", str(PACKER))


def test_terraform_would_write_it_the_same() -> None:
    not_of_the_gate("terraform")
    passes("terraform", "fmt", "-check", "-diff", str(EXAMPLES / "terraform"))


# --- HCL, by a parser from PyPI: weaker than packer and terraform, which know what each builder takes -----------------


def hcl(path: Path) -> dict[str, Any]:
    """The blocks of a file. Strings keep their quotes, other expressions are in ${}."""
    if importlib.util.find_spec("hcl2") is None:
        missing("python-hcl2 is not installed")
    parsed: dict[str, Any] = importlib.import_module("hcl2").loads(path.read_text(encoding="utf-8"))
    return parsed


def names(blocks: list[dict[str, Any]]) -> set[str]:
    return {name.strip('"') for block in blocks for name in block if not name.startswith("__")}


@pytest.mark.parametrize("path", [PACKER, TERRAFORM], ids=lambda path: path.name)
def test_hcl_is_hcl_and_uses_what_it_declares(path: Path) -> None:
    blocks = hcl(path)
    used = re.findall(r"\b(var|local)\.([a-z_]+)", json.dumps({**blocks, "__comments__": []}))
    assert {name for kind, name in used if kind == "var"} == names(blocks["variable"])
    assert {name for kind, name in used if kind == "local"} == names(blocks.get("locals", []))


def test_packer_builds_from_the_source_of_the_template() -> None:
    blocks = hcl(PACKER)
    declared = {
        f"source.{builder}.{name}".replace('"', "")
        for block in blocks["source"]
        for builder, named in block.items()
        for name in named
    }
    assert {source.strip('"') for build in blocks["build"] for source in build["sources"]} == declared


def test_packer_has_an_instance_and_an_image_for_each_architecture() -> None:
    """t4g is Graviton (arm64), t3 is x86_64. Debian names its images by its own words for them."""
    text = PACKER.read_text(encoding="utf-8")
    blocks = hcl(PACKER)
    (types,) = (block["instance_types"] for block in blocks["locals"])
    assert {key: value.strip('"') for key, value in types.items()} == {"amd64": "t3.small", "arm64": "t4g.small"}
    assert blocks["variable"][0]['"architecture"']["default"].strip('"') in types
    assert 'name = "debian-12-${var.architecture}-*"' in text
    assert "instance_type = local.instance_types[var.architecture]" in text


# --- without any tool -----------------------------------------------------------------------------------------------


def test_a_page_says_of_every_example_how_it_was_checked() -> None:
    listed = re.findall(r"^\| `([^`]+)` \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    folders = {path.relative_to(EXAMPLES).parts[0] for path in FILES if path.parent != EXAMPLES}
    assert {word.split("/")[0] for word in listed} == folders
    assert [word for word in listed if not (EXAMPLES / word).exists()] == []


def commands() -> list[tuple[str, str]]:
    """Every ``imds-guard COMMAND ...`` in the examples: the file and the arguments. test_alerts.py has the alerts'."""
    found = []
    for path in FILES:
        if path.name != "README.md" and path.parent != PROMETHEUS:
            code = [line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines()]
            found += [
                (path.name, words) for line in code for words in re.findall(r"\bimds-guard ([a-z-]+[^\"';|]*)", line)
            ]
    return [(name, words) for name, words in found if not words.startswith("imds-guard")]


@pytest.mark.parametrize(("name", "words"), commands())
def test_a_command_is_one_and_takes_its_options(name: str, words: str) -> None:
    command, *arguments = shlex.split(words)
    every_command()[command].make_context(command, arguments)


def test_commands_are_found() -> None:
    assert {words.split()[0] for _, words in commands()} >= {"status", "check"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_units_in_it_exist(path: Path) -> None:
    named = re.findall(r"\bimds-guard[a-z-]*\.(?:service|timer)\b", path.read_text(encoding="utf-8"))
    assert set(named) <= set(UNITS)


def configurations() -> list[tuple[str, str]]:
    """Every configuration in the examples: from the line with [lock to the last line that is part of it."""
    found = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if path == PACKER:
            (line,) = [line for line in text.splitlines() if "[lock." in line]
            found.append((path.name, "\n".join(re.findall(r"'([^']+)'", line.replace('\\"', '"'))[1:])))
        elif "[lock." in text:
            block = re.search(r"^ *\[lock\..*\n(?: *[a-z_]+ = .*\n)+", text, re.MULTILINE)
            assert block is not None
            found.append((path.name, "\n".join(line.strip() for line in block[0].splitlines())))
    return found


@pytest.mark.parametrize(("name", "text"), configurations())
def test_a_configuration_is_one_and_lets_root(name: str, text: str) -> None:
    """Root fetches metadata at boot on nearly every cloud: an example that denied root would break machines."""
    config = parse_config(text.replace('"canAccessIP"', "12345"), name, dmi_text="")
    assert [(0 in lock.allow.users, lock.allow.groups) for lock in config.policy.locks] == [
        (True, frozenset({12345}) if "canAccessIP" in text else frozenset())
    ]


def test_configurations_are_found() -> None:
    assert [name for name, _ in configurations()] == [
        *("config.toml.j2", "user-data.yaml", "imds-guard.pkr.hcl"),
    ]


def test_a_group_that_a_configuration_names_is_made() -> None:
    without = [
        folder.name
        for folder in EXAMPLES.iterdir()
        if folder.is_dir()
        and (text := "".join(path.read_text(encoding="utf-8") for path in folder.iterdir()))
        and '"canAccessIP"' in text.replace("\\", "")
        and not re.search(r"groupadd .*canAccessIP|^  - canAccessIP$|^ +name: canAccessIP$", text, re.MULTILINE)
    ]
    assert without == []


def test_the_version_is_this_one() -> None:
    from imds_guard import __version__

    named = {number for path in FILES for number in re.findall(r"imds-guard_([0-9.]+)_all", path.read_text("utf-8"))}
    assert named == {__version__}


def test_the_user_data_is_known_as_such() -> None:
    """cloud-init goes by the first line (its documentation, "User data formats")."""
    assert CLOUD_INIT.read_text(encoding="utf-8").splitlines()[0] == "#cloud-config"
