# SPDX-License-Identifier: Apache-2.0
"""One agent's stream: reads what comes in, sends what has to go out, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from frostline.controller.api.status import StatusError, bad_request
from frostline.controller.fleet.records import HostRecord, VmRecord
from frostline.controller.session.admission import TokenBucket
from frostline.controller.session.hub import Hub
from frostline.controller.session.push import Pusher
from frostline.controller.session.sequence import Sequence, Verdict
from frostline.controller.session.validate import MAX_VMS, InvalidError, check_report, clean_detail, state_problem
from frostline.v1 import session_pb2 as wire

_log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[wire.SessionRequest, wire.SessionResponse]

WRITE_SECONDS = 10.0
MAX_QUEUED_COMMANDS = 64
# An agent reports every few seconds at most; anything faster is broken, and must not take the time of others.
MESSAGES_PER_SECOND = 50.0
MESSAGES_AT_ONCE = 500.0
RESYNC_SECONDS = 1.0
# Missed heartbeats until the stream of a silent agent is closed; it is shown as suspect long before.
SILENT_HEARTBEATS = 12


async def read(context: Context) -> wire.SessionRequest | None:
    """The agent's next message, None when it has closed its side. StatusError for bytes that are no message."""
    try:
        request: Any = await context.read()
    except DecodeError:
        raise bad_request("what came is no SessionRequest", [("message", "cannot be parsed")]) from None
    return None if request is grpc.aio.EOF else request


