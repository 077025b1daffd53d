# SPDX-License-Identifier: Apache-2.0
"""The agent's side of the session with the controller: dial, greet, report, take budgets and commands.

Nothing queues while disconnected: a report is made when it can be sent, so the latest always wins. A session that
ends changes nothing about the VMs; their leases run out by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

import grpc
import grpc.aio
import structlog
from google.rpc import error_details_pb2, status_pb2

from frostline.agent.backoff import DialBackoff
from frostline.v1 import session_pb2, session_pb2_grpc
from frostline.wire.channels import make_channel
from frostline.wire.units import format_duration

PROTOCOL_VERSION: Final = 1
WELCOME_SECONDS: Final = 20.0
WRITE_SECONDS: Final = 30.0
# What changed is reported this soon, so that a burst of changes is one report.
PROMPT_SECONDS: Final = 0.1
MIN_INTERVAL_SECONDS: Final = 0.2
MAX_INTERVAL_SECONDS: Final = 600.0
MAX_WAITING_RESULTS: Final = 64
# A full report now and then heals what neither side noticed.
FULL_EVERY_SECONDS: Final = 600.0

_log: Final = structlog.stdlib.get_logger("frostline.agent.session")


class SessionError(Exception):
    """A session ended for a reason of its own; ``retry_seconds`` is what the controller asked for."""

    def __init__(self, why: str, retry_seconds: float = 0.0) -> None:
        super().__init__(why)
        self.retry_seconds = retry_seconds


class SessionOwner(Protocol):
    """What a session needs of the agent."""

    def hello(self) -> session_pb2.Hello: ...

    def new_stream(self, report_seconds: float) -> None:
        """A stream begins: sequence numbers start over, and the first report is full."""

    def report(self, *, full: bool) -> contextlib.AbstractContextManager[session_pb2.Report]:
        """A report of this moment; its span ends with the block."""

    def heartbeat(self) -> session_pb2.Heartbeat: ...

    async def welcome(self, welcome: session_pb2.Welcome) -> str:
        """Why this controller is refused, empty when it is not."""

    async def take_budgets(self, budget_set: session_pb2.BudgetSet) -> session_pb2.BudgetResult: ...

    async def do_command(
        self, command: session_pb2.Command, answer: Callable[[session_pb2.CommandResult], None]
    ) -> None: ...


@dataclass(slots=True)
class SessionStatus:
    """For status output and metrics. Times are of the monotonic clock."""

    connected: bool = False
    controller_id: str = ""
    since: float = 0.0
    attempts: int = 0
    last_error: str = ""
    reports_sent: int = 0
    sets_taken: int = 0


_Stream = grpc.aio.StreamStreamCall[session_pb2.SessionRequest, session_pb2.SessionResponse]


class SessionClient:
    """Keeps one session up; ``run`` until cancelled."""

    def __init__(
        self,
        address: str,
        owner: SessionOwner,
        *,
        report_seconds: float | None,
        insecure_off_loopback: bool = False,
        backoff: DialBackoff | None = None,
    ) -> None:
        self._address: Final = address
        self._owner: Final = owner
        self._report_seconds: Final = report_seconds
        self._insecure: Final = insecure_off_loopback
        self._backoff: Final = backoff or DialBackoff()
        self.status: Final = SessionStatus(since=time.monotonic())
        self._changed: Final = asyncio.Event()
        self._full_wanted = False
        self._results: Final[list[session_pb2.SessionRequest]] = []
        self._results_ready: Final = asyncio.Event()

    @property
    def disconnected_seconds(self) -> float:
        """How long there has been no session; 0 while there is one."""
        return 0.0 if self.status.connected else time.monotonic() - self.status.since

    def report_soon(self) -> None:
        """Something changed that the controller should not learn of a whole interval later."""
        self._changed.set()

    async def run(self) -> None:
        while True:
            asked = 0.0
            self.status.attempts += 1
            try:
                await self._session()
                why = "the controller ended the stream"
            except SessionError as error:
                why, asked = str(error), error.retry_seconds
            except grpc.aio.AioRpcError as error:
                why, asked = _explain(error), retry_seconds(error)
            except (OSError, TimeoutError) as error:
                why = str(error) or type(error).__name__
            was_connected = self.status.connected
            self._ended(why)
            wait = self._backoff.wait_seconds(asked)
            # The first failure says it; a controller that stays away for a day does not fill the log.
            log = _log.warning if was_connected or self.status.attempts <= 3 else _log.info
            log("no session with the controller", controller=self._address, why=why, again_in=format_duration(wait))
            await asyncio.sleep(wait)

    async def _session(self) -> None:
        channel = make_channel(self._address, insecure_off_loopback=self._insecure)
        async with channel:
            call: _Stream = session_pb2_grpc.SessionServiceStub(channel).Session()
            try:
                async with asyncio.timeout(WELCOME_SECONDS):
                    await call.write(session_pb2.SessionRequest(hello=self._owner.hello()))
                    first = await call.read()
                await self._greeted(call, first)
            except TimeoutError:
                raise SessionError(f"no answer to Hello within {WELCOME_SECONDS:g} s") from None
            except asyncio.InvalidStateError:
                why = _explain_call(await call.code(), await call.details())
                raise SessionError(why, await _asked(call)) from None
            finally:
                call.cancel()

    async def _greeted(self, call: _Stream, first: object) -> None:
        if not isinstance(first, session_pb2.SessionResponse):
            await _raise_end(call)
            raise SessionError("the controller ended the stream before its Welcome")
        if first.WhichOneof("message") != "welcome":
            raise SessionError(f"the controller began with {first.WhichOneof('message')} instead of Welcome")
        welcome = first.welcome
        refused = await self._owner.welcome(welcome)
        if refused:
            raise SessionError(f"controller {welcome.controller_id} is refused: {refused}")
        report_seconds = self._report_seconds or _within_reason(welcome.report_seconds)
        heartbeat_seconds = _within_reason(welcome.heartbeat_seconds)
        self._owner.new_stream(report_seconds)
        self._backoff.connected()
        self.status.connected, self.status.controller_id = True, welcome.controller_id
        self.status.since, self.status.last_error, self.status.attempts = time.monotonic(), "", 0
        _log.info(
            "session with the controller",
            controller=self._address,
            controller_id=welcome.controller_id,
            epoch=welcome.epoch,
            report_seconds=report_seconds,
            heartbeat_seconds=heartbeat_seconds,
        )
        self._results.clear()
        self._full_wanted = True
        commands: set[asyncio.Task[None]] = set()
        writing = asyncio.Lock()

        async def send(request: session_pb2.SessionRequest) -> None:
            try:
                async with writing, asyncio.timeout(WRITE_SECONDS):
                    await call.write(request)
            except TimeoutError:
                raise SessionError(f"the controller has taken nothing for {WRITE_SECONDS:g} s") from None

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._reports(send, report_seconds))
                group.create_task(self._heartbeats(send, heartbeat_seconds))
                group.create_task(self._send_results(send))
                await self._receive(call, send, commands)
                raise SessionError(_explain_call(await call.code(), await call.details()), await _asked(call))
        except BaseExceptionGroup as failures:
            raise _first_failure(failures) from None
        finally:
            for task in commands:
                task.cancel()

    async def _receive(
        self,
        call: _Stream,
        send: Callable[[session_pb2.SessionRequest], Awaitable[None]],
        commands: set[asyncio.Task[None]],
    ) -> None:
        async for response in _responses(call):
            kind = response.WhichOneof("message")
            if kind == "budget_set":
                result = await self._owner.take_budgets(response.budget_set)
                self.status.sets_taken += 1
                await send(session_pb2.SessionRequest(budget_result=result))
            elif kind == "resync_request":
                _log.info("the controller asks for everything", why=response.resync_request.why)
                self._full_wanted = True
                self._changed.set()
            elif kind == "command":
                task = asyncio.create_task(self._owner.do_command(response.command, self._queue_result))
                commands.add(task)
                task.add_done_callback(commands.discard)
            # Anything else is of a newer protocol, or a second Welcome: nothing to do with it.

    async def _reports(
        self, send: Callable[[session_pb2.SessionRequest], Awaitable[None]], report_seconds: float
    ) -> None:
        full_at = 0.0
        while True:
            now = time.monotonic()
            full = self._full_wanted or now >= full_at
            self._full_wanted = False
            if full:
                full_at = now + FULL_EVERY_SECONDS
            self._changed.clear()
            with self._owner.report(full=full) as report:
                await send(session_pb2.SessionRequest(report=report))
            self.status.reports_sent += 1
            left = report_seconds - (time.monotonic() - now)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, left))
                await asyncio.sleep(PROMPT_SECONDS)

    async def _heartbeats(
        self, send: Callable[[session_pb2.SessionRequest], Awaitable[None]], heartbeat_seconds: float
    ) -> None:
        while True:
            await asyncio.sleep(heartbeat_seconds)
            await send(session_pb2.SessionRequest(heartbeat=self._owner.heartbeat()))

    def _queue_result(self, result: session_pb2.CommandResult) -> None:
        self._results.append(session_pb2.SessionRequest(command_result=result))
        del self._results[:-MAX_WAITING_RESULTS]
        self._results_ready.set()

    async def _send_results(self, send: Callable[[session_pb2.SessionRequest], Awaitable[None]]) -> None:
        while True:
            await self._results_ready.wait()
            self._results_ready.clear()
            while self._results:
                await send(self._results.pop(0))

    def _ended(self, why: str) -> None:
        if self.status.connected:
            self.status.since = time.monotonic()
        self.status.connected = False
        self.status.last_error = why


async def _responses(call: _Stream) -> AsyncIterator[session_pb2.SessionResponse]:
    while True:
        response = await call.read()
        if not isinstance(response, session_pb2.SessionResponse):
            return
        yield response


async def _raise_end(call: _Stream) -> None:
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise SessionError(_explain_call(code, await call.details()), await _asked(call))


async def _asked(call: _Stream) -> float:
    return _retry_seconds(await call.trailing_metadata())


def retry_seconds(error: grpc.aio.AioRpcError) -> float:
    """What a google.rpc.RetryInfo in the error asks for, in seconds; 0 without one."""
    return _retry_seconds(error.trailing_metadata())


def _retry_seconds(metadata: object) -> float:
    for key, value in metadata if isinstance(metadata, (grpc.aio.Metadata, tuple, list)) else ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            with contextlib.suppress(Exception):  # whatever a peer put there must not end the agent
                for detail in status_pb2.Status.FromString(value).details:
                    info = error_details_pb2.RetryInfo()
                    if detail.Unpack(info):
                        return float(max(0.0, info.retry_delay.seconds + info.retry_delay.nanos / 1e9))
    return 0.0


def _explain(error: grpc.aio.AioRpcError) -> str:
    return _explain_call(error.code(), error.details())


def _explain_call(code: grpc.StatusCode | None, details: str | None) -> str:
    if code is grpc.StatusCode.OK:
        return "the controller ended the stream"
    return f"{code.name if code else 'UNKNOWN'}: {details or 'no details'}"


def _within_reason(seconds: float) -> float:
    """A peer may send any number; NaN fails both comparisons."""
    return seconds if MIN_INTERVAL_SECONDS <= seconds <= MAX_INTERVAL_SECONDS else 10.0


def _first_failure(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """A cancellation counts first, then the reason that is not a consequence of the stream's end."""
    flat: list[BaseException] = []
    stack: list[BaseException] = [failures]
    while stack:
        item = stack.pop()
        if isinstance(item, BaseExceptionGroup):
            stack.extend(item.exceptions)
        else:
            flat.append(item)
    for kind in (asyncio.CancelledError, SessionError, grpc.aio.AioRpcError):
        for failure in flat:
            if isinstance(failure, kind):
                return failure
    return flat[0]
