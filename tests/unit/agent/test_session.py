# SPDX-License-Identifier: Apache-2.0
"""The session client against a scripted controller on a unix socket: greeting, reports, budgets, commands, ends."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from frostline.agent.backoff import DialBackoff
from frostline.agent.session import SessionClient
from frostline.v1 import session_pb2, session_pb2_grpc
from frostline.wire.channels import bind, make_server

LIMIT_SECONDS = 20.0
Stream = grpc.aio.ServicerContext[session_pb2.SessionRequest, session_pb2.SessionResponse]
Script = Callable[[AsyncIterator[session_pb2.SessionRequest], Stream], AsyncIterator[session_pb2.SessionResponse]]


class Owner:
    """The agent's side, written down."""

    def __init__(self) -> None:
        self.fulls: list[bool] = []
        self.sets: list[int] = []
        self.commands: list[str] = []
        self.streams = 0
        self.refuse = ""
        self.sequence = 0

    def hello(self) -> session_pb2.Hello:
        return session_pb2.Hello(node_id="node", protocol_version=1)

    def new_stream(self, report_seconds: float) -> None:
        self.streams += 1
        self.sequence = 0
        self.report_seconds = report_seconds

    @contextlib.contextmanager
    def report(self, *, full: bool) -> Iterator[session_pb2.Report]:
        self.fulls.append(full)
        self.sequence += 1
        yield session_pb2.Report(sequence=self.sequence, full=full)

    def heartbeat(self) -> session_pb2.Heartbeat:
        return session_pb2.Heartbeat(last_sequence=self.sequence)

    async def welcome(self, _welcome: session_pb2.Welcome) -> str:
        return self.refuse

    async def take_budgets(self, budget_set: session_pb2.BudgetSet) -> session_pb2.BudgetResult:
        self.sets.append(budget_set.version)
        return session_pb2.BudgetResult(version=budget_set.version, nonce=budget_set.nonce, applied=True)

    async def do_command(
        self, command: session_pb2.Command, answer: Callable[[session_pb2.CommandResult], None]
    ) -> None:
        self.commands.append(command.command_id)
        answer(session_pb2.CommandResult(command_id=command.command_id, done=True))


