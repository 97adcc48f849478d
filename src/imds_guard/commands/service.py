# SPDX-License-Identifier: Apache-2.0
"""Installs and removes the systemd units."""

from __future__ import annotations

import os
from typing import NamedTuple

from imds_guard import CONFIG_PATH
from imds_guard.backends.ebpf import compiled
from imds_guard.commands import filter_account, look, metrics_timer, own_files
from imds_guard.commands.boot import with_config
from imds_guard.commands.options import GuardOptions
from imds_guard.commands.save import check_next_boot
from imds_guard.commands.unit_files import MARK, PROGRAM, escaped, read, write
from imds_guard.config.boot_file import require_files_of_root
from imds_guard.config.read import load_config
from imds_guard.config.store import make_folder
from imds_guard.errors import BadPolicy, GuardError, NotPermitted, UsageError
from imds_guard.kernel import systemd
from imds_guard.policy.model import Policy

MAIN = "imds-guard.service"
WATCH = "imds-guard-watch.service"
VERIFY = "imds-guard-verify.timer"
REQUIRED = "imds-guard-required.service"
FILTER = "imds-guard-filter.service"
RULES = "imds-guard-rules@.service"
METRICS = "imds-guard-metrics.timer"
UNITS = (
    *(MAIN, WATCH, VERIFY, "imds-guard-verify.service", RULES, REQUIRED, FILTER),
    *(METRICS, metrics_timer.SERVICE),
)

FLUSHING = ("nftables", "netfilter-persistent", "iptables", "ip6tables", "firewalld", "docker")
"""Services that remove or rewrite others' rules when they are started, restarted or reloaded. None has to be here."""

FOLDER = "/etc/systemd/system"
PACKAGED_FOLDERS = ("/usr/lib/systemd/system", "/lib/systemd/system")
"""Where a package of the distribution installs units (systemd.unit(5))."""

_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 -- refused, not used
"""Folders that ProtectHome= and PrivateTmp= hide from the units."""


class ServiceOptions(NamedTuple):
    """Which units to install, and whether to start them now."""

    watch: bool = False
    verify: bool = False
    require_lock: bool = False
    filter: bool = False
    textfile: str | None = None
    """The folder that node_exporter reads, for the metrics."""
    without_root: bool = False
    now: bool = False

    @property
    def enabled(self) -> tuple[str, ...]:
        """The units to enable, beside the instances of RULES."""
        chosen = (
            *((MAIN, True), (WATCH, self.watch), (VERIFY, self.verify), (REQUIRED, self.require_lock)),
            *((FILTER, self.filter), (METRICS, self.textfile is not None)),
        )
        return tuple(name for name, is_chosen in chosen if is_chosen)

    @property
    def instances(self) -> dict[str, str]:
        """Service that flushes rules -> the unit to enable that puts ours back after it."""
        services = FLUSHING if self.verify else ()
        return {f"{service}.service": RULES.replace("@", f"@{service}") for service in services}

    @property
    def files(self) -> tuple[str, ...]:
        """The unit files that these need."""
        with_verify = (VERIFY, "imds-guard-verify.service", RULES) if self.verify else ()
        with_textfile = (METRICS, metrics_timer.SERVICE) if self.textfile is not None else ()
        return tuple(name for name in UNITS if name in (*self.enabled, *with_verify, *with_textfile))


class Installed(NamedTuple):
    """Lines that say what was done, and warnings."""

    lines: list[str]
    warnings: list[str]


# --- install --------------------------------------------------------------------------------------------------------


def install(options: ServiceOptions, program: str, path: str = CONFIG_PATH, folder: str = FOLDER) -> Installed:
    """Writes the units, which run ``program``, and enables them; disables none.

    Raises GuardError, before anything is written, when the next boot could not apply the configuration, or would shut
    out a client.
    """
    program = check_program(program)
    textfile = None if options.textfile is None else metrics_timer.check_folder(options.textfile, _HIDDEN)
    warnings = _check_configuration(options, path)
    _require_root_alone(own_files.package_open_to_others(lasting=True))
    if options.require_lock and not _network_units():
        raise GuardError(
            f"making the network wait for the lock: no unit that {REQUIRED} knows brings the network up here "
            f"({', '.join(_required_by())}); leave --require-lock out, or add a drop-in to the unit that does"
        )
    made = make_folder(path)
    lines = [] if made is None else [f"made {made}"]
    lines += filter_account.make() if options.filter else []
    lines += [line for name in options.files for line in _install_unit(name, program, folder)]
    lines += [] if textfile is None else metrics_timer.write_drop_in(textfile, program, folder)
    compiled.FOLDER.make()  # the units may write there, and nowhere above
    lines += _enable(options)
    return Installed(lines, warnings)


def check_program(program: str) -> str:
    """The absolute path of ``program``, when units can run it at boot. Raises UsageError, NotPermitted."""
    path = os.path.abspath(program)
    if os.path.basename(path) != "imds-guard" or not os.access(path, os.X_OK):
        raise UsageError(
            f"installing the service: this imds-guard runs from a source tree ({path}), which may be gone at boot; "
            "install it (the package, or /usr/bin/python3 -m venv --system-site-packages /opt/imds-guard && "
            "/opt/imds-guard/bin/pip install .), and run install-service of the installed one"
        )
    real = os.path.realpath(path)
    for one in (path, real):
        if any(one.startswith(hidden + "/") for hidden in _HIDDEN):
            raise UsageError(
                f"installing the service: {one} is in a folder that services do not see; install imds-guard in /opt, "
                "/usr/local or by its package"
            )
    _require_root_alone(own_files.program_open_to_others(path, lasting=True))
    return path


