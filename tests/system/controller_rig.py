# SPDX-License-Identifier: Apache-2.0
"""A real redis-server, a real frostline-controller, and agents written by hand as raw gRPC clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import redis

from frostline.v1 import common_pb2 as pb
from frostline.v1 import operator_pb2_grpc, session_pb2_grpc
from frostline.v1 import session_pb2 as wire
from frostline.wire.channels import make_channel

MIB = 1 << 20
GIB = 1 << 30
WAIT_SECONDS = 20.0


async def until(what: str, condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
    """What `condition` gives once it is true; it may be a coroutine function."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.05)


class RedisServer:
    """A redis-server on a unix socket of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.socket = folder / "r.sock"
        self.folder = folder
        self.url = f"unix://{self.socket}"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> Self:
        arguments = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder)]
        arguments += ["--save", "", "--logfile", str(self.folder / "redis.log"), *self._arguments, *more]
        self._process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.client().ping()
                return self
            except redis.exceptions.RedisError:
                assert time.monotonic() < deadline, "redis-server did not start"
                time.sleep(0.02)

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), decode_responses=True, socket_timeout=5)

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None


class ControllerProcess:
    """frostline-controller with short timings, logging JSON to a file."""

    def __init__(self, folder: Path, *arguments: str, redis_url: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.address = f"unix:{folder / 'c.sock'}"
        self._log = folder / "controller.log"
        self._arguments = ["--listen", self.address, "--metrics-listen", "127.0.0.1:0", "--log-format", "json"]
        self._arguments += ["--data-dir", str(folder / "data"), "--decide-seconds", "0.1", "--report-seconds", "5"]
        self._arguments += [*(["--redis-url", redis_url] if redis_url else []), *arguments]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        ready = len(self.logged("controller ready"))
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "frostline.controller.main", *self._arguments],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={key: value for key, value in os.environ.items() if not key.startswith("FROSTLINE_")},
            )
        deadline = time.monotonic() + WAIT_SECONDS
        while len(self.logged("controller ready")) == ready:
            assert self.process.poll() is None, f"controller ended: {self._log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, "controller not ready"
            time.sleep(0.02)
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.send_signal(number)
        try:
            return process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
            raise

    def all_logged(self) -> list[dict[str, Any]]:
        if not self._log.exists():
            return []
        # The last line may be half written.
        lines = self._log.read_text().rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def logged(self, event: str) -> list[dict[str, Any]]:
        """All log lines with that event."""
        return [entry for entry in self.all_logged() if entry.get("event") == event]

    def operator(self, channel: grpc.aio.Channel) -> operator_pb2_grpc.OperatorServiceAsyncStub:
        return operator_pb2_grpc.OperatorServiceStub(channel)


def identity(vm_id: str, memory_bytes: int = GIB, **more: Any) -> pb.VmIdentity:
    return pb.VmIdentity(vm_id=vm_id, name=more.pop("name", f"name-{vm_id}"), memory_bytes=memory_bytes, **more)


def state(vm_id: str, cold_bytes: int = GIB // 2, evicted_bytes: int = 0, memory_bytes: int = GIB) -> pb.VmState:
    """A healthy VM that has touched all of its memory: so much cold, the rest hot."""
    hot = memory_bytes - cold_bytes
    return pb.VmState(
        vm_id=vm_id,
        pager_state=pb.PAGER_STATE_ACTIVE,
        holding_back=pb.REASON_GRANTED,
        memory_bytes=memory_bytes,
        resident_bytes=memory_bytes - evicted_bytes,
        evicted_bytes=evicted_bytes,
        counters=pb.Counters(scans=20),
        histogram=pb.Histogram(
            min_age_seconds=[0, 60, 120],
            resident_bytes=[hot, 0, cold_bytes - evicted_bytes],
            evicted_bytes=[0, 0, evicted_bytes],
            promotions_per_minute=[1, 0, 0],
        ),
    )


class RawAgent:
    """One Session stream, driven by hand. Nothing is answered unless a test says so."""

    def __init__(self, address: str, node_id: str = "node-1", instance: bytes = b"0123456789abcdef") -> None:
        self.node_id = node_id
        self.instance = instance
        self.sequence = 0
        self._channel = make_channel(address)
        stub = session_pb2_grpc.SessionServiceStub(self._channel)
        self.call: Any = stub.Session()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        await self._channel.close()

    async def send(self, **message: Any) -> None:
        await asyncio.wait_for(self.call.write(wire.SessionRequest(**message)), WAIT_SECONDS)

    async def hello(self, vms: Iterable[pb.VmIdentity] = (), quiet: bool = False, **more: Any) -> wire.Welcome:
        """Say hello and, unless `quiet`, what every agent says next: a first report, here of VMs not attached yet."""
        vms = list(vms)
        fields: dict[str, Any] = {"protocol_version": 1, "agent_instance": self.instance, "node_id": self.node_id}
        fields |= {"vms": list(vms), "host_memory_bytes": 64 * GIB, "host_available_bytes": 8 * GIB, **more}
        await self.send(hello=wire.Hello(**fields))
        welcome = (await self.receive("welcome")).welcome
        if vms and not quiet:
            unattached = [pb.VmState(vm_id=vm.vm_id, memory_bytes=vm.memory_bytes) for vm in vms]
            await self.report(unattached, full=True, vms=vms)
        return welcome

    async def report(self, states: Iterable[pb.VmState], sequence: int | None = None, **more: Any) -> None:
        self.sequence = self.sequence + 1 if sequence is None else sequence
        fields: dict[str, Any] = {"host_memory_bytes": 64 * GIB, "host_available_bytes": 8 * GIB, **more}
        await self.send(report=wire.Report(sequence=self.sequence, states=list(states), **fields))

    async def receive(self, kind: str, seconds: float = WAIT_SECONDS) -> wire.SessionResponse:
        """The next message of that kind; others before it are acknowledged where that is needed, and dropped."""
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            assert left > 0, f"no {kind} within {seconds} s"
            response = await asyncio.wait_for(self.call.read(), left)
            if response is grpc.aio.EOF:
                raise AssertionError(f"stream ended with {await self.call.code()}: {await self.call.details()}")
            if response.WhichOneof("message") == kind:
                return response  # type: ignore[no-any-return]
            if response.WhichOneof("message") == "budget_set":
                await self.ack(response.budget_set)

    async def ack(self, budget_set: wire.BudgetSet, **more: Any) -> None:
        fields: dict[str, Any] = {"applied": True, "epoch": budget_set.epoch, "reason": pb.REASON_GRANTED, **more}
        vms = [
            wire.VmBudgetResult(
                vm_id=budget.vm_id, accepted=True, reason=pb.REASON_GRANTED, effective_bytes=budget.bytes
            )
            for budget in budget_set.budgets
        ]
        await self.send(
            budget_result=wire.BudgetResult(nonce=budget_set.nonce, version=budget_set.version, vms=vms, **fields)
        )

    async def budgets(self, seconds: float = WAIT_SECONDS, ack: bool = True) -> wire.BudgetSet:
        """The next budget set, acknowledged."""
        budget_set = (await self.receive("budget_set", seconds)).budget_set
        if ack:
            await self.ack(budget_set)
        return budget_set

    async def budget_where(self, condition: Callable[[wire.Budget], bool], vm_id: str = "a") -> Any:
        """Acknowledge sets until the VM's budget is as wanted."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            for budget in (await self.budgets(max(deadline - time.monotonic(), 0.1))).budgets:
                if budget.vm_id == vm_id and condition(budget):
                    return budget
        raise AssertionError("no such budget")

    async def status_details(self) -> bytes:
        """The serialized google.rpc.Status of a stream that has ended."""
        for key, value in await self.call.trailing_metadata():
            if key == "grpc-status-details-bin":
                return bytes(value)
        return b""

    async def ended(self, seconds: float = WAIT_SECONDS) -> tuple[grpc.StatusCode, str]:
        """How the stream ended, from the other side."""

        async def drain() -> None:
            while await self.call.read() is not grpc.aio.EOF:
                pass

        with contextlib.suppress(grpc.aio.AioRpcError):
            await asyncio.wait_for(drain(), seconds)
        return await self.call.code(), await self.call.details()
