# SPDX-License-Identifier: Apache-2.0
"""Each client of each cloud, allowed, filtered and denied: what it gets, what it says, what the cloud was asked.

IMDS_GUARD_CLIENTS_RESULTS=FILE adds what was seen to a file, from which tests/clients/results.py makes a table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.backends.iptables import IptablesBackend
from imds_guard.commands import filter_places, filter_service
from imds_guard.kernel import accounts, lockfile
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.filters import Filter, FilterRules
from imds_guard.policy.model import Identities, Lock, Policy, make_policy
from tests.clients import results
from tests.clients.environment import Clients, fetch
from tests.clients.fake_cloud import (
    ADDRESS,
    AWS_REGION,
    AZURE_LOCATION,
    FLAVOURS,
    GCP_ZONE,
    SECRETS,
    Cloud,
)
from tests.filter.scene import ACCOUNT, wait_until
from tests.kernel import guards
from tests.kernel.rules_in_a_sandbox import KINDS
from tests.tools import need

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="attaches programs to a cgroup of its own")

USERS = {"allowed": 61_001, "filtered": 61_002, "denied": 61_003, "ec2-metadata-filter": 61_004}
GROUP = 62_001
PROGRAMS = Path(__file__).parent / "programs"
WITHIN_S = 120.0

AWS, GCP, AZURE = ("imdsv1", "imdsv2"), ("gcp",), ("azure",)
CLIENTS: dict[str, tuple[str, ...]] = {
    "curl": FLAVOURS,
    "requests": FLAVOURS,
    "botocore": AWS,
    "boto3": AWS,
    "aws-cli": AWS,
    "aws-sdk-js": AWS,
    "google-auth": GCP,
    "gcp-metadata": GCP,
    "google-auth-library": GCP,
    "azure-identity": AZURE,
    "azure-identity-js": AZURE,
    "cloud-init": FLAVOURS,
}
"""Client -> the clouds that it knows."""
BY_JAVASCRIPT = ("aws-sdk-js", "gcp-metadata", "google-auth-library", "azure-identity-js")
CASES = [(client, flavour) for client, flavours in CLIENTS.items() for flavour in flavours]
ALL_OR_NOTHING = {("cloud-init", flavour) for flavour in (*AWS, *AZURE)}
"""Their reader fetches the whole tree, and gives up where a part of it is refused."""
PLACES = {"gcp": GCP_ZONE, "azure": AZURE_LOCATION}


def policy() -> Policy:
    """One account for each column of the table."""
    lock = Lock("default", guards.OLD_POLICY.locks[0].endpoints[:1], Identities(frozenset((USERS["allowed"],))))
    tricked = FilterRules(("GET /**", "PUT /latest/api/token"), headers="ec2-metadata-filter")
    rules = {"filtered": FilterRules(sets=("no-credentials",)), "ec2-metadata-filter": tricked}
    filters = [
        Filter(name, ("default",), Identities(frozenset((USERS[name],))), rules=one) for name, one in rules.items()
    ]
    return make_policy([lock], filters=filters, filter_uid=ACCOUNT.uid)


class Scene(NamedTuple):
    """A guarded namespace with a cloud."""

    backend: str
    sandbox: Sandbox
    cloud: Cloud
    clients: Clients

    def ask(self, account: str, client: str, flavour: str) -> list[results.Answer]:
        """The questions of a client, run by an account, and their answers."""
        output = self.sandbox.call(lambda: _run(self.clients, USERS[account], client, flavour), timeout_s=WITHIN_S)
        return [results.Answer(**json.loads(line)) for line in output.splitlines()]


# Its arguments: the folders of Python, node, cloud-init and the programs; the user and the group; the command.
# The accounts may not read the cache and the clone where these are in somebody's home, so they are mounted elsewhere.
_AS_USER = r"""
mount -t tmpfs -o mode=755 none /mnt
for name in python node cloud-init programs; do
  mkdir /mnt/$name
  mount --bind "$1" /mnt/$name
  shift
