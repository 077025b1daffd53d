# SPDX-License-Identifier: Apache-2.0
"""`frostline watch`: the fleet or one VM as it changes.

On a terminal the picture is redrawn in place; into a pipe each change is a line, and with --json each message is one.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Final

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from frostline.controller.cli.client import OperatorClient
from frostline.controller.cli.completion import vm_names
from frostline.controller.cli.document import saved_bytes, watch_document
from frostline.controller.cli.errors import CliError
from frostline.controller.cli.exits import Exit
from frostline.controller.cli.histogram import EVICTED_STYLE, sparkline
from frostline.controller.cli.options import Cli
from frostline.controller.cli.screen import Screen
from frostline.controller.cli.summary import vms_line
from frostline.controller.cli.tables import hosts_table, name_of, vms_table, why
from frostline.controller.cli.vm_view import vm_view
from frostline.controller.cli.words import clean, mode_word, pager_word
from frostline.v1 import operator_pb2
from frostline.wire.units import UnitError, format_size, parse_duration

_TREND: Final = 40
_RECONNECT_LIMIT_SECONDS: Final = 60.0
_RECONNECT_PAUSE_SECONDS: Final = 1.0
_MAX_SHOWN_VMS: Final = 2000


@dataclass
class Picture:
    """What the controller's messages add up to."""

    hosts: dict[str, operator_pb2.Host] = field(default_factory=dict)
    vms: dict[str, operator_pb2.Vm] = field(default_factory=dict)
    evicted_trend: deque[float] = field(default_factory=lambda: deque(maxlen=_TREND))
    at: float = 0.0

    def take(self, message: operator_pb2.WatchResponse) -> None:
        self.hosts.update({host.node_id: host for host in message.hosts})
        for vm in message.vms:
            if vm.identity.vm_id in self.vms or len(self.vms) < _MAX_SHOWN_VMS:
                self.vms[vm.identity.vm_id] = vm
        for vm_id in message.gone_vm_ids:
            self.vms.pop(vm_id, None)
        self.evicted_trend.append(float(sum(vm.state.evicted_bytes for vm in self.vms.values())))
        self.at = time.time()

    def forget(self) -> None:
        """A new stream sends everything again; what is not in it is gone."""
        self.hosts.clear()
        self.vms.clear()

    def render(self, screen: Screen, wanted: str, trouble: str) -> RenderableType:
        parts: list[RenderableType] = []
        if wanted and len(self.vms) == 1:
            parts.append(vm_view(next(iter(self.vms.values())), screen, brief=True))
        else:
            parts += [hosts_table(self.hosts.values(), screen), Text("")]
            parts += [vms_table(self.vms.values(), screen), Text(""), vms_line(list(self.vms.values()), screen)]
        trend = Text.assemble(
            "away lately  ", (sparkline(list(self.evicted_trend), screen.glyphs).rjust(_TREND), EVICTED_STYLE)
        )
        stamp = datetime.fromtimestamp(self.at, UTC).strftime("%H:%M:%SZ") if self.at else "waiting"
        parts += [trend, Text(f"{stamp}, Ctrl-C ends", style="dim")]
        if trouble:
            parts.append(Text(clean(trouble), style="bold red"))
        return Group(*parts)


def watch(
    cli: Cli,
    vm: Annotated[
        str, typer.Argument(metavar="[VM]", help="Only this VM.", autocompletion=vm_names, show_default=False)
    ] = "",
    interval: Annotated[
        str, typer.Option("--interval", "-i", metavar="TIME", help="At most one update in this time (200ms to 60s).")
    ] = "1s",
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after that many updates; 0: never.")] = 0,
) -> None:
    """Follow the fleet, or one VM, until Ctrl-C."""
    try:
        interval_seconds = parse_duration(interval)
        if not 0.2 <= interval_seconds <= 60:
            raise UnitError(f"{interval!r} is out of range; 200ms to 60s")
    except UnitError as error:
        raise CliError(Exit.USAGE, "use --interval", said=str(error)) from None
    request = Request(vm, interval_seconds, count)
    if cli.json:
        asyncio.run(_until_signal(_json_lines(cli, request)))
    elif cli.screen.is_terminal:
        asyncio.run(_until_signal(_live(cli, request)))
    else:
        asyncio.run(_until_signal(_plain_lines(cli, request)))


@dataclass(frozen=True)
class Request:
    vm: str
    interval_seconds: float
    count: int


