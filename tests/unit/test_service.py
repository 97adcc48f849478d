# SPDX-License-Identifier: Apache-2.0
"""The units, and the refusals of install-service. vagrant/guest/test_5_service.py tries the units in a guest."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import imds_guard
from imds_guard.commands import filter_service, metrics_timer, own_files, service, unit_files
from imds_guard.commands.filter_places import WantedPlaces
from imds_guard.errors import AnswerLost, BadPolicy, GuardError, NotPermitted, UsageError
from imds_guard.kernel import notify, systemd
from imds_guard.watch.process_info import MAX_ABANDONED
from tests.tools import need
from tests.tree import every_command

UNITS = Path(imds_guard.__file__).parent / "data" / "systemd"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
GUARDING = [name for name in SERVICES if name not in ("imds-guard-watch.service", "imds-guard-filter.service")]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes files of root")


def settings(name: str) -> dict[str, list[tuple[str, str]]]:
    """Section -> (key, value) pairs, in order; a key may come twice."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in (UNITS / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.append((key, value))
    return found


def of(name: str, section: str, key: str) -> list[str]:
    """The values of all lines of a key, split at blanks."""
    return [word for one, value in settings(name)[section] if one == key for word in value.split()]


def hardening(name: str) -> list[tuple[str, str]]:
    """All settings from the capabilities on, but for the addresses: those of what makes no listener are limited."""
    pairs = settings(name)["Service"]
    found = pairs[[key for key, _ in pairs].index("CapabilityBoundingSet") :]
    return [(key, value) for key, value in found if not key.startswith("IPAddress")]


# --- the units ------------------------------------------------------------------------------------------------------


def test_every_unit_file_is_installed() -> None:
    assert sorted(path.name for path in UNITS.iterdir()) == sorted(service.UNITS)


def test_a_unit_may_be_restarted_as_often_as_somebody_likes() -> None:
    """After five starts in ten seconds systemd would refuse the next one (systemd.unit(5))."""
    assert of(service.MAIN, "Unit", "StartLimitIntervalSec") == ["0"]


@pytest.mark.parametrize("name", GUARDING)
def test_an_answer_that_is_lost_fails_no_unit(name: str) -> None:
    assert str(AnswerLost.exit_status) in of(name, "Service", "SuccessExitStatus")


@pytest.mark.parametrize("name", GUARDING)
def test_the_cache_is_optional(name: str) -> None:
    """A unit whose ReadWritePaths= are not there fails, unless the path begins with "-" (systemd.exec(5))."""
    assert "-/var/cache/imds-guard" in of(name, "Service", "ReadWritePaths")


@pytest.mark.parametrize("name", GUARDING)
def test_units_that_change_or_read_the_guard_have_the_same_hardening(name: str) -> None:
    """systemd has no include, so each file repeats these options."""
    assert hardening(name) == hardening("imds-guard.service")


@pytest.mark.parametrize("name", SERVICES)
def test_every_command_and_option_of_a_unit_exists(name: str) -> None:
    commands = [value for key, value in settings(name)["Service"] if key.startswith("Exec")]
    assert commands
    for command in commands:
        program, word, *words = command.split()
        assert program == unit_files.PROGRAM
        taken = {option for one in every_command()[word].params for option in one.opts}
        assert {one for one in words if one.startswith("--")} <= taken


def test_the_lock_comes_before_the_network_and_container_runtimes() -> None:
    before = of("imds-guard.service", "Unit", "Before")
    assert {"network-pre.target", "docker.service", "containerd.service", "kubelet.service"} <= set(before)
    assert "network-pre.target" in of("imds-guard.service", "Unit", "Wants")


def test_neither_shutdown_nor_isolate_stops_the_lock() -> None:
    for name in ("imds-guard.service", "imds-guard-required.service"):
        unit = dict(settings(name)["Unit"])
        assert (unit["DefaultDependencies"], unit["IgnoreOnIsolate"], unit.get("Conflicts")) == ("no", "yes", None)


def test_no_unit_hides_the_bpffs_of_the_machine() -> None:
    """These settings give the unit another /sys/fs/bpf or a read-only one, or forbid what pins need."""
    for name in SERVICES:
        keys = {key for key, _ in settings(name)["Service"]}
        assert keys.isdisjoint(
            {"ProtectKernelTunables", "PrivateUsers", "RootDirectory", "PrivateNetwork", "PrivatePIDs", "PrivateBPF"}
        )
        assert "/sys/fs/bpf" in of(name, "Service", "ReadWritePaths")