def _require_root_alone(where: str | None) -> None:
    """Whoever can change the program would be root at the next boot. Raises NotPermitted."""
    if where is not None:
        raise NotPermitted(
            f"installing the service: {where} can be changed by others than root, who would be root at the next "
            "boot; install imds-guard in a folder that only root can write to"
        )


def _check_configuration(options: ServiceOptions, path: str) -> list[str]:
    """Warnings. Raises BadPolicy for a configuration that boot could not use, or that shuts out a client."""
    if not os.path.exists(path):
        raise BadPolicy(
            f"installing the service: there is no configuration {path} for it; save one first with imds-guard start "
            "... --save"
        )
    require_files_of_root(path)
    config = load_config(path, use_stored_ids=True)
    check_next_boot(config.policy, options.without_root)
    warnings = [*config.warnings, *_filter_warnings(options, config.policy)]
    checked = look.check(config.policy, with_config(GuardOptions(), config))
    if checked.chosen is None:
        reasons = "; ".join(f"{one.backend.name}: {one.refusal}" for one in checked.backends)
        warnings.append(f"no backend can hold the policy on this kernel as it runs now ({reasons})")
    return warnings


def _filter_warnings(options: ServiceOptions, policy: Policy) -> list[str]:
    if options.filter and not policy.filters:
        return ["the configuration has no filter, so the filter has nothing to serve yet: add [filter.NAME]"]
    if policy.filters and not options.filter and not systemd.is_enabled(FILTER):
        return ["the configuration has filters, whose callers are denied without the service: add --filter"]
    return []


def _network_units() -> list[str]:
    folders = (FOLDER, "/run/systemd/system", *PACKAGED_FOLDERS)
    return [name for name in _required_by() if any(os.path.exists(os.path.join(one, name)) for one in folders)]


def _required_by() -> list[str]:
    line = next(line for line in _text(REQUIRED).splitlines() if line.startswith("RequiredBy="))
    return line.partition("=")[2].split()


def _text(name: str) -> str:
    path = os.path.join(own_files.PACKAGE, "data", "systemd", name)
    with open(path, encoding="utf-8") as file:
        return file.read()


def _install_unit(name: str, program: str, folder: str) -> list[str]:
    """Writes one unit, unless a package has installed it with the same program."""
    if program == PROGRAM and any(os.path.exists(os.path.join(one, name)) for one in PACKAGED_FOLDERS):
        return []
    text = f"{MARK}\n{_text(name).replace(PROGRAM, escaped(program))}"
    path = os.path.join(folder, name)
    if read(path) == text:
        return [f"{path} is there already"]
    write(path, text)
    return [f"wrote {path}"]


def _enable(options: ServiceOptions) -> list[str]:
    if systemd.is_booted():
        systemd.systemctl("daemon-reload")
    systemd.systemctl("enable", "--quiet", *options.enabled, *options.instances.values())
    names = [*options.enabled, *([RULES] if options.instances else [])]
    lines = [f"enabled for every boot: {', '.join(names)}"]
    if not options.now:
        return [*lines, "the lock that is in force stays as it is; --now starts the units"]
    # Where a lock is in force already, this makes its state known to systemd, or applies a changed configuration.
    systemd.systemctl("reload-or-restart", MAIN)
    running = [name for service, name in options.instances.items() if systemd.is_active(service)]
    for name in (*options.enabled[1:], *running):
        systemd.systemctl("start", name)
    return [*lines, f"started {', '.join((*options.enabled, *running))}"]


# --- uninstall ------------------------------------------------------------------------------------------------------


def uninstall(folder: str = FOLDER) -> list[str]:
    """Disables the units and removes those that install() wrote. A lock that is in force stays."""
    installed = [name for name in UNITS if _is_installed(name, folder)]
    if not installed:
        return ["the service was not installed: nothing to remove"]
    lines = []
    systemd.systemctl("disable", "--quiet", *(name for name in installed if "[Install]" in _text(name)))
    if systemd.is_booted():
        for name in installed:
            if name not in (MAIN, REQUIRED):
                systemd.systemctl("stop", name.replace("@.", "@*."))
    for name in installed:
        path = os.path.join(folder, name)
        if read(path).startswith(MARK):
            os.unlink(path)
            lines.append(f"removed {path}")
            lines += filter_account.remove() if name == FILTER else []
    lines += metrics_timer.remove_drop_in(folder)
    compiled.FOLDER.remove()
    if systemd.is_booted():
        systemd.systemctl("daemon-reload")
        _stop_removed_units(folder)
    return [*lines, "disabled for the next boot; what is locked stays locked until imds-guard stop"]


def _is_installed(name: str, folder: str) -> bool:
    return any(os.path.exists(os.path.join(one, name)) for one in (folder, *PACKAGED_FOLDERS))


def _stop_removed_units(folder: str) -> None:
    """A unit without a file has no ExecStop= any more: systemd stops it, and the lock stays."""
    for name in (MAIN, REQUIRED):
        # systemctl stop fails for a unit that systemd does not know.
        if not _is_installed(name, folder) and systemd.is_active(name):
            systemd.systemctl("stop", name)


# --- while it runs --------------------------------------------------------------------------------------------------


def may_unlock(unit: str) -> bool:
    """True when systemd stops ``unit`` for good: it is not a restart, and the machine is not shutting down."""
    return systemd.job_of(unit) == "stop" and not systemd.is_going_down()


def repairs_itself() -> bool:
    """True while the timer is active that repairs the lock."""
    return systemd.is_booted() and systemd.is_active(VERIFY)
