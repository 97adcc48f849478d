# SPDX-License-Identifier: Apache-2.0
"""The packages: built by their one command, the same each time, and what their scripts do to a machine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pexpect
import pytest

from imds_guard import __version__
from imds_guard.kernel.sandbox import Sandbox
from tests.tools import missing, need

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
SCRIPTS = tuple(PACKAGING / "debian" / f"imds-guard.{name}" for name in ("postinst", "prerm", "postrm"))
UNITS = {path.name for path in (ROOT / "src" / "imds_guard" / "data" / "systemd").iterdir()}


def output(*command: str, cwd: Path = ROOT, status: int = 0) -> str:
    """Standard output of a program that must end with ``status``."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


# --- Debian ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packages are made of, so that nobody changes it meanwhile."""
    copy = tmp_path_factory.mktemp("source")
    for part in ("bpf", "docs", "examples", "packaging", "src"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md", "pyproject.toml"):
        shutil.copy2(ROOT / part, copy)
    return copy


@pytest.fixture(scope="module")
def deb(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built by the one command."""
    need("dpkg-buildpackage", "dh")
    control = str(PACKAGING / "debian" / "control")
    asked = subprocess.run(["dpkg-checkbuilddeps", control], stderr=subprocess.PIPE, text=True, check=False)
    if asked.returncode != 0:
        missing(asked.stderr.strip())
    return build(source, tmp_path_factory)


def build(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deb")
    output(str(copy / "packaging" / "build-deb"), str(folder))
    (package,) = folder.glob("*.deb")
    return package


def below(folder: Path) -> set[str]:
    """The files in a folder, as paths from it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def files(package: Path) -> set[str]:
    """What a .deb installs, folders left out."""
    lines = output("dpkg-deb", "--contents", str(package)).splitlines()
    names = [line.split(maxsplit=5)[5].split(" -> ")[0] for line in lines]
    return {name[1:] for name in names if not name.endswith("/")}


def test_the_deb_is_the_same_when_it_is_built_again(
    deb: Path, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("again") / "elsewhere"
    shutil.copytree(source, copy)
    # Another umask's modes, and times of now.
    for path in copy.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path)
    again = build(copy, tmp_path_factory)
    assert sha256(again.read_bytes()).hexdigest() == sha256(deb.read_bytes()).hexdigest()


def test_the_deb_has_all_of_the_program(deb: Path, source: Path) -> None:
    module = "/usr/lib/python3/dist-packages/"
    assert {name[len(module) :] for name in files(deb) if name.startswith(f"{module}imds_guard/")} == {
        *(name for name in below(source / "src") if not name.startswith("imds_guard/data/man/")),
        *(f"imds_guard/{name}" for name in below(source) if name.startswith("bpf/") and name.endswith((".c", ".h"))),
    }


def test_the_deb_has_commands_units_manual_completions_and_a_sample(deb: Path) -> None:
    assert files(deb) >= {
        *("/usr/bin/imds-guard", "/usr/bin/ip-lockdown"),
        *(f"/usr/lib/systemd/system/{name}" for name in UNITS),
        *(
            f"/usr/share/man/{page}.gz"
            for page in ("man8/imds-guard.8", "man8/ip-lockdown.8", "man5/imds-guard.toml.5")
        ),
        *("/usr/share/bash-completion/completions/imds-guard", "/usr/share/bash-completion/completions/ip-lockdown"),
        "/usr/share/zsh/vendor-completions/_imds-guard",
        "/usr/share/fish/vendor_completions.d/imds-guard.fish",
        "/usr/share/doc/imds-guard/examples/config.toml",
    }


def test_the_deb_has_the_pages_and_their_pictures(deb: Path) -> None:
    pages = {f"docs/{name}" for name in below(ROOT / "docs") if name.endswith((".md", ".svg"))}
    assert {name.split("/imds-guard/", 1)[1] for name in files(deb) if name.endswith((".md", ".svg"))} == {
        *pages,
        *("CHANGELOG.md", "README.md", "SECURITY.md", "examples/README.md"),
    }


def test_the_deb_writes_nowhere_else(deb: Path) -> None:
    """Above all not to /etc: a configuration that nobody wrote would be taken at boot."""
    places = (
        "/usr/bin/",
        "/usr/lib/python3/dist-packages/imds_guard",
        "/usr/lib/systemd/system/imds-guard",
        "/usr/share/",
    )
    assert [name for name in files(deb) if not name.startswith(places)] == []


def test_the_commands_run_on_the_systems_python(deb: Path, tmp_path: Path) -> None:
    output("dpkg-deb", "-x", str(deb), str(tmp_path))
    for name in ("imds-guard", "ip-lockdown"):
        first = (tmp_path / "usr" / "bin" / name).read_text(encoding="utf-8").splitlines()[0]
        assert re.fullmatch(r"#! ?/usr/bin/python3 -I", first)


def test_the_deb_depends_on_what_the_project_needs(deb: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert needed is not None
    names = {f"python3-{name}" for name in re.findall(r'"([a-z0-9-]+)[<>=]', needed[1])} | {"python3-bpfcc"}
    depends = output("dpkg-deb", "--field", str(deb), "Depends")
    assert names == set(re.findall(r"python3-[a-z0-9-]+", depends))
    assert "python3 (>= 3.9~)" in depends


def test_lintian_finds_nothing(deb: Path) -> None:
    need("lintian")
    output("lintian", "--fail-on", "error,warning", str(deb))


def test_every_place_names_one_version() -> None:
    changelog = (PACKAGING / "debian" / "changelog").read_text(encoding="utf-8")
    spec = (PACKAGING / "imds-guard.spec").read_text(encoding="utf-8")
    first = re.match(r"imds-guard \((.*)\)", changelog)
    version = re.search(r"^Version: +(.*)$", spec, re.MULTILINE)
    entry = re.search(r"^\* .* - (.*)-1$", spec, re.MULTILINE)
    assert first is not None
    assert version is not None
    assert entry is not None
    assert (first[1], version[1], entry[1]) == (__version__,) * 3


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    need("shellcheck")
    tools = [str(PACKAGING / name) for name in ("build-deb", "build-rpm", "completions")]
    output("shellcheck", *map(str, SCRIPTS), *tools)


# --- completion -----------------------------------------------------------------------------------------------------


@pytest.fixture
def completions(deb: Path, tmp_path: Path) -> Path:
    """/usr/share of the unpacked package, beside a folder bin with an imds-guard that runs it."""
    output("dpkg-deb", "-x", str(deb), str(tmp_path))
    (tmp_path / "bin").mkdir()
    for name, function in {"imds-guard": "main", "ip-lockdown": "ip_lockdown"}.items():
        command = tmp_path / "bin" / name
        command.write_text(
            f"#!/bin/sh\nPYTHONPATH={tmp_path}/usr/lib/python3/dist-packages "
            f"exec /usr/bin/python3 -c 'from imds_guard.cli import {function}; {function}()'\n",
            encoding="utf-8",
        )
        command.chmod(0o755)
    return tmp_path / "usr" / "share"


def in_shell(completions: Path, *command: str, lines: bool = False) -> list[str]:
    path = f"{completions.parents[1]}/bin:{os.environ['PATH']}"
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines() if lines else done.stdout.split()


VALUES = {
    "imds-guard st": {"start", "status", "stop"},
    "imds-guard start --mode ": {"enforce", "audit"},
    "imds-guard start --group roo": {"root"},
    "imds-guard revoke --user nobo": {"nobody"},
    "imds-guard start --preset az": {"azure"},
    "imds-guard start --ip 169.254.4": {"169.254.42.42"},
    "imds-guard explain --user root 169.254.4": {"169.254.42.42"},
    "ip-lockdown 169.254.4": {"169.254.42.42"},
}
"""What is typed -> what TAB offers. The endpoints are those of the built-in table, where nothing is locked."""


@pytest.mark.parametrize("typed", VALUES)
def test_bash_completes(completions: Path, typed: str) -> None:
    words = typed.split(" ")
    script = completions / "bash-completion" / "completions" / words[0]
    function = f"_{words[0].replace('-', '_')}_completion"
    tries = (
        f'COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}; {function} {words[0]}; echo "${{COMPREPLY[@]}}"'
    )
    assert set(in_shell(completions, "bash", "-c", f"source {script}; {tries}")) == VALUES[typed]


@pytest.mark.parametrize("typed", VALUES)
def test_fish_completes(completions: Path, typed: str) -> None:
    need("fish")
    folder = completions / "fish" / "vendor_completions.d"
    loaded = "; ".join(f"source {folder}/{name}.fish" for name in ("imds-guard", "ip-lockdown"))
    found = in_shell(
        completions, "fish", "--no-config", "-c", f"{loaded}; complete -C {shlex.quote(typed)}", lines=True
    )
    assert {line.split("\t")[0] for line in found} == VALUES[typed]


@pytest.mark.parametrize("typed", [typed for typed in VALUES if len(VALUES[typed]) == 1])
def test_zsh_completes(completions: Path, typed: str) -> None:
    """On a terminal, as a user presses TAB: the function is loaded from a file of fpath at that moment."""
    need("zsh")
    folder = completions / "zsh" / "vendor-completions"
    path = f"{completions.parents[1]}/bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PS1": "", "TERM": "dumb", "HOME": str(completions)}
    shell = pexpect.spawn("zsh", ["-f", "-i"], env=environment, encoding="utf-8", timeout=30, echo=False)
    with closing(shell):
        shell.sendline(f"fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -D; echo ready")
        shell.expect_exact("ready\r\n")
        shell.send(f"{typed}\t")
        (value,) = VALUES[typed]
        shell.expect_exact(value)


def test_cgroups_are_completed_level_by_level(completions: Path) -> None:
    """Those in the folder that was typed; not those of other file systems."""
    with Sandbox() as sandbox:
        script = completions / "bash-completion" / "completions" / "imds-guard"
        words = f"(imds-guard status --cgroup {sandbox.cgroup[:-3]})"
        tries = f'COMP_WORDS={words} COMP_CWORD=3; _imds_guard_completion imds-guard; echo "${{COMPREPLY[@]}}"'
        assert in_shell(completions, "bash", "-c", f"source {script}; {tries}") == [sandbox.cgroup]


def test_zsh_runs_the_completion_when_it_loads_it(completions: Path) -> None:
    """A file of fpath is the function's body the first time: registering it alone would lose the first TAB."""
    script = (completions / "zsh" / "vendor-completions" / "_imds-guard").read_text(encoding="utf-8")
    assert script.startswith("#compdef imds-guard\n")
    assert "loadautofunc" in script


# --- what the maintainers' scripts do -------------------------------------------------------------------------------


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace with an /etc of its own needs root")


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A folder with a command imds-guard that notes what it was asked and ends as its file ``status`` says."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "imds-guard"
    command.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\nexit "$(cat {tmp_path}/status)"\n', encoding="utf-8")
    command.chmod(0o755)
    # Asked where the root of process 1 can't be looked at; of a mount namespace it would say "chroot".
    answer = tmp_path / "no-chroot" / "ischroot"
    answer.parent.mkdir()
    answer.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    answer.chmod(0o755)
    (tmp_path / "status").write_text("0", encoding="utf-8")
    (tmp_path / "asked").touch()
    return tmp_path


_OVER = """
mount -t tmpfs tmpfs /run
mkdir /run/upper /run/work
mount -t overlay -o lowerdir=/etc,upperdir=/run/upper,workdir=/run/work overlay /etc
umount -l /run
mount -t tmpfs tmpfs /run
mkdir -p /etc/imds-guard /run/imds-guard /etc/systemd/system/sysinit.target.wants
mkdir -p /etc/systemd/system/networking.service.requires
mount -t tmpfs tmpfs /var/cache
mkdir /var/cache/imds-guard
touch /var/cache/imds-guard/instructions
touch /etc/imds-guard/config.toml /run/imds-guard/command.lock /run/there.service
ln -s /usr/lib/systemd/system/imds-guard-gone.service /etc/systemd/system/sysinit.target.wants/imds-guard.service
ln -s /run/there.service /etc/systemd/system/sysinit.target.wants/imds-guard-watch.service
ln -s /usr/lib/systemd/system/imds-guard-required.service /etc/systemd/system/networking.service.requires/
"""
"""A machine where the units are switched on; the watch's is of another installation."""

_WHAT_IS_LEFT = """
find /etc/systemd/system -name 'imds-guard*' -printf '%f\\n' | sort
find /etc/imds-guard /run/imds-guard /var/cache/imds-guard -type f -printf '%f\\n' 2>/dev/null | sort
"""


PURGE = ("prerm remove", "postrm remove", "postrm purge")
MADE_BY_THE_PACKAGE = "mkdir -p /etc/imds-guard/config.d"


def after(stage: Path, *calls: str, before: str = "", look: str = "") -> list[str]:
    """The names of what is left after calls of the scripts, in namespaces of their own without a systemd.

    ``before`` runs before them; what ``look`` prints follows.
    """
    lines = "\n".join(f"sh {PACKAGING}/debian/imds-guard.{call}" for call in calls)
    path = f"PATH={stage}/bin:{stage}/no-chroot:/usr/sbin:/usr/bin:/sbin:/bin"
    script = f"set -e\n{_OVER}\n{before}\n{path}\n{lines}\n{_WHAT_IS_LEFT}\n{look}"
    return output("unshare", "--mount", "--net", "sh", "-c", script).split()


def asked(stage: Path) -> list[str]:
    return (stage / "asked").read_text(encoding="utf-8").splitlines()


EVERYTHING = [
    "imds-guard-required.service",
    "imds-guard-watch.service",
    "imds-guard.service",
    "command.lock",
    "config.toml",
    "instructions",
]


@needs_root
@pytest.mark.parametrize(
    "calls", [["postinst configure"], ["prerm upgrade 0.2", "postrm upgrade 0.2", "postinst configure 0.1"]]
)
def test_installation_and_upgrade_neither_open_nor_lock_nor_remove(stage: Path, calls: Sequence[str]) -> None:
    assert after(stage, *calls) == EVERYTHING
    assert asked(stage) == []


@needs_root
def test_removal_opens_the_lock_and_keeps_configuration_and_what_is_switched_on(stage: Path) -> None:
    """All but what would leave the next boot without a network."""
    assert after(stage, "prerm remove", "postrm remove") == [
        *("imds-guard-watch.service", "imds-guard.service", "config.toml"),
    ]
    assert asked(stage) == ["stop --all"]


@needs_root
def test_purge_leaves_nothing_but_what_is_of_another_installation(stage: Path) -> None:
    purged = after(stage, *PURGE, before=MADE_BY_THE_PACKAGE, look="ls -d /etc/imds-guard* 2>/dev/null || :")
    assert purged == ["imds-guard-watch.service"]


@needs_root
def test_purge_leaves_drop_ins(stage: Path) -> None:
    """They may belong to another package."""
    before = f"{MADE_BY_THE_PACKAGE}; touch /etc/imds-guard/config.d/team.toml /etc/imds-guard/config.toml.old"
    assert after(stage, *PURGE, before=before) == ["imds-guard-watch.service", "team.toml"]


@needs_root
def test_the_account_of_the_filter_comes_and_goes_with_the_package(stage: Path) -> None:
    """It has no home, no shell, and a group of its own. A second installation makes no other one."""
    calls = ["postinst configure", "postinst configure 0.1", "postrm remove"]
    lines = "\n".join(f"sh {PACKAGING}/debian/imds-guard.{call}\n{_ACCOUNT}" for call in calls)
    path = f"PATH={stage}/bin:{stage}/no-chroot:/usr/sbin:/usr/bin:/sbin:/bin"
    script = f"set -e\n{_OVER}\n{path}\n{_ACCOUNT}\n{lines}"
    there = ["filter of imds-guard:/nonexistent:/usr/sbin/nologin", "1"]
    said = output("unshare", "--mount", "--net", "sh", "-c", script).splitlines()
    assert said == ["none", *there, *there, "none"]


_ACCOUNT = """
if grep imds-guard-filter /etc/passwd | cut -d: -f5- | grep .; then
  grep -c imds-guard-filter /etc/group
else
  echo none
fi
"""


@needs_root
def test_removal_in_a_chroot_leaves_the_machines_lock_alone(stage: Path) -> None:
    root = stage / "root"
    commands = "\n".join(
        (
            f"mkdir {root}",
            f"mount -t tmpfs tmpfs {root}",
            f"mkdir -p {root}/usr {root}/proc {root}{PACKAGING} {root}{stage}/bin",
            f"mount --rbind /usr {root}/usr",
            f"mount --rbind /proc {root}/proc",
            f"mount --bind {PACKAGING} {root}{PACKAGING}",
            f"mount --bind {stage}/bin {root}{stage}/bin",
            f"for name in bin lib lib64 sbin; do ln -s usr/$name {root}/$name; done",
            f"PATH={stage}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            f"chroot {root} test -x {stage}/bin/imds-guard",
            f"chroot {root} sh {PACKAGING}/debian/imds-guard.prerm remove",
        )
    )
    output("unshare", "--mount", "--net", "sh", "-ec", commands)
    assert asked(stage) == []


@needs_root
@pytest.mark.parametrize("status", [69, 77])
def test_removal_goes_on_where_no_lock_could_be(stage: Path, status: int) -> None:
    (stage / "status").write_text(str(status), encoding="utf-8")
    assert "imds-guard.service" in after(stage, "prerm remove")


@needs_root
def test_removal_is_refused_when_the_lock_could_not_be_opened(stage: Path) -> None:
    """Nothing else could open it afterwards."""
    (stage / "status").write_text("1", encoding="utf-8")
    with pytest.raises(AssertionError, match="could not be opened"):
        after(stage, "prerm remove")


# --- RPM ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rpm(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("rpmbuild")
    folder = tmp_path_factory.mktemp("rpm")
    output(str(source / "packaging" / "build-rpm"), str(folder), "--nodeps")
    (package,) = folder.glob("*.rpm")
    return package


def listed(package: Path) -> set[str]:
    return set(output("rpm", "--query", "--list", "--package", str(package)).splitlines())


def test_the_rpm_has_what_the_deb_has(rpm: Path, deb: Path) -> None:
    def bare(name: str) -> str:
        for pattern, place in (
            (r"/usr/lib/python3/dist-packages/|/usr/share/imds-guard/", "module/"),
            (r"/usr/share/zsh/(vendor-completions|site-functions)/", "zsh/"),
            (r"\.gz$", ""),
        ):
            name = re.sub(pattern, place, name)
        return name

    def compared(names: set[str]) -> set[str]:
        left_out = re.compile(
            r"/usr/share/(doc|licenses|lintian)/|module/imds_guard-[0-9.]+\.dist-info/|module/.*__pycache__"
        )
        return {bare(name) for name in names if not left_out.match(bare(name))}

    in_rpm = {name for name in listed(rpm) if not any(other.startswith(f"{name}/") for other in listed(rpm))}
    assert compared(in_rpm) - {"/etc/imds-guard/config.d"} == compared(files(deb))


def test_rpmlint_finds_no_error(rpm: Path) -> None:
    need("rpmlint")
    output("rpmlint", "--config", str(PACKAGING / "rpmlint.toml"), str(PACKAGING / "imds-guard.spec"), str(rpm))


def test_the_rpms_scripts_are_shell(rpm: Path, tmp_path: Path) -> None:
    need("shellcheck")
    text = output("rpm", "--query", "--scripts", "--package", str(rpm))
    bodies = re.split(r"^(?:pre|post)(?:un)?install scriptlet \(using /bin/sh\):\n", text, flags=re.MULTILINE)[1:]
    assert len(bodies) == 4
    for number, body in enumerate(bodies):
        script = tmp_path / f"{number}.sh"
        script.write_text(body, encoding="utf-8")
        output("shellcheck", "--shell=sh", str(script))