def test_stopping_the_lock_does_not_stop_the_network() -> None:
    """The network requires the gate, which depends on no unit that is restarted."""
    gate = settings("imds-guard-required.service")
    assert {key for key, _ in gate["Unit"]}.isdisjoint({"Requires", "Requisite", "BindsTo", "PartOf"})
    assert set(service._required_by()) >= {"systemd-networkd.service", "NetworkManager.service", "networking.service"}
    assert set(service._required_by()) - {"ifup@.service"} <= set(of("imds-guard-required.service", "Unit", "Before"))


def test_the_filter_ends_with_the_lock_as_a_whole_and_when_it_hangs() -> None:
    """A process that is left behind would keep listening, and callers would wait for it."""
    assert of("imds-guard-filter.service", "Unit", "PartOf") == ["imds-guard.service"]
    assert of("imds-guard-filter.service", "Unit", "After") == ["imds-guard.service"]
    unit = dict(settings("imds-guard-filter.service")["Service"])
    assert (unit["Type"], unit["KillMode"], unit["Restart"]) == ("notify", "control-group", "always")
    assert int(unit["WatchdogSec"].rstrip("s")) > 0
    assert (unit["IPAddressDeny"], unit["IPAddressAllow"]) == ("any", "localhost")


def test_a_unit_that_makes_listeners_for_the_filter_refuses_no_address() -> None:
    """A socket keeps the IPAddressDeny= of the unit that made it, and callers may have any address of the machine."""
    limited = [name for name in GUARDING if of(name, "Service", "IPAddressDeny")]
    assert limited == ["imds-guard-metrics.service"]


@pytest.mark.parametrize(("marked", "expected"), [(True, "127.0.0.0/8 ::1/128"), (False, "any")])
def test_the_filter_is_reached_from_every_address_that_a_caller_may_have(
    monkeypatch: pytest.MonkeyPatch, marked: bool, expected: str
) -> None:
    """DNAT does not change the source of a packet. The hooks lead a caller before it has one."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(systemd, "is_booted", lambda: True)
    monkeypatch.setattr(systemd, "systemctl", lambda *words: asked.append(words))
    filter_service._allow_addresses(WantedPlaces(marked=marked), is_service=True)
    (words,) = asked
    assert words[-2:] == ("IPAddressAllow=", f"IPAddressAllow={expected}")


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """systemd-analyze warns of options that it does not know."""
    need("systemd-analyze")
    from tests.command import run

    for unit in UNITS.iterdir():
        text = unit.read_text(encoding="utf-8").replace(unit_files.PROGRAM, "/bin/true")
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
    metrics_timer.write_drop_in(str(tmp_path), "/bin/true", str(tmp_path))
    units = [path for path in tmp_path.iterdir() if path.is_file()]
    said = run(["systemd-analyze", "verify", "--man=no", *(str(path) for path in sorted(units))])
    ours = [line for line in said.stderr.splitlines() if "imds-guard" in line]
    assert (said.status, ours) == (0, [])


def test_rules_are_put_back_after_a_service_that_flushes_them() -> None:
    """After each start, restart and reload of it. It must be stopped with its service, or the next start leaves it."""
    for key in ("PartOf", "ReloadPropagatedFrom"):
        assert of(service.RULES, "Unit", key) == ["%i.service"]
    assert of(service.RULES, "Install", "WantedBy") == ["%i.service"]
    assert {"imds-guard.service", "%i.service"} <= set(of(service.RULES, "Unit", "After"))
    assert of(service.RULES, "Service", "RemainAfterExit") == ["yes"]
    commands = {value for key, value in settings(service.RULES)["Service"] if key.startswith("Exec")}
    assert commands == {f"{unit_files.PROGRAM} verify --repair --no-start"}


def test_the_lock_waits_for_no_service_that_flushes_rules() -> None:
    """On Fedora and RHEL these wait for sysinit.target, which waits for the lock: systemd would drop one of them."""
    assert set(of(service.MAIN, "Unit", "After")).isdisjoint(f"{name}.service" for name in service.FLUSHING)


def test_the_units_after_such_services_belong_to_verify() -> None:
    options = service.ServiceOptions(verify=True)
    assert options.instances["nftables.service"] == "imds-guard-rules@nftables.service"
    assert set(options.instances) == {f"{name}.service" for name in service.FLUSHING}
    assert service.ServiceOptions().instances == {}


# --- refusals of install-service ------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An imds-guard in a folder that services see and only root can write to."""
    folder = Path("/opt") / f"imds-guard-test-{os.getpid()}-{tmp_path_factory.mktemp('x').parent.name}"
    folder.mkdir(mode=0o755)
    try:
        one = folder / "imds-guard"
        one.write_text("#!/bin/sh\n", encoding="utf-8")
        one.chmod(0o755)
        yield str(one)
    finally:
        shutil.rmtree(folder)