class Controller(session_pb2_grpc.SessionServiceServicer):
    """Plays one script for each stream that comes."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.opened_at: list[float] = []
        self.seen: list[session_pb2.SessionRequest] = []

    async def Session(  # noqa: N802, the name is the protocol's
        self, request_iterator: AsyncIterator[session_pb2.SessionRequest], context: Stream
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        self.opened_at.append(time.monotonic())
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]

        async def noted() -> AsyncIterator[session_pb2.SessionRequest]:
            async for request in request_iterator:
                self.seen.append(request)
                yield request

        async for response in script(noted(), context):
            yield response


class Quick(DialBackoff):
    """Waits what the controller asks for, else next to nothing."""

    def __init__(self) -> None:
        super().__init__(random.Random(1))
        self.asked: list[float] = []

    def wait_seconds(self, asked_seconds: float = 0.0) -> float:
        self.asked.append(asked_seconds)
        return 0.05


@contextlib.asynccontextmanager
async def session(folder: Path, controller: Controller, owner: Owner) -> AsyncIterator[tuple[SessionClient, Quick]]:
    address = f"unix:{folder / 'c.sock'}"
    server = make_server()
    session_pb2_grpc.add_SessionServiceServicer_to_server(controller, server)
    bind(server, address)
    await server.start()
    backoff = Quick()
    client = SessionClient(address, owner, report_seconds=None, backoff=backoff)
    task = asyncio.create_task(client.run())
    try:
        yield client, backoff
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await server.stop(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def welcome(report_seconds: float = 60.0, heartbeat_seconds: float = 60.0) -> session_pb2.SessionResponse:
    greeting = session_pb2.Welcome(epoch=1, report_seconds=report_seconds, heartbeat_seconds=heartbeat_seconds)
    return session_pb2.SessionResponse(welcome=greeting)


async def polite(
    requests: AsyncIterator[session_pb2.SessionRequest], _context: Stream
) -> AsyncIterator[session_pb2.SessionResponse]:
    """Greets, and then only listens."""
    first = await anext(requests)
    assert first.WhichOneof("message") == "hello"
    yield welcome()
    async for _ in requests:
        pass


async def test_hello_then_a_full_report_then_deltas_when_something_changed(tmp_path: Path) -> None:
    owner, controller = Owner(), Controller(polite)
    async with session(tmp_path, controller, owner) as (client, _):
        await until(lambda: len(owner.fulls) == 1)
        assert client.status.connected and client.disconnected_seconds == 0.0
        client.report_soon()
        await until(lambda: len(owner.fulls) == 2 and len(controller.seen) >= 3)
    kinds = [request.WhichOneof("message") for request in controller.seen]
    assert kinds[:3] == ["hello", "report", "report"] and owner.fulls == [True, False]
    assert [request.report.sequence for request in controller.seen[1:3]] == [1, 2]


async def test_a_burst_of_changes_is_one_report(tmp_path: Path) -> None:
    owner = Owner()
    async with session(tmp_path, Controller(polite), owner) as (client, _):
        await until(lambda: len(owner.fulls) == 1)
        for _ in range(50):
            client.report_soon()
        await until(lambda: len(owner.fulls) >= 2)
        await asyncio.sleep(0.5)
    assert len(owner.fulls) == 2


async def test_budgets_commands_and_resync_are_answered(tmp_path: Path) -> None:
    async def script(
        requests: AsyncIterator[session_pb2.SessionRequest], _context: Stream
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        await anext(requests)
        yield welcome(heartbeat_seconds=0.2)
        yield session_pb2.SessionResponse(budget_set=session_pb2.BudgetSet(version=7, nonce=b"n", lease_seconds=9))
        drain = session_pb2.DrainCommand(vm_id="x")
        yield session_pb2.SessionResponse(command=session_pb2.Command(command_id="c1", drain=drain))
        yield session_pb2.SessionResponse(resync_request=session_pb2.ResyncRequest(why="test"))
        async for _ in requests:
            pass

    owner, controller = Owner(), Controller(script)
    async with session(tmp_path, controller, owner):
        await until(lambda: {"budget_result", "command_result", "heartbeat"} <= kinds_of(controller))
        await until(lambda: owner.fulls[:2] == [True, True])
    assert owner.sets == [7] and owner.commands == ["c1"]
    result = next(r.budget_result for r in controller.seen if r.HasField("budget_result"))
    assert (result.version, result.nonce) == (7, b"n")


def kinds_of(controller: Controller) -> set[str]:
    return {str(request.WhichOneof("message")) for request in controller.seen}


async def test_a_stream_that_ends_is_dialled_again_with_a_full_report(tmp_path: Path) -> None:
    async def rude(
        requests: AsyncIterator[session_pb2.SessionRequest], context: Stream
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        await anext(requests)
        yield welcome()
        await anext(requests)
        await context.abort(grpc.StatusCode.ABORTED, "a newer stream of this node")

    owner = Owner()
    async with session(tmp_path, Controller(rude, polite), owner) as (client, _):
        await until(lambda: owner.streams == 2 and len(owner.fulls) == 2)
        assert client.status.connected
    assert owner.fulls == [True, True]


async def test_retry_info_is_honoured(tmp_path: Path) -> None:
    async def full_house(
        requests: AsyncIterator[session_pb2.SessionRequest], context: Stream
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        await anext(requests)
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(7500)
        detail = any_pb2.Any()
        detail.Pack(info)
        status = status_pb2.Status(code=8, message="too many new streams", details=[detail])
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many new streams")
        yield welcome()

    owner = Owner()
    async with session(tmp_path, Controller(full_house), owner) as (client, backoff):
        await until(lambda: backoff.asked)
        assert "too many new streams" in client.status.last_error
        assert backoff.asked[0] == pytest.approx(7.5)
        assert client.disconnected_seconds > 0


async def test_a_controller_whose_epoch_is_refused_gets_no_report(tmp_path: Path) -> None:
    owner = Owner()
    owner.refuse = "its epoch 1 is below 5"
    async with session(tmp_path, Controller(polite), owner) as (client, backoff):
        await until(lambda: backoff.asked)
        assert "below 5" in client.status.last_error
    assert not owner.fulls


async def test_mad_intervals_do_not_make_the_agent_mad(tmp_path: Path) -> None:
    async def mad(
        requests: AsyncIterator[session_pb2.SessionRequest], _context: Stream
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        await anext(requests)
        yield welcome(float("nan"), -1.0)
        async for _ in requests:
            pass

    owner, controller = Owner(), Controller(mad)
    async with session(tmp_path, controller, owner):
        await until(lambda: owner.fulls and len(controller.seen) >= 2)
        await asyncio.sleep(0.3)
    assert owner.report_seconds == 10.0 and len(controller.seen) == 2


async def test_nobody_listening_is_said_and_tried_again(tmp_path: Path) -> None:
    backoff = Quick()
    client = SessionClient(f"unix:{tmp_path / 'none.sock'}", Owner(), report_seconds=1.0, backoff=backoff)
    task = asyncio.create_task(client.run())
    await until(lambda: len(backoff.asked) >= 2)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert client.status.last_error.startswith("UNAVAILABLE") and not client.status.connected
