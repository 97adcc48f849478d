# SPDX-License-Identifier: Apache-2.0
"""The systemd units: put in place, switched on, and taken away again."""

from __future__ import annotations

import os
from typing import NamedTuple

from imds_guard import CONFIG_PATH
from imds_guard.commands import look
from imds_guard.commands.boot import with_config
from imds_guard.commands.options import GuardOptions
from imds_guard.commands.save import check_next_boot
from imds_guard.config.read import load_config
from imds_guard.errors import BadPolicy, GuardError, NotPermitted, UsageError, system_text
from imds_guard.kernel import files, ownership, systemd

MAIN = "imds-guard.service"
WATCH = "imds-guard-watch.service"
VERIFY = "imds-guard-verify.timer"
REQUIRED = "imds-guard-required.service"
UNITS = (MAIN, WATCH, VERIFY, "imds-guard-verify.service", REQUIRED)

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder of imds_guard itself."""

FOLDER = "/etc/systemd/system"
PACKAGED = ("/usr/lib/systemd/system", "/lib/systemd/system")
"""Where a distribution's package has put them (systemd.unit(5))."""

PROGRAM = "/usr/bin/imds-guard"
"""What the units of data/systemd run."""

MARK = "# Written by imds-guard install-service."

_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 -- refused, not used
"""What ProtectHome= and PrivateTmp= hide from the units."""


class ServiceOptions(NamedTuple):
    """Which of the units, and whether to begin now."""

    watch: bool = False
    verify: bool = False
    require_lock: bool = False
    without_root: bool = False
    now: bool = False

    @property
    def enabled(self) -> tuple[str, ...]:
        """The units that are switched on."""
        wanted = ((MAIN, True), (WATCH, self.watch), (VERIFY, self.verify), (REQUIRED, self.require_lock))
        return tuple(name for name, is_wanted in wanted if is_wanted)

    @property
    def files(self) -> tuple[str, ...]:
        """The units that must be there for these."""
        return tuple(
            name for name in UNITS if name in self.enabled or (self.verify and name.startswith("imds-guard-v"))
        )


class Done(NamedTuple):
    """What was done, and what to look at."""

    lines: list[str]
    warnings: list[str]


# --- install --------------------------------------------------------------------------------------------------------


def install(wishes: ServiceOptions, program: str, path: str = CONFIG_PATH, folder: str = FOLDER) -> Done:
    """Writes the units that run ``program`` and switches them on for the next boot; never off.

    Raises GuardError, before anything is written, when the next boot would not lock what the configuration says, or
    would shut a client out.
    """
    program = check_program(program)
    warnings = _check_configuration(wishes, path)
    _check_roots_own(_PACKAGE)
    if wishes.require_lock and not _network_units():
        raise GuardError(
            f"making the network wait for the lock: nothing that {REQUIRED} knows brings the network up here "
            f"({', '.join(_required_by())}); leave --require-lock out, or add a drop-in to what does"
        )
    lines = [line for name in wishes.files for line in _put(name, program, folder)]
    lines += _switch_on(wishes)
    return Done(lines, warnings)


def check_program(program: str) -> str:
    """The absolute path that units can run at boot. Raises UsageError, NotPermitted."""
    path = os.path.abspath(program)
    if os.path.basename(path) != "imds-guard" or not os.access(path, os.X_OK):
        raise UsageError(
            f"installing the service: this imds-guard runs from a source tree ({path}), which a boot can't rely on; "
            "install it (the package, or /usr/bin/python3 -m venv --system-site-packages /opt/imds-guard && "
            "/opt/imds-guard/bin/pip install .), and run that one's install-service"
        )
    real = os.path.realpath(path)
    for one in (path, real):
        if any(one.startswith(hidden + "/") for hidden in _HIDDEN):
            raise UsageError(
                f"installing the service: {one} is in a folder that services do not see; install imds-guard in /opt, "
                "/usr/local or by its package"
            )
        _check_roots_own(one)
    return path


def _check_roots_own(path: str) -> None:
    """Whoever may write to it, or to a folder above it, would become root at the next boot."""
    while True:
        found = os.stat(path)
        if not ownership.only_root_can_write(found, root_group=True):
            raise NotPermitted(
                f"installing the service: {path} can be changed by others than root, who would be root at the next "
                "boot; install imds-guard in a folder of root's"
            )
        if path == "/":
            return
        path = os.path.dirname(path)