@as_root
def test_a_program_that_only_root_can_write_is_accepted(program: str) -> None:
    assert service.check_program(program) == program


@pytest.mark.parametrize("path", [f"{Path(imds_guard.__file__).parent}/__main__.py", "/nonexistent/imds-guard", "-c"])
def test_a_source_tree_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="runs from a source tree"):
        service.check_program(path)


@as_root
@pytest.mark.parametrize("which", ["imds-guard", "."])
def test_a_program_that_others_can_change_is_refused(program: str, which: str) -> None:
    """The program or its folder belongs to another user."""
    os.chown(os.path.join(os.path.dirname(program), which), 41_001, 51_001)
    with pytest.raises(NotPermitted, match="can be changed by others than root"):
        service.check_program(program)


@as_root
def test_a_program_whose_interpreter_others_can_change_is_refused(program: str) -> None:
    interpreter = Path(program).parent / "python3"
    interpreter.write_text("", encoding="utf-8")
    Path(program).write_text(f"#!{interpreter} -I\n", encoding="utf-8")
    assert service.check_program(program) == program
    os.chown(interpreter, 41_001, 0)
    with pytest.raises(NotPermitted, match=rf"{interpreter} \(owner 41001"):
        service.check_program(program)


@as_root
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
@pytest.mark.parametrize("which", ["imds-guard", "."])
def test_a_program_that_everybody_may_write_is_refused(program: str, which: str, mode: int) -> None:
    """The program or its folder belongs to root:root. In a sticky folder others can make files, too."""
    os.chmod(os.path.join(os.path.dirname(program), which), mode)
    with pytest.raises(NotPermitted, match="can be changed by others than root"):
        service.check_program(program)


@as_root
@pytest.mark.parametrize("which", ["imds-guard", "."])
def test_the_group_root_may_write_a_program(program: str, which: str) -> None:
    """Some packages install files of root:root with mode 0775."""
    os.chmod(os.path.join(os.path.dirname(program), which), 0o775)
    assert service.check_program(program) == program


