# SPDX-License-Identifier: Apache-2.0
"""Operators' commands that came over the session: each done once, and answered when it is really done."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import structlog

from frostline.agent.budgets import Grant
from frostline.agent.host import Host
from frostline.agent.vm import Phase, Vm
from frostline.native import PAGE_BYTES, Command, CommandKind
from frostline.v1 import common_pb2, session_pb2

MAX_REMEMBERED: Final = 256
FOLLOW_SECONDS: Final = 600.0
FOLLOW_POLL_SECONDS: Final = 0.25

_log: Final = structlog.stdlib.get_logger("frostline.agent.command")

_DETACHED: Final = Grant(common_pb2.MODE_OFF, False, 0, 0, 0.0, common_pb2.REASON_MODE, "an operator had it detached")

Answer = Callable[[session_pb2.CommandResult], None]


class Commands:
    """Does commands; a repeated id gets the answer of the first time."""

    def __init__(self, host: Host) -> None:
        self._host: Final = host
        self._done: OrderedDict[str, session_pb2.CommandResult | None] = OrderedDict()

    async def do(self, command: session_pb2.Command, answer: Answer) -> None:
        """Answers once, at the end: ``done`` False says that it failed, and why."""
        command_id = command.command_id
        if not command_id or len(command_id) > 256:
            answer(_result(command_id[:256], False, "a command needs an id of 1 to 256 characters"))
            return
        if command_id in self._done:
            first = self._done[command_id]
            if first is not None:  # else the answer of the first time is still to come
                answer(first)
            return
        self._done[command_id] = None
        while len(self._done) > MAX_REMEMBERED:
            self._done.popitem(last=False)
        try:
            result = await self._do(command)
        except asyncio.CancelledError:
            # The stream ended; asked again on the next one, it is done again, which does no harm.
            self._done.pop(command_id, None)
            raise
        if command_id in self._done:
            self._done[command_id] = result
        answer(result)

    async def _do(self, command: session_pb2.Command) -> session_pb2.CommandResult:
        kind = command.WhichOneof("command")
        if kind is None:
            return _result(command.command_id, False, "this agent does not know that command")
        vm_id = getattr(command, kind).vm_id
        vm = self._host.by_id().get(vm_id)
        if vm is None:
            return _result(command.command_id, False, f"this agent has no VM {vm_id}")
        _log.info("command", kind=kind, vm=vm.vmm.name, vm_id=vm_id, command_id=command.command_id)
        if kind == "detach":
            # Until the next set says otherwise.
            vm.set_grant(_DETACHED, vm.grant_version, 0)
            vm.want(False)
            return await self._follow(command.command_id, vm, lambda: vm.phase in (Phase.IDLE, Phase.GONE))
        if kind == "prefetch":
            wanted = command.prefetch
            problem = await vm.tell(
                Command(CommandKind.PREFETCH, first_page=wanted.first_page, page_count=wanted.page_count)
            )
            return _result(command.command_id, not problem, problem or "begun")
        if vm.phase in (Phase.IDLE, Phase.REFUSED) and vm.status is None:
            return _result(command.command_id, True, "not attached: nothing is away")
        problem = await vm.tell(Command(CommandKind.DRAIN))
        if problem:
            return _result(command.command_id, False, problem)
        return await self._follow(command.command_id, vm, lambda: vm.evicted_bytes == 0)

    async def _follow(self, command_id: str, vm: Vm, finished: Callable[[], bool]) -> session_pb2.CommandResult:
        deadline = time.monotonic() + FOLLOW_SECONDS
        while time.monotonic() < deadline:
            vm.read_status()
            if finished() or vm.phase is Phase.GONE:
                return _result(command_id, True, "nothing is away any more")
            await asyncio.sleep(FOLLOW_POLL_SECONDS)
        pages = vm.evicted_bytes // PAGE_BYTES
        return _result(command_id, False, f"{pages} pages are still away after {FOLLOW_SECONDS:g} s")


def _result(command_id: str, done: bool, detail: str) -> session_pb2.CommandResult:
    return session_pb2.CommandResult(command_id=command_id, done=done, detail=detail)
