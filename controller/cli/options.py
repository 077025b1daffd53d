# SPDX-License-Identifier: Apache-2.0
"""Options that every command takes, before or after its name, and what a command works with.

`frostline --json vms` and `frostline vms --json` are the same; what is given after the command wins.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, TypeVar, get_type_hints

import typer
from rich.console import RenderableType

from frostline.controller.cli.client import OperatorClient
from frostline.controller.cli.errors import CliError
from frostline.controller.cli.exits import Exit
from frostline.controller.cli.screen import Screen, make_screen
from frostline.wire.channels import Address, AddressError, parse_address
from frostline.wire.units import UnitError, parse_duration

DEFAULT_CONTROLLER: Final = "127.0.0.1:7443"
DEFAULT_TIMEOUT: Final = "10s"
CONTROLLER_VARIABLE: Final = "FROSTLINE_CONTROLLER"
_PANEL: Final = "Options of every command"
_MAX_TIMEOUT_SECONDS: Final = 24 * 3600

T = TypeVar("T")

ControllerOption = Annotated[
    str | None,
    typer.Option(
        "--controller",
        metavar="ADDRESS",
        help=f"Controller: host:port or unix:/path. Default: ${CONTROLLER_VARIABLE}, else {DEFAULT_CONTROLLER}.",
        rich_help_panel=_PANEL,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON with stable keys; sizes are bytes.", rich_help_panel=_PANEL)
]
NoColourOption = Annotated[
    bool, typer.Option("--no-color", help="No colours (so does NO_COLOR).", rich_help_panel=_PANEL)
]
TimeoutOption = Annotated[
    str | None,
    typer.Option(
        "--timeout",
        metavar="TIME",
        help=f"How long to wait for the controller, such as 500ms or 2m. Default: {DEFAULT_TIMEOUT}.",
        rich_help_panel=_PANEL,
    ),
]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure", help="Allow a controller off this host in plain text, unauthenticated.", rich_help_panel=_PANEL
    ),
]
_SHARED: Final[dict[str, tuple[Any, Any]]] = {
    "controller": (ControllerOption, None),
    "json": (JsonOption, False),
    "no_color": (NoColourOption, False),
    "timeout": (TimeoutOption, None),
    "insecure": (InsecureOption, False),
}


@dataclass(frozen=True)
class Shared:
    """The shared options as given; None and False mean not given."""

    controller: str | None = None
    json: bool = False
    no_color: bool = False
    timeout: str | None = None
    insecure: bool = False

    def overridden_by(self, later: Shared) -> Shared:
        return replace(
            self,
            controller=later.controller if later.controller is not None else self.controller,
            json=self.json or later.json,
            no_color=self.no_color or later.no_color,
            timeout=later.timeout if later.timeout is not None else self.timeout,
            insecure=self.insecure or later.insecure,
        )


@dataclass(frozen=True)
class Cli:
    """What a command works with: where the controller is, how to answer, and on what kind of screen."""

    address: Address
    timeout_seconds: float
    json: bool
    insecure: bool
    screen: Screen
    timeout_given: bool = False

    def client(self) -> OperatorClient:
        return OperatorClient(self.address, self.timeout_seconds, insecure_off_loopback=self.insecure)

    def call(self, work: Callable[[OperatorClient], Awaitable[T]]) -> T:
        """Connect, do `work` with the client, and give its result."""

        async def connected() -> T:
            async with self.client() as client:
                return await work(client)

        return asyncio.run(connected())

    def answer(self, document: Any, *renderables: RenderableType) -> None:
        """Print the document with --json, else what is for people."""
        if self.json:
            self.print_json(document)
        else:
            out = self.screen.out
            with out.capture() as captured:
                for renderable in renderables:
                    out.print(renderable)
            text = captured.get()
            if not self.screen.is_terminal:
                # Tables are padded to their width; in a file that is only noise.
                text = "".join(line.rstrip() + "\n" for line in text.splitlines())
            out.file.write(text)
            out.file.flush()

    def print_json(self, document: Any, *, compact: bool = False) -> None:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=None if compact else 2)
        stream = self.screen.out.file
        stream.write(text + "\n")
        stream.flush()

    def note(self, text: str) -> None:
        """A remark beside the answer, on stderr; scripts are spared it."""
        if not self.json:
            self.screen.err.print(self.screen.text(text, "dim"), soft_wrap=True)


def make_cli(shared: Shared, environ: Mapping[str, str] | None = None) -> Cli:
    """Check the shared options. Raises CliError with the usage exit code."""
    environ = os.environ if environ is None else environ
    text = shared.controller or environ.get(CONTROLLER_VARIABLE) or DEFAULT_CONTROLLER
    source = "--controller" if shared.controller else CONTROLLER_VARIABLE
    try:
        address = parse_address(text)
        if not address.is_loopback and not shared.insecure:
            raise AddressError(
                f"{address} is not on this host, and mutual TLS is not available yet; tunnel it (ssh -L), or allow "
                "plain text with --insecure"
            )
        if address.path is None and address.port == 0:
            raise AddressError(f"{address}: port 0 cannot be connected to")
    except AddressError as error:
        raise CliError(Exit.USAGE, f"use {source}", said=str(error)) from None
    try:
        timeout_seconds = parse_duration(shared.timeout or DEFAULT_TIMEOUT)
        if not 0 < timeout_seconds <= _MAX_TIMEOUT_SECONDS:
            raise UnitError(f"{shared.timeout!r} is out of range; more than nothing, and at most a day")
    except UnitError as error:
        raise CliError(Exit.USAGE, "use --timeout", said=str(error)) from None
    return Cli(
        address=address,
        timeout_seconds=timeout_seconds,
        json=shared.json,
        insecure=shared.insecure,
        screen=make_screen(colours=not shared.no_color, environ=environ),
        timeout_given=shared.timeout is not None,
    )


def command(app: typer.Typer, name: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(cli, ...)` as a command that also takes the shared options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in list(inspect.signature(function).parameters.values())[1:]
        ]
        shared = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for key, (annotation, default) in _SHARED.items()
        ]
        ctx = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]

        def run(**given: Any) -> None:
            before = given.pop("ctx").obj
            after = Shared(**{key: given.pop(key) for key in _SHARED})
            options = (before if isinstance(before, Shared) else Shared()).overridden_by(after)
            try:
                function(make_cli(options), **given)
            except CliError as error:
                show_error(error, options)
                raise typer.Exit(int(error.exit_code)) from None
            except BrokenPipeError:
                # Python would complain once more when it flushes stdout at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(int(Exit.READER_GONE)) from None

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature([*parameters, ctx, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*parameters, ctx, *shared]}
        app.command(name, **settings)(run)
        return function

    return register


def show_error(error: CliError, options: Shared) -> None:
    """The error on stderr: lines for people, one JSON object with --json."""
    if options.json:
        sys.stderr.write(json.dumps(error.as_json(), ensure_ascii=True) + "\n")
        return
    console = make_screen(colours=not options.no_color).err
    first, *rest = error.lines()
    from rich.text import Text

    from frostline.controller.cli.words import clean

    console.print(Text.assemble(("frostline: ", "bold red"), clean(first)), soft_wrap=True)
    for line in rest:
        console.print(Text(clean(line)), soft_wrap=True)