@as_root
def test_a_package_that_others_can_change_is_refused(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is root's alone, but it runs modules that somebody else can change. No unit is written."""
    package, folder = Path(program).parent / "package", tmp_path / "units"
    package.mkdir(mode=0o755)
    folder.mkdir()
    os.chmod(package, 0o777)
    monkeypatch.setattr(own_files, "PACKAGE", str(package))
    monkeypatch.setattr(service, "_check_configuration", lambda *_: [])
    with pytest.raises(NotPermitted, match=rf"{package} \(.*mode 0777\) can be changed by others than root"):
        service.install(service.ServiceOptions(), program, str(tmp_path / "config.toml"), str(folder))
    assert list(folder.iterdir()) == []


@as_root
@pytest.mark.parametrize("which", ["folder", "folder/module.py", "folder/link.py"])
def test_every_file_of_the_package_counts(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where somebody copied it, and gave only the folder to root."""
    package, elsewhere = tmp_path / "package", tmp_path / "elsewhere.py"
    (package / "folder").mkdir(parents=True)
    for path in (package / "folder" / "module.py", elsewhere):
        path.write_text("", encoding="utf-8")
    (package / "folder" / "link.py").symlink_to(elsewhere)
    monkeypatch.setattr(own_files, "PACKAGE", str(package))
    assert own_files.package_open_to_others() is None
    os.chown(package / which, 41_001, 0)
    assert str(own_files.package_open_to_others()).startswith(
        f"{elsewhere if which.endswith('link.py') else package / which} (owner 41001"
    )


@as_root
def test_a_link_into_a_hidden_folder_is_refused(program: str, tmp_path: Path) -> None:
    """Services do not see /home, /root and /tmp; the target of a link counts, too."""
    shutil.move(program, tmp_path / "imds-guard")
    os.symlink(tmp_path / "imds-guard", program)
    with pytest.raises(UsageError, match="in a folder that services do not see"):
        service.check_program(program)


@as_root
def test_without_a_usable_configuration_nothing_is_written(program: str, tmp_path: Path) -> None:
    path, folder = tmp_path / "config.toml", tmp_path / "units"
    folder.mkdir()
    with pytest.raises(BadPolicy, match=r"there is no configuration .* for it"):
        service.install(service.ServiceOptions(), program, str(path), str(folder))
    path.write_text("[lock.default]\n", encoding="utf-8")
    with pytest.raises(BadPolicy, match=r"config\.toml:1: lock 'default' allows nobody|locks nothing"):
        service.install(service.ServiceOptions(), program, str(path), str(folder))
    assert list(folder.iterdir()) == []


@as_root
def test_a_configuration_that_shuts_out_a_client_is_refused(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --without-root it is accepted."""
    from imds_guard.commands import preflight

    client = preflight.Client("cloud-init", ("cloud-init",), (), paths=(program,))
    monkeypatch.setattr(preflight, "CLIENTS", (client,))
    path = tmp_path / "config.toml"
    path.write_text('[lock.default]\npreset = "default"\nusers = [41001]\n', encoding="utf-8")
    with pytest.raises(BadPolicy, match=r"it would shut out cloud-init .*; allow the account, or add --without-root$"):
        service._check_configuration(service.ServiceOptions(), str(path))
    service._check_configuration(service.ServiceOptions(without_root=True), str(path))


def test_a_unit_runs_the_program_that_installs_it(tmp_path: Path) -> None:
    """A second installation writes nothing."""
    first = service._install_unit("imds-guard.service", "/opt/a b/imds-guard", str(tmp_path))
    again = service._install_unit("imds-guard.service", "/opt/a b/imds-guard", str(tmp_path))
    path = tmp_path / "imds-guard.service"
    assert (first, again) == ([f"wrote {path}"], [f"{path} is there already"])
    text = path.read_text(encoding="utf-8")
    assert text.startswith(unit_files.MARK)
    assert 'ExecStart="/opt/a b/imds-guard" start --boot\n' in text
    assert unit_files.PROGRAM not in text


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (service.ServiceOptions(), {"imds-guard.service"}),
        (service.ServiceOptions(watch=True), {"imds-guard.service", "imds-guard-watch.service"}),
        (
            service.ServiceOptions(verify=True),
            {"imds-guard.service", "imds-guard-verify.timer", "imds-guard-verify.service", "imds-guard-rules@.service"},
        ),
        (service.ServiceOptions(require_lock=True), {"imds-guard.service", "imds-guard-required.service"}),
        (service.ServiceOptions(filter=True), {"imds-guard.service", "imds-guard-filter.service"}),
        (
            service.ServiceOptions(textfile="/srv"),
            {"imds-guard.service", "imds-guard-metrics.timer", "imds-guard-metrics.service"},
        ),
    ],
)
def test_options_choose_the_files(options: service.ServiceOptions, files: list[str]) -> None:
    assert set(options.files) == set(files)


# --- the metrics ----------------------------------------------------------------------------------------------------


def test_the_metrics_are_written_while_the_lock_is_stopped() -> None:
    """imds_guard_active becomes 0 then, which is what somebody alerts on."""
    for name in (service.METRICS, metrics_timer.SERVICE):
        keys = {key for key, _ in settings(name)["Unit"]}
        assert keys.isdisjoint({"PartOf", "BindsTo", "Requires", "Requisite", "Conflicts"})
    assert of(service.METRICS, "Install", "WantedBy") == ["timers.target"]


def test_the_unit_may_write_to_the_folder_of_the_file() -> None:
    unit = dict(settings(metrics_timer.SERVICE)["Service"])
    file = f"{metrics_timer.FOLDER}/{metrics_timer.FILE}"
    assert unit["ExecStart"] == f"{unit_files.PROGRAM} metrics --textfile {file}"
    assert f"-{metrics_timer.FOLDER}" in of(metrics_timer.SERVICE, "Service", "ReadWritePaths")


