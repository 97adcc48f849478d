# SPDX-License-Identifier: Apache-2.0
"""The commands that neither read nor change the guard: endpoints, demo."""

from __future__ import annotations

from imds_guard.cli.group import cli
from imds_guard.cli.options import backend_option, json_option
from imds_guard.cli.output import fail, print_json, print_lines, print_progress
from imds_guard.errors import GuardError
from imds_guard.kernel.dmi import dmi_text


@cli.command()
@json_option
def endpoints(as_json: bool) -> None:
    """List the built-in endpoints with their sources."""
    from imds_guard.present import answers  # noqa: PLC0415

    rows = answers.endpoint_rows(dmi_text())
    if as_json:
        print_json({"endpoints": rows})
    else:
        print_lines(answers.endpoint_lines(rows))


@cli.command(short_help="Show who gets through, in a namespace of its own.")
@backend_option
@json_option
def demo(backend: str | None, as_json: bool) -> None:
    """Show who gets through before and after locking, in a network namespace and a cgroup of its own."""
    from imds_guard.commands import demo as demonstration  # noqa: PLC0415
    from imds_guard.commands.capabilities import require_root  # noqa: PLC0415
    from imds_guard.present import answers  # noqa: PLC0415

    require_root("demo")
    print_progress("making a network namespace with a fake metadata service, and connecting ...")
    result = demonstration.demo(backend or "auto")
    if not as_json:
        print_lines([demonstration.render(result.rows), demonstration.LEGEND])
    elif result.whole:
        print_json(answers.demo_values(result))
    if not result.whole:
        error = GuardError("showing what the lock does: the kernel did not do what the policy says, see AFTER and WHY")
        fail(error, error.exit_status, answers.demo_values(result))