async def _until_signal(work: Awaitable[None]) -> None:
    """Run `work` until it ends or Ctrl-C (or SIGTERM) asks for the end, which is a normal one here."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    asked: list[bool] = []

    def end() -> None:
        asked.append(True)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    try:
        await task
    except asyncio.CancelledError:
        if not asked:
            raise


async def _follow(
    cli: Cli,
    request: Request,
    take: Callable[[operator_pb2.WatchResponse], None],
    trouble: Callable[[str], None],
    restarted: Callable[[], None],
) -> None:
    """Feed messages to `take`, reconnecting for a while when the controller goes away in the middle."""
    seen = 0
    lost_at: float | None = None
    while True:
        try:
            async with cli.client() as client:
                first = True
                async for message in _bounded_start(cli, client, request):
                    if first and seen:
                        restarted()
                    first, lost_at = False, None
                    seen += 1
                    take(message)
                    if request.count and seen >= request.count:
                        return
                raise CliError(
                    Exit.UNREACHABLE,
                    "go on watching",
                    on=f"the controller at {cli.address}",
                    said="it ended the stream",
                )
        except CliError as error:
            if not seen or error.exit_code is not Exit.UNREACHABLE:
                raise
            now = time.monotonic()
            lost_at = lost_at if lost_at is not None else now
            if now - lost_at > _RECONNECT_LIMIT_SECONDS:
                raise
            trouble(f"lost the controller at {cli.address} ({error.said}); trying again")
            await asyncio.sleep(_RECONNECT_PAUSE_SECONDS)


async def _bounded_start(cli: Cli, client: OperatorClient, request: Request):  # type: ignore[no-untyped-def]
    """The client's stream, whose first message must come within the timeout."""
    stream = client.watch(request.vm, request.interval_seconds)
    try:
        async with asyncio.timeout(cli.timeout_seconds + request.interval_seconds):
            first = await anext(stream)
    except StopAsyncIteration:
        return
    except TimeoutError:
        raise CliError(
            Exit.UNREACHABLE,
            "watch",
            on=f"the controller at {cli.address}",
            said="no answer in time",
            todo="it may be busy or hung: look at its log, or give it longer with --timeout",
        ) from None
    yield first
    async for message in stream:
        yield message


async def _live(cli: Cli, request: Request) -> None:
    picture, screen = Picture(), cli.screen
    said: list[str] = [""]
    with Live(console=screen.out, auto_refresh=False, screen=False, vertical_overflow="ellipsis") as live:

        def redraw() -> None:
            live.update(picture.render(screen, request.vm, said[0]), refresh=True)

        def take(message: operator_pb2.WatchResponse) -> None:
            picture.take(message)
            said[0] = ""
            redraw()

        def trouble(text: str) -> None:
            said[0] = text
            redraw()

        await _follow(cli, request, take, trouble, picture.forget)


async def _json_lines(cli: Cli, request: Request) -> None:
    await _follow(
        cli,
        request,
        lambda message: cli.print_json(watch_document(message, time.time_ns()), compact=True),
        lambda _text: None,
        lambda: None,
    )


async def _plain_lines(cli: Cli, request: Request) -> None:
    def take(message: operator_pb2.WatchResponse) -> None:
        stream = cli.screen.out.file
        at = datetime.now(UTC).strftime("%H:%M:%SZ")
        for vm in sorted(message.vms, key=lambda v: (v.node_id, v.identity.name)):
            stream.write(f"{at} {vm_line(vm)}\n")
        for vm_id in message.gone_vm_ids:
            stream.write(f"{at} gone {clean(vm_id)}\n")
        stream.flush()

    await _follow(cli, request, take, cli.note, lambda: None)


def vm_line(vm: operator_pb2.Vm) -> str:
    """One VM on one line, for logs and grep."""
    state = vm.state
    return (
        f"{clean(vm.node_id)}/{name_of(vm)} {mode_word(vm.decision.mode) or '-'} "
        f"{pager_word(state.pager_state) or 'not-attached'} "
        f"ram={_compact(state.resident_bytes)} away={_compact(state.evicted_bytes)} "
        f"saved={_compact(saved_bytes(state))} budget={_compact(vm.decision.budget_bytes)} "
        f"in_force={_compact(state.effective_budget_bytes)} faults={state.counters.faults} why={why(vm)}"
    )


def _compact(size_bytes: int) -> str:
    return format_size(size_bytes).replace(" ", "")