def test_a_drop_in_names_another_folder_and_goes_when_it_is_not_needed(tmp_path: Path) -> None:
    folder, units = tmp_path / "collector", tmp_path / "units"
    folder.mkdir()
    units.mkdir()
    path = units / f"{metrics_timer.SERVICE}.d" / "textfile.conf"
    assert metrics_timer.write_drop_in(str(folder), "/opt/a b/imds-guard", str(units)) == [f"wrote {path}"]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:3] == [unit_files.MARK, "[Service]", "ExecStart="]
    assert f'ExecStart="/opt/a b/imds-guard" metrics --textfile {folder}/imds-guard.prom' in lines
    assert f"ReadWritePaths={folder}" in lines
    again = metrics_timer.write_drop_in(str(folder), "/opt/a b/imds-guard", str(units))
    assert again == [f"{path} is there already"]
    assert metrics_timer.remove_drop_in(str(units)) == [f"removed {path}"]
    assert list(units.iterdir()) == []
    assert metrics_timer.remove_drop_in(str(units)) == []


def test_the_exposure_is_not_above_that_of_the_lock(tmp_path: Path) -> None:
    """By "systemd-analyze security" of systemd 250 and later. It starts nothing."""
    need("systemd-analyze")
    from tests.command import run

    def exposure(name: str) -> float:
        text = (UNITS / name).read_text(encoding="utf-8").replace(unit_files.PROGRAM, "/bin/true")
        (tmp_path / name).write_text(text, encoding="utf-8")
        said = run(["systemd-analyze", "security", "--offline=true", "--no-pager", str(tmp_path / name)])
        if "unrecognized option" in said.stderr:
            pytest.skip("this systemd-analyze rates no file")
        return float(said.stdout.rpartition("exposure level for ")[2].split()[1])

    assert exposure(metrics_timer.SERVICE) <= exposure(service.MAIN)


def test_a_drop_in_of_the_administrator_stays(tmp_path: Path) -> None:
    path = tmp_path / f"{metrics_timer.SERVICE}.d" / "textfile.conf"
    path.parent.mkdir()
    path.write_text("[Service]\nNice=0\n", encoding="utf-8")
    assert metrics_timer.remove_drop_in(str(tmp_path)) == []
    assert path.exists()


@pytest.mark.parametrize("is_of_root", [True, False])
def test_only_a_folder_of_another_user_needs_a_capability(is_of_root: bool) -> None:
    text = metrics_timer.drop_in("/srv/x", unit_files.PROGRAM, is_of_root)
    assert ("CapabilityBoundingSet=CAP_DAC_OVERRIDE\n" in text) is not is_of_root
    assert bool(metrics_timer.drop_in(metrics_timer.FOLDER, unit_files.PROGRAM, is_of_root)) is not is_of_root


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("absent", "there is no such folder"),
        ("file", "there is no such folder"),
        ("a b", "take a path of letters, digits"),
        ("a%h", "take a path of letters, digits"),
    ],
)
def test_a_folder_that_the_unit_can_not_use_is_refused(folder: str, message: str, tmp_path: Path) -> None:
    for name in ("a b", "a%h"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        metrics_timer.check_folder(str(tmp_path / folder), ())


def test_a_folder_that_services_do_not_see_is_refused(tmp_path: Path) -> None:
    """A symbolic link is followed first."""
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(UsageError, match="services do not see that folder"):
            metrics_timer.check_folder(str(folder), ("/nonexistent", str(tmp_path)))
    assert metrics_timer.check_folder(str(tmp_path / "link"), ()) == str(tmp_path)


# --- sd_notify ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["path", "@abstract"])
def test_ready_is_a_datagram_to_the_socket_in_the_environment(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket has a path or an abstract address (unix(7))."""
    address = str(tmp_path / "notify") if name == "path" else f"@imds-guard-test-{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(address if name == "path" else "\0" + address[1:])
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert notify.ready("reading denials")
        assert one.recv(1000) == b"READY=1\nSTATUS=reading denials"
        assert notify.notify("STOPPING=1")
        assert one.recv(1000) == b"STOPPING=1"


def test_without_a_socket_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.ready()


def test_a_missing_socket_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with pytest.raises(GuardError, match=r"sending 'READY=1' to the service manager at .*: ENOENT"):
        notify.ready()


def test_the_watch_has_bounds_of_its_own() -> None:
    """Above the children that it may leave behind (MAX_ABANDONED), with one that works and itself."""
    name = "imds-guard-watch.service"
    assert (of(name, "Service", "MemoryMax"), of(name, "Service", "TasksMax")) == (["256M"], ["32"])
    assert MAX_ABANDONED + 2 <= 32