class Stream:
    """The open session of one host. Implements records.Session."""

    def __init__(self, hub: Hub, host: HostRecord, context: Context, instance: bytes) -> None:
        self.host = host
        self.instance = instance
        self._hub = hub
        self._context = context
        self._pusher = Pusher(host, hub.decider, hub.timing.lease_seconds, hub.timing.ack_seconds)
        self._sequence = Sequence()
        self._bucket = TokenBucket(MESSAGES_PER_SECOND, MESSAGES_AT_ONCE)
        self._awake = asyncio.Event()
        self._commands: deque[wire.Command] = deque()
        self._reported = False
        self._resync_why = ""
        self._resync_at = float("-inf")
        self._end: asyncio.Future[StatusError] = asyncio.get_running_loop().create_future()

    # What the rest of the controller asks for.

    def wake(self) -> None:
        self._awake.set()

    def send_command(self, command: wire.Command) -> bool:
        if len(self._commands) >= MAX_QUEUED_COMMANDS:
            return False
        self._commands.append(command)
        self._awake.set()
        return True

    def refresh(self, why: str) -> None:
        self._ask_resync(why)

    def close(self, code: str, text: str) -> None:
        if not self._end.done():
            self._end.set_result(StatusError(grpc.StatusCode[code], text))

    # The stream itself.

    async def run(self) -> None:
        """Until the agent leaves (returns) or has to go (StatusError)."""
        tasks: list[asyncio.Future[Any]] = [
            asyncio.create_task(self._read(), name=f"read {self.host.node_id}"),
            asyncio.create_task(self._write(), name=f"write {self.host.node_id}"),
            self._end,
        ]
        why = "the session ended"
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._end in done:
                raise self._end.result()
            for task in done:
                task.result()
        except StatusError as error:
            why = error.text
            raise
        finally:
            self._pusher.end(why)
            for task in tasks:
                task.cancel()
            ended, _ = await asyncio.wait(tasks, timeout=5.0)
            for task in ended:
                # The first failure is the reason; what the others say of it is looked at, and not wanted.
                if not task.cancelled():
                    task.exception()

    async def _read(self) -> None:
        while True:
            request = await read(self._context)
            if request is None:
                return
            now = time.monotonic()
            if self._bucket.take(now) > 0.0:
                text = f"more than {MESSAGES_PER_SECOND:.0f} messages a second; slow down and open a new stream"
                raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            self.host.last_seen = now
            self._hub.fleet.touch(self.host)
            await self._take(request, now)

    async def _take(self, request: wire.SessionRequest, now: float) -> None:
        if self.host.session is not self:
            return  # a newer stream has the host; what this one still says is old
        kind = request.WhichOneof("message")
        if kind == "report":
            self._take_report(request.report, now)
        elif kind == "heartbeat":
            if request.heartbeat.last_sequence > self._sequence.last:
                self._ask_resync(f"report {request.heartbeat.last_sequence} did not arrive")
        elif kind == "budget_result":
            higher = self._pusher.result(request.budget_result, now)
            if higher:
                await self._hub.raise_epoch(higher, self.host.node_id)
            self.wake()
        elif kind == "command_result":
            self._hub.commands.finish(self.host.node_id, request.command_result)
            self._ask_resync("a command was done")
        elif kind == "hello":
            raise bad_request("a second hello on one stream; open a new one", [("hello", "already said")])
        # Anything else is from a newer agent, and not for us.

    def _take_report(self, report: wire.Report, now: float) -> None:
        metrics = self._hub.decider.metrics
        try:
            check_report(report)
            self._check_room(report)
        except InvalidError as error:
            # The number counts as used: the resync that is asked for is the next one.
            self._sequence.judge(report.sequence, full=True)
            metrics.count("reports", verdict="refused")
            _log.warning("report refused", node_id=self.host.node_id, sequence=report.sequence, why=str(error))
            self.host.refused_report = f"report {report.sequence} refused: {error}"
            self._ask_resync(f"report {report.sequence} was refused: {error}")
            return
        verdict = self._sequence.judge(report.sequence, report.full)
        metrics.count("reports", verdict=verdict.name.lower())
        if verdict is Verdict.IGNORE:
            self._ask_resync(f"report {report.sequence} is a repeat or older than {self._sequence.last}")
            return
        if verdict is Verdict.TAKE_AND_RESYNC:
            self._ask_resync(f"reports are missing before {report.sequence}")
        self.host.refused_report = ""
        self._apply(report, now)
        self._reported = True
        if verdict is Verdict.TAKE:
            self._confirm(now)
        self.host.report_traceparent = report.traceparent
        self.wake()

    def _check_room(self, report: wire.Report) -> None:
        if report.full:
            return
        known = self.host.vms.keys() - set(report.gone_vm_ids) | {identity.vm_id for identity in report.vms}
        if len(known) > MAX_VMS:
            raise InvalidError([("report.vms", f"the host would have {len(known)} VMs; it may have {MAX_VMS}")])

    def _apply(self, report: wire.Report, now: float) -> None:
        host, fleet = self.host, self._hub.fleet
        host.host_memory_bytes = report.host_memory_bytes or host.host_memory_bytes
        host.host_available_bytes = report.host_available_bytes
        for identity in report.vms:
            self._hub.take_identity(host, identity)
        for state in report.states:
            vm = host.vms.get(state.vm_id)
            if vm is None:
                self._ask_resync(f"a state for {state.vm_id!r}, whose identity is not known")
                continue
            self._take_state(vm, state, now)
        gone = set(report.gone_vm_ids)
        if report.full:
            # Everything is in it, so whatever is not is gone.
            gone |= host.vms.keys() - {identity.vm_id for identity in report.vms}
        for vm_id in gone:
            if host.vms.pop(vm_id, None) is not None:
                _log.info("VM gone", node_id=host.node_id, vm=vm_id)
                fleet.touch(host)

    def _confirm(self, now: float) -> None:
        """Nothing is missing, so a VM that the delta does not mention is as it was last said to be."""
        for vm in self.host.vms.values():
            if vm.state is not None and not vm.problem:
                vm.state_at = now

    def _take_state(self, vm: VmRecord, state: Any, now: float) -> None:
        problem = state_problem(state, vm.identity)
        if problem:
            self._hub.decider.metrics.count("report.bad_states")
            if problem != vm.problem:
                _log.warning(
                    "VM state not believed", node_id=self.host.node_id, vm=self.host.vm_label(state.vm_id), why=problem
                )
        else:
            state.refusal_detail = clean_detail(state.refusal_detail)
            vm.state, vm.state_at = state, now
        vm.problem = problem
        self._hub.fleet.touch(vm)

    def _ask_resync(self, why: str) -> None:
        self._resync_why = clean_detail(why)
        self._awake.set()

    async def _write(self) -> None:
        tick = self._hub.timing.decide_seconds
        while True:
            woken = self._awake.is_set()
            self._awake.clear()
            now = time.monotonic()
            # A wake-up that meets a set in flight is not lost: its result wakes again.
            await self._write_due(now, woken)
            if self._pusher.overdue(now):
                text = f"no result for budget set {self.host.version_desired} within {self._hub.timing.ack_seconds:g} s"
                raise StatusError(grpc.StatusCode.ABORTED, text)
            silent = now - self.host.last_seen
            if silent > SILENT_HEARTBEATS * self._hub.timing.heartbeat_seconds:
                raise StatusError(grpc.StatusCode.ABORTED, f"nothing heard for {silent:.0f} s")
            with contextlib.suppress(asyncio.TimeoutError):
                # Not wait_for: in Python 3.11 it can lose a cancellation that meets the event.
                async with asyncio.timeout(tick):
                    await self._awake.wait()

    async def _write_due(self, now: float, woken: bool) -> None:
        while self._commands:
            await self._send(wire.SessionResponse(command=self._commands.popleft()))
        if self._resync_why and now - self._resync_at >= min(RESYNC_SECONDS, self._hub.timing.report_seconds):
            why, self._resync_why, self._resync_at = self._resync_why, "", now
            self._hub.decider.metrics.count("resyncs")
            _log.info("resync asked for", node_id=self.host.node_id, why=why)
            await self._send(wire.SessionResponse(resync_request=wire.ResyncRequest(why=why)))
        # A silent agent may be dead: its lease is not renewed until it is heard again.
        alive = now - self.host.last_seen <= 4 * self._hub.timing.heartbeat_seconds
        # A pager brings back what is away beyond its budget. Until the first report nobody here knows how much that
        # is, and a controller that was only restarted must not empty a whole fleet's pools.
        knows = self._reported or not self.host.vms
        budget_set = self._pusher.next_set(now, self._hub.epoch, may_send=alive and knows, woken=woken)
        if budget_set is not None:
            await self._send(wire.SessionResponse(budget_set=budget_set))

    async def _send(self, response: wire.SessionResponse) -> None:
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._context.write(response)
        except TimeoutError:
            text = f"the agent took no message for {WRITE_SECONDS:.0f} s"
            raise StatusError(grpc.StatusCode.ABORTED, text) from None
