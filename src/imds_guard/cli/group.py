# SPDX-License-Identifier: Apache-2.0
"""The ``imds-guard`` command: its subcommands, each imported when it is called."""

from __future__ import annotations

import importlib

import click

from imds_guard import __version__

MODULES: dict[str, str] = {
    **dict.fromkeys(("start", "check", "export"), "start"),
    **dict.fromkeys(("stop", "allow", "revoke", "mode"), "change"),
    **dict.fromkeys(("status", "explain"), "status"),
    **dict.fromkeys(("endpoints", "demo"), "builtin"),
    "filter": "filter",
    **dict.fromkeys(("watch", "report", "metrics"), "denials"),
    **dict.fromkeys(("install-service", "uninstall-service", "verify"), "service"),
}
"""Command -> the module in this folder that defines it."""


class Commands(click.Group):
    """Imports a command only when it is called: start-up time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of --help."""
        return sorted(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        if cmd_name in MODULES:
            importlib.import_module(f"imds_guard.cli.{MODULES[cmd_name]}")
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name for one that is unknown."""
        if args and args[0] not in MODULES and not args[0].startswith("-") and not ctx.resilient_parsing:
            from imds_guard.text import did_you_mean  # noqa: PLC0415 -- start-up time

            ctx.fail(f"there is no command {args[0]!r}{did_you_mean(args[0], MODULES)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
)
@click.version_option(__version__, prog_name="imds-guard")
def cli() -> None:
    """Only the right users and groups reach the instance metadata service."""
