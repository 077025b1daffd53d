# SPDX-License-Identifier: Apache-2.0
"""Waits for a drain, showing on a terminal how much is still away."""

from __future__ import annotations

import asyncio
from typing import Final

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from frostline.controller.cli.client import OperatorClient
from frostline.controller.cli.errors import CliError
from frostline.controller.cli.exits import Exit
from frostline.controller.cli.options import Cli
from frostline.controller.cli.words import clean
from frostline.v1 import operator_pb2
from frostline.wire.units import format_size

DEFAULT_WAIT_SECONDS: Final = 600.0
_LOOK_SECONDS: Final = 0.5


def drain_and_wait(cli: Cli, vm: str) -> operator_pb2.DrainResponse:
    """Drain and wait for the end; the answer's `done` says whether it was reached in time."""
    limit_seconds = cli.timeout_seconds if cli.timeout_given else DEFAULT_WAIT_SECONDS

    async def work(client: OperatorClient) -> operator_pb2.DrainResponse:
        if cli.json or not cli.screen.err.is_terminal:
            return await client.drain(vm, wait_seconds=limit_seconds)
        return await _with_progress(cli, client, vm, limit_seconds)

    try:
        return cli.call(work)
    except CliError as error:
        # A controller that does not answer before the deadline leaves the drain under way all the same.
        if error.exit_code is Exit.UNREACHABLE and error.said == "no answer in time":
            error.exit_code = Exit.NOT_DONE
            error.todo = "it may go on by itself: look with `frostline vm`, or wait longer with --timeout"
        raise


async def _with_progress(cli: Cli, client: OperatorClient, vm: str, limit_seconds: float) -> operator_pb2.DrainResponse:
    before = (await client.get_vm(vm)).state.evicted_bytes
    drain = asyncio.ensure_future(client.drain(vm, wait_seconds=limit_seconds))
    ascii_only = cli.screen.glyphs.ellipsis != "…"
    columns = [
        TextColumn("draining {task.description}", markup=False),
        *([] if ascii_only else [BarColumn(bar_width=30)]),
        TextColumn("{task.fields[left]} still away", markup=False),
        TimeElapsedColumn(),
    ]
    try:
        with Progress(*columns, console=cli.screen.err, transient=True) as progress:
            task = progress.add_task(clean(vm), total=max(before, 1), left=format_size(before))
            while not drain.done():
                await asyncio.wait([drain], timeout=_LOOK_SECONDS)
                if drain.done():
                    break
                left = (await client.get_vm(vm)).state.evicted_bytes
                progress.update(task, completed=max(0, before - left), left=format_size(left))
        return await drain
    finally:
        drain.cancel()
