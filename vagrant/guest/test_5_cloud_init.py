# SPDX-License-Identifier: Apache-2.0
"""The user data of examples/cloud-init as a NoCloud seed for the next boot. test_6_after_cloud_init.py continues.

The example fetches the package. No packet leaves a guest, so here the wheel is what is installed, and three lines are
another one. Everything else is as it stands in the example.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from vagrant.guest.service import UNIT, VERIFY, WATCH, slow_down
from vagrant.guest.test_5_service import EBPF
from vagrant.guest.world import INACTIVE, PATIENCE_S, STRANGER, command, everywhere, reach

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cloud-init" / "user-data.yaml"
SEED = Path("/var/lib/cloud/seed/nocloud")
_PACKAGE = ("  - curl ", '  - echo "PUT-THE-SHA256-HERE', "  - apt-get install ")
_INSTALL = "  - /usr/local/bin/imds-guard install-service --watch --verify\n"


def user_data() -> str:
    """The example, where install-service takes the place of the package."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if line.startswith(_PACKAGE)]
    assert places == [*range(places[0], places[0] + len(_PACKAGE))], lines
    lines[places[0] : places[-1] + 1] = [_INSTALL]
    return "".join(lines)


@EBPF
def test_nothing_is_locked_without_user_data(backend: str) -> None:
    """cloud-init found no seed at this boot, and did nothing."""
    assert command("status").returncode == INACTIVE
    assert not Path("/etc/imds-guard").exists()
    assert reach(STRANGER) == everywhere("connected")


@EBPF
def test_cloud_init_takes_the_example(backend: str) -> None:
    """By its own schema."""
    checked = subprocess.run(
        ["/usr/bin/cloud-init", "schema", "--config-file", str(EXAMPLE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (checked.returncode, "Valid schema" in checked.stdout) == (0, True), checked.stdout


@EBPF
def test_the_seed_is_laid_out(backend: str) -> None:
    """For the first boot of an instance; units get the time that an emulated processor needs."""
    SEED.mkdir(parents=True)
    (SEED / "meta-data").write_text("instance-id: a-guest\nlocal-hostname: guest\n", encoding="utf-8")
    (SEED / "user-data").write_text(user_data(), encoding="utf-8")
    slow_down(UNIT, WATCH, VERIFY.replace("timer", "service"))
