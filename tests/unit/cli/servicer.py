# SPDX-License-Identifier: Apache-2.0
"""A test's own operator service: real gRPC, data that the test chose, and errors on demand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from frostline.v1 import common_pb2, operator_pb2, operator_pb2_grpc
from frostline.wire.channels import bind, make_server

Context = grpc.aio.ServicerContext[Any, Any]


class Servicer(operator_pb2_grpc.OperatorServiceServicer):
    """Answers from `hosts`, `vms` and `policies`; `errors` names an error for a method."""

    def __init__(self) -> None:
        self.hosts: list[operator_pb2.Host] = []
        self.vms: list[operator_pb2.Vm] = []
        self.policies: list[operator_pb2.Policy] = []
        self.explanation = operator_pb2.ExplainResponse()
        self.errors: dict[str, tuple[grpc.StatusCode, str, list[tuple[str, str]]]] = {}
        self.requests: list[Any] = []
        self.drain_answer = operator_pb2.DrainResponse(command_id="c-1", done=True)
        self.drain_steps = 0
        self.store_available = True
        self.fleet_frozen = False
        self.hang: set[str] = set()
        self.watch_messages: list[operator_pb2.WatchResponse] | None = None

    async def _enter(self, method: str, request: Any, context: Context) -> None:
        self.requests.append(request)
        if method in self.hang:
            await asyncio.sleep(30)
        if method in self.errors:
            code, text, violations = self.errors[method]
            if not violations:
                await context.abort(code, text)
            detail = any_pb2.Any()
            detail.Pack(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(field=place, description=why)
                        for place, why in violations
                    ]
                )
            )
            status = rpc_status.to_status(
                status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=text, details=[detail])
            )
            await context.abort(status.code, status.details, status.trailing_metadata)

    async def ListHosts(self, request: Any, context: Any) -> operator_pb2.ListHostsResponse:  # noqa: N802
        await self._enter("ListHosts", request, context)
        return operator_pb2.ListHostsResponse(
            hosts=self.hosts,
            store_available=self.store_available,
            policy_version=12,
            fleet_frozen=self.fleet_frozen,
        )

    async def ListVms(self, request: Any, context: Any) -> operator_pb2.ListVmsResponse:  # noqa: N802
        await self._enter("ListVms", request, context)
        return operator_pb2.ListVmsResponse(
            vms=[vm for vm in self.vms if request.node_id in ("", vm.node_id)],
        )

    async def GetVm(self, request: Any, context: Any) -> operator_pb2.GetVmResponse:  # noqa: N802
        await self._enter("GetVm", request, context)
        for vm in self.vms:
            if request.vm in (vm.identity.vm_id, vm.identity.name):
                return operator_pb2.GetVmResponse(vm=vm)
        await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no VM {request.vm!r}")
        raise AssertionError

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[operator_pb2.WatchResponse]:  # noqa: N802
        await self._enter("Watch", request, context)
        if self.watch_messages is not None:
            for message in self.watch_messages:
                yield message
            return
        chosen = [vm for vm in self.vms if request.vm in ("", vm.identity.vm_id, vm.identity.name)]
        yield operator_pb2.WatchResponse(hosts=self.hosts, vms=chosen)
        while True:
            await asyncio.sleep(request.interval_seconds or 1)
            for vm in chosen:
                vm.state.evicted_bytes += 2**20
            yield operator_pb2.WatchResponse(vms=chosen)

    async def PutPolicy(self, request: Any, context: Any) -> operator_pb2.PutPolicyResponse:  # noqa: N802
        await self._enter("PutPolicy", request, context)
        return operator_pb2.PutPolicyResponse(version=0 if request.dry_run else 13)

    async def GetPolicy(self, request: Any, context: Any) -> operator_pb2.GetPolicyResponse:  # noqa: N802
        await self._enter("GetPolicy", request, context)
        return operator_pb2.GetPolicyResponse(policy=self.policies[0])

    async def ListPolicies(self, request: Any, context: Any) -> operator_pb2.ListPoliciesResponse:  # noqa: N802
        await self._enter("ListPolicies", request, context)
        return operator_pb2.ListPoliciesResponse(policies=self.policies[: request.limit])

    async def Freeze(self, request: Any, context: Any) -> operator_pb2.FreezeResponse:  # noqa: N802
        await self._enter("Freeze", request, context)
        return operator_pb2.FreezeResponse(hosts=len(self.hosts))

    async def Unfreeze(self, request: Any, context: Any) -> operator_pb2.UnfreezeResponse:  # noqa: N802
        await self._enter("Unfreeze", request, context)
        return operator_pb2.UnfreezeResponse(hosts=len(self.hosts))

    async def Drain(self, request: Any, context: Any) -> operator_pb2.DrainResponse:  # noqa: N802
        await self._enter("Drain", request, context)
        for _step in range(self.drain_steps):
            for vm in self.vms:
                vm.state.evicted_bytes //= 2
            await asyncio.sleep(0.3)
        return self.drain_answer

    async def Explain(self, request: Any, context: Any) -> operator_pb2.ExplainResponse:  # noqa: N802
        await self._enter("Explain", request, context)
        return self.explanation


class RunningServer:
    """The servicer on a unix socket, in a thread with its own event loop (the CLI under test has another)."""

    def __init__(self, folder: Path) -> None:
        self.servicer = Servicer()
        self.address = f"unix:{folder}/operator.sock"
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> RunningServer:
        self._thread.start()
        if not self._started.wait(10):
            raise RuntimeError("the test's operator service did not start in 10 s")
        return self

    def __exit__(self, *_error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        self._server = make_server()
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(self.servicer, self._server)
        bind(self._server, self.address)
        await self._server.start()


def sample_histogram() -> common_pb2.Histogram:
    mib = 2**20
    ages = [0, 2, 4, 8, 16, 32, 64, 120, 240, 480, 960, 1920, 3840, 7680, 15360, 30720]
    resident = [212, 31, 12, 4, 6, 30, 81, 36, 0, 0, 0, 0, 0, 0, 0, 0]
    evicted = [0, 0, 0, 0, 0, 1, 20, 130, 260, 180, 21, 0, 0, 0, 0, 0]
    promotions = [5210.0, 840, 122, 61, 30.5, 12, 4.4, 2, 0.7, 0.05, 0, 0, 0, 0, 0, 0]
    return common_pb2.Histogram(
        min_age_seconds=ages,
        resident_bytes=[r * mib for r in resident],
        evicted_bytes=[e * mib for e in evicted],
        promotions_per_minute=promotions,
    )


def sample_vm(name: str = "web-1", node_id: str = "node-a", **state: Any) -> operator_pb2.Vm:
    mib = 2**20
    vm = operator_pb2.Vm(
        identity=common_pb2.VmIdentity(
            vm_id=f"6f3c1b2a-0000-4000-8000-{abs(hash(name)) % 10**12:012d}",
            name=name,
            uuid=f"6f3c1b2a-0000-4000-8000-{abs(hash(name)) % 10**12:012d}",
            pid=4711,
            memory_bytes=1024 * mib,
        ),
        node_id=node_id,
        state=common_pb2.VmState(
            pager_state=common_pb2.PAGER_STATE_ACTIVE,
            holding_back=common_pb2.REASON_GRANTED,
            memory_bytes=1024 * mib,
            resident_bytes=412 * mib,
            evicted_bytes=608 * mib,
            evicted_zero_bytes=100 * mib,
            evicted_same_bytes=20 * mib,
            evicted_ram_bytes=488 * mib,
            stored_bytes=150 * mib,
            pool_bytes=163 * mib,
            metadata_bytes=2 * mib,
            working_set_bytes=290 * mib,
            effective_budget_bytes=620 * mib,
            effective_version=41,
            lease_remaining_seconds=22.4,
            scan_interval_seconds=2,
            fault_p50_ns=12_345,
            fault_p99_ns=45_678,
            pager_pid=4790,
            attached_seconds=755,
            tracker=common_pb2.TRACKER_RWP,
            freeze_method=common_pb2.FREEZE_METHOD_RWP,
            counters=common_pb2.Counters(
                scans=377,
                evictions=201_123,
                faults=45_120,
                stall_ns=560_000_000,
                arm_ns=377 * 2_500_000,
                harvest_ns=377 * 900_000,
            ),
            histogram=sample_histogram(),
        ),
        decision=operator_pb2.Decision(
            at_unix_ns=1_795_419_542_000_000_000,
            version=41,
            mode=common_pb2.MODE_ENFORCE,
            budget_bytes=620 * mib,
            planned_bytes=620 * mib,
            cold_bytes=640 * mib,
            min_age_seconds=120,
            reason=common_pb2.REASON_GRANTED,
            policy_class="standard",
            sentence="620 MiB may be away: all that has been idle for at least 2m, as class standard allows",
        ),
        ack=operator_pb2.VmAck(accepted=True, effective_bytes=620 * mib, version=41),
        report_age_seconds=3.2,
    )
    for key, value in state.items():
        setattr(vm.state, key, value)
    return vm


def fill(servicer: Servicer) -> None:
    """A small fleet in which most things that can be shown happen."""
    mib, gib = 2**20, 2**30
    servicer.vms = [sample_vm(), sample_vm("web-2", "node-a", effective_budget_bytes=300 * mib)]
    plan = sample_vm("build-runner-with-a-rather-long-name-0042", "node-b", evicted_bytes=0, pool_bytes=0)
    plan.decision.mode = common_pb2.MODE_PLAN
    plan.decision.budget_bytes = 0
    plan.decision.reason = common_pb2.REASON_MODE
    plan.state.effective_budget_bytes = 0
    excluded = sample_vm("db-1", "node-b", evicted_bytes=0, pool_bytes=0, effective_budget_bytes=0)
    excluded.decision.reason = common_pb2.REASON_EXCLUDED
    excluded.decision.budget_bytes = 0
    unsafe = sample_vm("gpu-1", "node-b", evicted_bytes=0, pool_bytes=0, effective_budget_bytes=0)
    unsafe.state.refusal = common_pb2.REFUSAL_PASSTHROUGH
    unsafe.state.refusal_detail = "/dev/vfio/12 is open"
    unsafe.state.pager_state = common_pb2.PAGER_STATE_UNSPECIFIED
    unsafe.state.tracker = common_pb2.TRACKER_UNSPECIFIED
    unsafe.state.cold_estimate_min_age_seconds.extend([120, 600])
    unsafe.state.cold_estimate_bytes.extend([300 * mib, 250 * mib])
    unsafe.state.cold_estimate_looked_seconds = 14
    unsafe.state.cold_estimate_sharers = 3
    unsafe.decision.reason = common_pb2.REASON_UNSAFE
    unsafe.decision.budget_bytes = 0
    servicer.vms += [plan, excluded, unsafe]
    servicer.hosts = [
        operator_pb2.Host(
            node_id="node-a",
            state=operator_pb2.HOST_STATE_CONNECTED,
            last_seen_seconds=2.2,
            vm_count=2,
            host_memory_bytes=64 * gib,
            host_available_bytes=21 * gib,
            memory_bytes=2 * gib,
            resident_bytes=824 * mib,
            evicted_bytes=1216 * mib,
            pool_bytes=326 * mib,
            saved_bytes=886 * mib,
            budget_version_desired=41,
            budget_version_applied=41,
            epoch=3,
            agent_version="0.1.0",
        ),
        operator_pb2.Host(
            node_id="node-b.rack-12.example",
            state=operator_pb2.HOST_STATE_SUSPECT,
            last_seen_seconds=48,
            vm_count=3,
            host_memory_bytes=2048 * gib,
            host_available_bytes=900 * gib,
            memory_bytes=3 * gib,
            resident_bytes=1236 * mib,
            budget_version_desired=18,
            budget_version_applied=17,
            epoch=3,
            agent_version="0.1.0",
            frozen=True,
            note="two agents say that they are it",
        ),
    ]
    servicer.policies = [
        operator_pb2.Policy(
            version=12,
            document="version: 1\nclasses:\n  standard: {mode: enforce}\n",
            author="anna",
            comment="let standard go",
            created_at_unix_ns=1_795_419_542_000_000_000,
            in_force=True,
        ),
        operator_pb2.Policy(version=11, author="ben", created_at_unix_ns=1_795_400_000_000_000_000),
    ]
    servicer.explanation = operator_pb2.ExplainResponse(
        sentence="web-1 may have 620 MiB away: everything that has been idle for at least 2m.",
        reason=common_pb2.REASON_GRANTED,
        decision=servicer.vms[0].decision,
        details=["mode is enforce", "class is standard", "the lease runs for another 22 s"],
    )
