# SPDX-License-Identifier: Apache-2.0
"""./run, which installs missing packages: its messages and its exit status."""

from __future__ import annotations

import hashlib
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from imds_guard import __version__
from tests import command

ROOT = Path(__file__).resolve().parents[2]


def run(words: Sequence[str], cwd: Path, script: Path = ROOT / "run", **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the script without this machine's PIP_* variables."""
    environment: dict[str, str] = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment.update(more)
    return subprocess.run([str(script), *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_it_finds_its_tree_from_anywhere(tmp_path: Path) -> None:
    """Also through a symbolic link, and in a folder with modules of the same names."""
    (tmp_path / "imds_guard.py").write_text("raise SystemExit('somebody else')")
    (tmp_path / "guard").symlink_to(ROOT / "run")
    done = run(["--version"], tmp_path, tmp_path / "guard")
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups needs root")
def test_messages_name_the_command_as_it_was_called(tmp_path: Path) -> None:
    """In a clone there is no program imds-guard. What only the package has keeps its name."""
    assert run(["start", "--help"], tmp_path).stdout.startswith(f"Usage: {ROOT}/run start [OPTIONS]\n")
    with command.guard() as guard:
        done = run(["watch", "--once", "--cgroup", guard.sandbox.cgroup], tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("imds-guard: ")
    assert f": run {ROOT}/run start first" in done.stderr


def test_packages_that_pip_can_not_install_are_reported(tmp_path: Path) -> None:
    """With pip's message and a sentence of ours; the next run does not use the unfinished environment."""
    venv = tmp_path / "venv"
    done = run(["test"], tmp_path, IMDS_GUARD_VENV=str(venv), PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert (done.returncode, done.stdout) == (69, "")
    said = done.stderr.splitlines()
    assert said[0] == f"run: making the tests' environment in {venv} (packages from PyPI)"
    assert "No matching distribution found" in done.stderr
    assert said[-1].startswith("run: pip could not install ")
    assert not (venv / ".stamp").exists()


def test_what_pytest_is_started_with(tmp_path: Path) -> None:
    """``test --fast`` runs tests/unit; without arguments all tests run, in two processes; arguments go to pytest."""
    assert pytest_arguments(tmp_path)[:4] == ["-m", "pytest", "-n", "2"]
    assert pytest_arguments(tmp_path, "--fast", "-k", "gate") == ["-m", "pytest", "tests/unit", "-k", "gate"]
    assert pytest_arguments(tmp_path, "-k", "gate") == ["-m", "pytest", "-k", "gate"]


def pytest_arguments(folder: Path, *words: str) -> list[str]:
    """The arguments that ``./run test`` starts Python with, from an environment that is up to date and prints them."""
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n", encoding="utf-8")
    python.chmod(0o755)
    version = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    (folder / ".stamp").write_text(f"{ROOT}\n{version}{digest}  -\n", encoding="utf-8")
    done = run(["test", *words], folder, IMDS_GUARD_VENV=str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


# --- what it installs -----------------------------------------------------------------------------------------------

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="others are told to use sudo, and nothing is installed")

FAKE_PYTHON = """#!/bin/sh
# Asked for modules it lacks pip until the fake apt-get has installed it.
case $1 in
  -I) cat >/dev/null; [ -e "$(dirname "$0")/installed" ] || echo pip ;;
  *) echo "usage: run.py" ;;
esac
"""

FAKE_APT = """#!/bin/sh
# Says how far it is on descriptor 3, also when nobody reads any more, then finishes.
cd "$(dirname "$0")" || exit 1
echo "$@" >>calls
echo unpacking
echo dlstatus:1:42.5:Retrieving >&3
while [ -e reader ]; do sleep 0.01; done
i=0
while [ $i -lt 2000 ]; do echo "setting up $i" && echo "pmstatus:pip:7.5:words: $i" >&3 || exit 100; i=$((i + 1)); done
: >installed
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with a copy of ``run`` whose Python lacks pip, and an apt-get that writes its arguments to calls."""
    text = (ROOT / "run").read_text(encoding="utf-8")
    assert text.count("\npython=/usr/bin/python3\n") == 1
    files = {"run": text.replace("=/usr/bin/python3\n", f"={tmp_path}/python3\n"), "python3": FAKE_PYTHON}
    for name, content in {**files, "apt-get": FAKE_APT}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def on(machine: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(words, machine, machine / "run", PATH=f"{machine}:{os.environ['PATH']}")


@as_root
@pytest.mark.parametrize("words", [["--help"], ["-h"], ["run", "--help"], ["exec", "-h", "row"]])
def test_the_matrix_prints_its_help_and_installs_nothing(machine: Path, words: list[str]) -> None:
    done = on(machine, "matrix", *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "usage: run.py\n", "")
    assert not (machine / "calls").exists()


@as_root
@pytest.mark.parametrize("words", [[], ["lockdown"], ["exec", "lockdown", "--", "ls", "--help"]])
def test_the_matrix_installs_what_is_missing(machine: Path, words: list[str]) -> None:
    """Behind -- are the arguments of the guest's command."""
    done = on(machine, "matrix", *words)
    assert (done.returncode, done.stdout) == (0, "usage: run.py\n")
    installing, *more = done.stderr.splitlines()
    assert installing.startswith("run: installing ")
    assert [line for line in more if not line.startswith("run: continuing without: ")] == []
    assert "python3-pip" in (machine / "calls").read_text(encoding="utf-8")


@as_root
def test_each_package_is_named_once(machine: Path) -> None:
    """Where Python is missing, all its modules are, too, for whatever they are needed."""
    (machine / "python3").unlink()
    done = on(machine, "start")
    names = done.stderr.splitlines()[0].removeprefix("run: installing ").removesuffix(" (apt)").split()
    assert {"python3", "python3-bpfcc", "python3-click"} <= set(names)
    assert len(names) == len(set(names))


@as_root
def test_on_a_terminal_the_progress_is_one_line(machine: Path) -> None:
    """What was there is overwritten, and nothing of it stays."""
    terminal, ours = pty.openpty()
    environment = {**os.environ, "PATH": f"{machine}:{os.environ['PATH']}"}
    with subprocess.Popen([machine / "run", "matrix"], env=environment, stdout=ours, stderr=ours) as started:
        os.close(ours)
        said = read_terminal(terminal)
        assert started.wait(timeout=60) == 0
    progress, *more = said.removeprefix(said.split("\n")[0] + "\n").split("\n")
    assert "\r\x1b[Krun: downloading: 42 %" in progress
    assert "\r\x1b[Krun: installing: 7 %" in progress
    assert progress.rpartition("\x1b[K")[2] in ("usage: run.py\r", "")  # how a terminal shows the line in the end
    assert not any("%" in line for line in more)


def read_terminal(terminal: int) -> str:
    """All that is written to it until nobody has its other end open."""
    said = b""
    with os.fdopen(terminal, "rb", buffering=0) as reader, suppress(OSError):  # EIO at the end
        while block := reader.read(4096):
            said += block
    return said.decode()


@as_root
def test_words_of_apt_are_printed_when_it_fails(machine: Path) -> None:
    """Once for each attempt that can't be helped: the first one may only lack new package lists."""
    (machine / "apt-get").write_text("#!/bin/sh\necho E: nothing works\nexit 100\n", encoding="utf-8")
    said = on(machine, "matrix", "--list").stderr.splitlines()
    assert said[1:5] == [
        "run: updating the package lists (apt-get update)",
        "E: nothing works",
        "run: apt-get update failed",
        "E: nothing works",
    ]
    assert said[5].endswith(" could not be installed")


@as_root
@pytest.mark.parametrize("status", [0, 100])
def test_what_is_required_and_can_not_be_installed_ends_the_run(machine: Path, status: int) -> None:
    """Also when the package manager reports success."""
    (machine / "apt-get").write_text(f"#!/bin/sh\nexit {status}\n", encoding="utf-8")
    done = on(machine, "matrix", "--list")
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.splitlines()[-1] == "run: still missing: pip: see the messages above"


@as_root
def test_an_installation_outlives_the_reader_of_its_output(machine: Path) -> None:
    """``./run matrix |& head -1``: a package manager that SIGPIPE ends leaves packages half configured."""
    (machine / "reader").touch()
    environment = {**os.environ, "PATH": f"{machine}:{os.environ['PATH']}"}
    output, ours = os.pipe()
    with subprocess.Popen([machine / "run", "matrix"], env=environment, stdout=ours, stderr=ours) as started:
        os.close(ours)
        with os.fdopen(output, encoding="utf-8") as reader:
            assert reader.readline().startswith("run: installing ")
        (machine / "reader").unlink()
        started.wait(timeout=60)
    assert (machine / "installed").exists()


def test_a_closed_pipe_ends_the_list_of_rows_without_a_traceback() -> None:
    """``./run matrix --list | head -0``."""
    output, ours = os.pipe()
    os.close(output)
    with os.fdopen(ours, "wb") as closed:
        program = [sys.executable, str(ROOT / "vagrant" / "run.py"), "--list"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(program, stdout=closed, stderr=subprocess.PIPE, env=environment, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_help_of_the_matrix_needs_no_toml_parser() -> None:
    """Python 3.9 and 3.10 have none, and help installs nothing."""
    hidden = "import sys; sys.modules.update(tomllib=None, tomli=None); sys.argv[1:] = ['--help']"
    program = f"{hidden}; import runpy; runpy.run_path({str(ROOT / 'vagrant' / 'run.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ./run matrix")