def _check_configuration(wishes: ServiceOptions, path: str) -> list[str]:
    """What to look at. Raises BadPolicy for a configuration that boot could not use, or that shuts a client out."""
    if not os.path.exists(path):
        raise BadPolicy(
            f"installing the service: there is no configuration {path} for it; save one first with imds-guard start "
            "... --save"
        )
    config = load_config(path, use_stored_ids=True)
    check_next_boot(config.policy, wishes.without_root)
    warnings = list(config.warnings)
    checked = look.check(config.policy, with_config(GuardOptions(), config))
    if checked.chosen is None:
        reasons = "; ".join(f"{one.backend.name}: {one.refusal}" for one in checked.backends)
        warnings.append(f"no backend can hold the policy on this kernel as it runs now ({reasons})")
    return warnings


def _network_units() -> list[str]:
    folders = (FOLDER, "/run/systemd/system", *PACKAGED)
    return [name for name in _required_by() if any(os.path.exists(os.path.join(place, name)) for place in folders)]


def _required_by() -> list[str]:
    line = next(line for line in _text(REQUIRED).splitlines() if line.startswith("RequiredBy="))
    return line.partition("=")[2].split()


def _text(name: str) -> str:
    place = os.path.join(_PACKAGE, "data", "systemd", name)
    with open(place, encoding="utf-8") as file:
        return file.read()


def _put(name: str, program: str, folder: str) -> list[str]:
    """Writes one unit, unless the package's is there and runs the same program."""
    if program == PROGRAM and any(os.path.exists(os.path.join(place, name)) for place in PACKAGED):
        return []
    text = f"{MARK}\n{_text(name).replace(PROGRAM, _escaped(program))}"
    path = os.path.join(folder, name)
    if _read(path) == text:
        return [f"{path} is there already"]
    _write(path, text)
    return [f"wrote {path}"]


def _escaped(program: str) -> str:
    """As a word of ExecStart= (systemd.service(5), command lines)."""
    plain = program.replace("%", "%%").replace("$", "$$")
    if all(character.isalnum() or character in "/._+-%$" for character in plain):
        return plain
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise GuardError(f"reading {path}: {error}; look at what is there and move it away") from error


def _write(path: str, text: str) -> None:
    try:
        files.replace(path, text.encode())
    except OSError as error:
        raise GuardError(f"writing {path}: {system_text(error)}; the service is not installed") from error


def _switch_on(wishes: ServiceOptions) -> list[str]:
    if systemd.is_booted():
        systemd.systemctl("daemon-reload")
    systemd.systemctl("enable", "--quiet", *wishes.enabled)
    lines = [f"switched on for every boot: {', '.join(wishes.enabled)}"]
    if not wishes.now:
        return [*lines, "what is in force now stays as it is; --now starts the units"]
    # Started: also where it is, so that its state is the unit's. Then again, for a configuration that has changed.
    systemd.systemctl("reload-or-restart", MAIN)
    for name in wishes.enabled[1:]:
        systemd.systemctl("start", name)
    return [*lines, f"started {', '.join(wishes.enabled)}"]


# --- uninstall ------------------------------------------------------------------------------------------------------


def uninstall(folder: str = FOLDER) -> list[str]:
    """Switches the units off and removes those that install() wrote. What is locked stays locked."""
    there = [name for name in UNITS if _is_there(name, folder)]
    if not there:
        return ["the service was not installed: nothing to remove"]
    lines = []
    systemd.systemctl("disable", "--quiet", *(name for name in there if "[Install]" in _text(name)))
    if systemd.is_booted():
        for name in there:
            if name not in (MAIN, REQUIRED):
                systemd.systemctl("stop", name)
    for name in there:
        path = os.path.join(folder, name)
        if _read(path).startswith(MARK):
            os.unlink(path)
            lines.append(f"removed {path}")
    if systemd.is_booted():
        systemd.systemctl("daemon-reload")
        _forget(folder)
    return [*lines, "switched off for the next boot; what is locked stays so until imds-guard stop"]


def _is_there(name: str, folder: str) -> bool:
    return any(os.path.exists(os.path.join(place, name)) for place in (folder, *PACKAGED))


def _forget(folder: str) -> None:
    """A unit without a file has no ExecStop= any more: it ends, and the lock stays."""
    for name in (MAIN, REQUIRED):
        # One that systemd has never heard of can't be stopped.
        if not _is_there(name, folder) and systemd.is_active(name):
            systemd.systemctl("stop", name)


# --- while it runs --------------------------------------------------------------------------------------------------


def may_open(unit: str) -> bool:
    """True when systemd stops ``unit`` for good: not to start it again, and not because the machine goes down."""
    return systemd.job_of(unit) == "stop" and not systemd.is_going_down()


def repairs_itself() -> bool:
    """True while the timer runs that puts back what is gone."""
    return systemd.is_booted() and systemd.is_active(VERIFY)