done
mkdir -m 777 /mnt/home
printf '127.0.0.1 localhost\n169.254.169.254 metadata.google.internal metadata\n' >/mnt/hosts
mount --bind /mnt/hosts /etc/hosts
user=$1 group=$2
shift 2
cd /mnt/home
exec setpriv --reuid "$user" --regid "$group" --clear-groups --no-new-privs -- "$@"
"""


def _run(clients: Clients, user: int, client: str, flavour: str) -> str:
    folders = [clients.python, clients.node, clients.cloud_init, PROGRAMS]
    ids = [str(user), str(GROUP)]
    environment = {
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": "/mnt/home",
        "PYTHONPATH": "/mnt/python:/mnt/cloud-init/usr/lib/python3/dist-packages",
        "PYTHONDONTWRITEBYTECODE": "1",
        "NODE_LIBRARIES": "/mnt/node",
    }
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", _AS_USER, "sh", *map(str, folders), *ids, *_command(client, flavour)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WITHIN_S - 10,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _command(client: str, flavour: str) -> list[str]:
    if client == "curl":
        return ["/mnt/programs/curl_client", flavour]
    if client in BY_JAVASCRIPT:
        node = shutil.which("node")
        assert node is not None
        return [node, "/mnt/programs/js_clients.mjs", client, flavour]
    return ["/usr/bin/python3", "-s", "/mnt/programs/python_clients.py", client, flavour]


@pytest.fixture(scope="module")
def clients() -> Clients:
    return fetch()


@pytest.fixture(scope="module", params=["ebpf", "iptables"])
def scene(
    request: pytest.FixtureRequest, clients: Clients, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    """A cloud, the policy in force, and the service of the filters."""
    folder = tmp_path_factory.mktemp("run")
    cloud = Cloud(tmp_path_factory.mktemp("cloud"))
    cloud.become("imdsv2")
    with pytest.MonkeyPatch.context() as patched, Sandbox((ADDRESS,)) as sandbox:
        patched.setattr(lockfile, "FOLDER", str(folder))
        patched.setattr(accounts, "user_in_files", lambda name: ACCOUNT)
        patched.setattr(IptablesBackend.__init__, "__defaults__", (KINDS["nf_tables"],))
        patched.setitem(IptablesBackend.__init__.__kwdefaults__ or {}, "state_folder", str(folder))
        sandbox.serve_with(cloud.listen, lambda server: server.serve_forever())
        with in_force(request.param, sandbox) as cgroup:
            sandbox.spawn(lambda: filter_service.serve(cgroup, _fail))
            wait_until(lambda: sandbox.call(lambda: filter_places.faults(cgroup)) == [])
            yield Scene(request.param, sandbox, cloud, clients)


@contextmanager
def in_force(backend: str, sandbox: Sandbox) -> Iterator[str | None]:
    """The policy by this backend. What the commands of the filters take for its cgroup."""
    if backend == "iptables":
        need(KINDS["nf_tables"][0])
        sandbox.call(lambda: IptablesBackend().apply(policy()), timeout_s=120)
        yield None
        return
    guard = EbpfBackend(sandbox.cgroup, guards.FAST)
    guard.apply(policy())
    try:
        yield sandbox.cgroup
    finally:
        guard.remove()


def _fail(warnings: list[str]) -> None:
    assert warnings == []


@pytest.mark.parametrize(("client", "flavour"), CASES, ids=[f"{client}-{flavour}" for client, flavour in CASES])
def test_each_account_gets_what_the_rules_say(scene: Scene, client: str, flavour: str) -> None:
    """Allowed: both. Filtered: the place, and no secret. Denied: nothing, and the cloud hears nothing."""
    filtered = "nothing" if (client, flavour) in ALL_OR_NOTHING else "place"
    place = PLACES.get(flavour, AWS_REGION)
    seen, asked = {}, {}
    for account in ("allowed", "filtered", "denied"):
        scene.cloud.become(flavour)
        answers = scene.ask(account, client, flavour)
        results.record(scene.backend, client, flavour, account, answers)
        seen[account] = {one.asked: _what(one.got, place) for one in answers}
        asked[account] = scene.cloud.received()
    questions = list(seen["allowed"])
    assert seen == {
        "allowed": {one: one for one in questions},
        "filtered": {one: filtered if one == "place" else "nothing" for one in questions},
        "denied": dict.fromkeys(questions, "nothing"),
    }
    assert asked["denied"] == []
    assert [one["target"] for one in asked["filtered"] if _is_secret(one["target"])] == []


USER_AGENTS = {
    "curl": ("curl/", False),
    "requests": ("python-requests/", False),
    "botocore": ("Botocore/", True),
    "boto3": ("Boto3/", True),
    "aws-cli": ("aws-cli/", True),
    "aws-sdk-js": ("", False),
    "cloud-init": ("Cloud-Init/", True),
}
"""How clients of AWS begin their User-Agent, and whether the rules of ec2-metadata-filter pass it."""


@pytest.mark.parametrize("client", USER_AGENTS)
def test_the_header_rules_of_ec2_metadata_filter_pass_the_clients_that_they_name(scene: Scene, client: str) -> None:
    """With IMDSv2: the request for a token has to pass, too."""
    beginning, passes = USER_AGENTS[client]
    scene.cloud.become("imdsv2")
    answers = scene.ask("ec2-metadata-filter", client, "imdsv2")
    results.record(scene.backend, client, "imdsv2", "ec2-metadata-filter", answers)
    seen = {one.asked: _what(one.got, AWS_REGION) for one in answers}
    assert seen == {one: one if passes else "nothing" for one in seen}
    scene.cloud.become("imdsv2")
    scene.ask("allowed", client, "imdsv2")
    sent = [one["user_agent"] for one in scene.cloud.received()]
    assert [one for one in sent if not one.startswith(beginning) or (one and not beginning)] == []


def _what(got: object, place: str) -> str:
    text = json.dumps(got)
    if any(secret in text for secret in SECRETS):
        return "secret"
    return "place" if place in text else "nothing" if got in (None, "") else text


def _is_secret(target: str) -> bool:
    return any(word in target for word in ("security-credentials", "service-accounts", "identity/oauth2", "user-data"))
