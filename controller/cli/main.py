# SPDX-License-Identifier: Apache-2.0
"""`frostline`: what operators type."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.text import Text

from frostline.controller.cli import policy, watch
from frostline.controller.cli.client import scope as scope_words
from frostline.controller.cli.completion import host_names, vm_names
from frostline.controller.cli.document import explain_document, hosts_document, vm_document
from frostline.controller.cli.drain import drain_and_wait
from frostline.controller.cli.errors import CliError
from frostline.controller.cli.exits import Exit, epilog
from frostline.controller.cli.options import (
    Cli,
    ControllerOption,
    InsecureOption,
    JsonOption,
    NoColourOption,
    Shared,
    TimeoutOption,
    command,
    show_error,
)
from frostline.controller.cli.summary import fleet_line, vms_line
from frostline.controller.cli.tables import hosts_table, vms_table
from frostline.controller.cli.vm_view import vm_view
from frostline.controller.cli.words import clean, reason_word, style_of

app = typer.Typer(
    name="frostline",
    help="See and steer what Frostline keeps out of host RAM.",
    epilog=epilog(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(policy.app, name="policy")

VmArgument = Annotated[str, typer.Argument(metavar="VM", help="Id, UUID or name.", autocompletion=vm_names)]
HostOption = Annotated[
    str, typer.Option("--host", metavar="HOST", help="Only this host (its node id).", autocompletion=host_names)
]
VmOption = Annotated[
    str, typer.Option("--vm", metavar="VM", help="Only this VM (id, UUID or name).", autocompletion=vm_names)
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"frostline {version('frostline')}")
        raise typer.Exit


@app.callback()
def _shared(
    ctx: typer.Context,
    controller: ControllerOption = None,
    json: JsonOption = False,
    no_color: NoColourOption = False,
    timeout: TimeoutOption = None,
    insecure: InsecureOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    ctx.obj = Shared(controller=controller, json=json, no_color=no_color, timeout=timeout, insecure=insecure)


@command(app, "hosts")
def hosts(cli: Cli) -> None:
    """List hosts: their agents' state, memory, and what is away."""
    answer = cli.call(lambda client: client.list_hosts())
    cli.answer(hosts_document(answer), hosts_table(answer.hosts, cli.screen), Text(), fleet_line(answer, cli.screen))


@command(app, "vms")
def vms(cli: Cli, host: HostOption = "") -> None:
    """List VMs: what is in RAM and away, the budget desired and in force, and why."""
    answer = cli.call(lambda client: client.list_vms(host))
    cli.answer(
        {"vms": [vm_document(vm) for vm in answer.vms]},
        vms_table(answer.vms, cli.screen),
        Text(),
        vms_line(answer.vms, cli.screen),
    )


@command(app, "vm")
def vm(cli: Cli, vm: VmArgument) -> None:
    """Show one VM, with its cold-age and promotion histograms drawn."""
    found = cli.call(lambda client: client.get_vm(vm))
    cli.answer(vm_document(found), vm_view(found, cli.screen))


@command(app, "explain")
def explain(cli: Cli, vm: VmArgument) -> None:
    """Say why a VM has the budget that it has."""
    answer = cli.call(lambda client: client.explain(vm))
    word = reason_word(answer.reason)
    lines = [Text(clean(answer.sentence) or "the controller gave no reason", style="bold")]
    if word:
        lines.append(Text.assemble("reason: ", (word, style_of(word))))
    lines += [Text(f"{cli.screen.glyphs.bullet} {clean(detail)}") for detail in answer.details]
    cli.answer(explain_document(vm, answer), *lines)


@command(app, "freeze")
def freeze(
    cli: Cli,
    host: HostOption = "",
    vm: VmOption = "",
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="For the audit log and the others.")] = "",
) -> None:
    """Stop evicting, at once: the whole fleet, one host or one VM. What is away comes back when touched."""
    what = _scope(host, vm)
    answer = cli.call(lambda client: client.freeze(host, vm, why))
    cli.answer(
        {"frozen": True, "host": host or None, "vm": vm or None, "hosts_told": answer.hosts},
        Text(
            f"{what} is frozen: nothing new is evicted ({_told(answer.hosts)}).\nEnd it with: frostline unfreeze"
            + _scope_options(host, vm)
        ),
    )


@command(app, "unfreeze")
def unfreeze(cli: Cli, host: HostOption = "", vm: VmOption = "") -> None:
    """End a freeze of the same scope."""
    what = _scope(host, vm)
    answer = cli.call(lambda client: client.unfreeze(host, vm))
    cli.answer(
        {"frozen": False, "host": host or None, "vm": vm or None, "hosts_told": answer.hosts},
        Text(f"{what} is no longer frozen ({_told(answer.hosts)})."),
    )


@command(app, "drain")
def drain(
    cli: Cli,
    vm: VmArgument,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Wait until everything is back (at most --timeout, then 10m), showing progress."),
    ] = False,
) -> None:
    """Bring everything of a VM back into RAM."""
    answer = drain_and_wait(cli, vm) if wait else cli.call(lambda client: client.drain(vm, wait_seconds=None))
    document = {
        "vm": vm,
        "command_id": answer.command_id,
        "done": answer.done,
        "evicted_bytes": answer.evicted_bytes,
    }
    if answer.done:
        cli.answer(document, Text(f"VM {clean(vm)} is drained: nothing of it is away."))
        cli.note(f"It stays frozen until: frostline unfreeze{_scope_options('', vm)}")
        return
    from frostline.wire.units import format_size

    left = f"{format_size(answer.evicted_bytes)} still away"
    cli.answer(document, Text(f"VM {clean(vm)} drains: {left}."))
    if wait:
        raise CliError(
            Exit.NOT_DONE,
            f"finish draining VM {vm!r} within the time limit",
            said=left,
            todo="it goes on by itself: look with `frostline vm`, or wait longer with --timeout",
        )
    cli.note("Wait for the end with: frostline drain --wait, or look with: frostline vm")


command(app, "watch")(watch.watch)


def _scope(host: str, vm: str) -> str:
    if host and vm:
        raise CliError(Exit.USAGE, "freeze a host and a VM at once", said="give either --host or --vm")
    words = scope_words(host, vm)
    return clean(words[0].upper() + words[1:])


def _scope_options(host: str, vm: str) -> str:
    import shlex

    return f" --vm {shlex.quote(vm)}" if vm else f" --host {shlex.quote(host)}" if host else ""


def _told(hosts: int) -> str:
    return f"{hosts} host{'' if hosts == 1 else 's'} told"


def app_main() -> NoReturn:
    """The console script. Ends with one of the codes of frostline.controller.cli.exits."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        code: int = Exit.INTERRUPTED
    except asyncio.CancelledError:
        code = Exit.INTERRUPTED
    except Exception as error:
        if os.environ.get("FROSTLINE_TRACEBACK"):
            raise
        show_error(
            CliError(
                Exit.UNEXPECTED,
                "go on",
                said=f"{type(error).__name__}: {error}",
                todo="this is a fault of the command: run it again with FROSTLINE_TRACEBACK=1 and report that",
            ),
            Shared(json="--json" in sys.argv),
        )
        code = Exit.UNEXPECTED
    else:
        code = Exit.OK
    raise SystemExit(int(code))
