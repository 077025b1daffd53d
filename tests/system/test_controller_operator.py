# SPDX-License-Identifier: Apache-2.0
"""The operator API, its telemetry, and the end of the process, with a real controller and Redis."""

from __future__ import annotations

import asyncio
import signal
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from frostline.v1 import common_pb2 as pb
from frostline.v1 import operator_pb2 as op
from frostline.v1 import session_pb2 as wire
from frostline.wire.channels import make_channel
from tests.system.controller_rig import GIB, MIB, ControllerProcess, RawAgent, identity, state, until
from tests.system.otlp_receiver import OtlpReceiver

ENFORCE = (
    "version: 1\nclasses: {standard: {mode: enforce, floor: 0, cap: 100%}}\nvms: {name-excluded: {exclude: true}}\n"
)


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory, receiver: OtlpReceiver) -> Iterator[ControllerProcess]:
    folder = tmp_path_factory.mktemp("c")
    process = ControllerProcess(folder, "--lease-seconds", "30", "--otlp-endpoint", receiver.endpoint)
    process.start()
    yield process
    assert process.stop() == 0


@pytest.fixture
async def channel(controller: ControllerProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with make_channel(controller.address) as channel:
        yield channel


@pytest.fixture
async def operator(controller: ControllerProcess, channel: grpc.aio.Channel) -> Any:
    stub = controller.operator(channel)
    await stub.PutPolicy(op.PutPolicyRequest(document=ENFORCE), timeout=10)
    return stub


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def details_of(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """The first google.rpc detail of that kind."""
    status = status_pb2.Status()
    trailing = error.trailing_metadata() or ()
    status.ParseFromString(dict(trailing)["grpc-status-details-bin"])
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            return detail
    raise AssertionError(f"no {kind.__name__} in {status}")


async def test_policy_versions_and_compare_and_set(operator: Any) -> None:
    in_force = (await operator.GetPolicy(op.GetPolicyRequest())).policy
    request = op.PutPolicyRequest(document=ENFORCE + "# two\n", expected_version=in_force.version, comment="two")
    version = (await operator.PutPolicy(request, timeout=5, metadata=[("frostline-user", "alice")])).version
    assert version == in_force.version + 1
    error = await refused(operator.PutPolicy(request, timeout=5))
    assert error.code() is grpc.StatusCode.ABORTED
    assert f"version {version} is in force" in str(error.details())
    stale = op.PutPolicyRequest(document=ENFORCE, expected_version=in_force.version, dry_run=True)
    assert (await refused(operator.PutPolicy(stale, timeout=5))).code() is grpc.StatusCode.ABORTED
    got = (await operator.GetPolicy(op.GetPolicyRequest(version=version))).policy
    assert got.document.endswith("# two\n")
    assert got.in_force
    assert got.author.startswith("alice (")
    listed = (await operator.ListPolicies(op.ListPoliciesRequest(limit=2))).policies
    assert [(policy.version, policy.in_force, policy.document) for policy in listed] == [
        (version, True, ""),
        (version - 1, False, ""),
    ]
    assert listed[0].comment == "two"
    first = (await operator.GetPolicy(op.GetPolicyRequest(version=1))).policy
    assert (first.author, first.in_force) == ("frostline", False)
    missing = await refused(operator.GetPolicy(op.GetPolicyRequest(version=10**6)))
    assert missing.code() is grpc.StatusCode.NOT_FOUND


async def test_only_one_of_many_writers_wins(operator: Any) -> None:
    expected = (await operator.GetPolicy(op.GetPolicyRequest())).policy.version
    request = op.PutPolicyRequest(document=ENFORCE, expected_version=expected)
    results = await asyncio.gather(
        *(operator.PutPolicy(request, timeout=20) for _ in range(10)), return_exceptions=True
    )
    assert sum(not isinstance(result, Exception) for result in results) == 1
    assert (await operator.GetPolicy(op.GetPolicyRequest())).policy.version == expected + 1


async def test_bad_policy_is_rejected_whole_with_every_place(operator: Any) -> None:
    before = (await operator.GetPolicy(op.GetPolicyRequest())).policy
    document = (
        "version: 1\nvms: {v: {class: gold}}\n"
        "classes: {batch: {floor: -5MiB, colour: red}, a: {floor: 90%, cap: 80%}}\n"
    )
    error = await refused(operator.PutPolicy(op.PutPolicyRequest(document=document), timeout=5))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad = details_of(error, error_details_pb2.BadRequest)
    assert [violation.field for violation in bad.field_violations] == [
        "document.classes.a.floor",
        "document.classes.batch.colour",
        "document.classes.batch.floor",
        "document.vms.v.class",
    ]
    after = (await operator.GetPolicy(op.GetPolicyRequest())).policy
    assert (after.version, after.document) == (before.version, before.document)
    valid = op.PutPolicyRequest(document=ENFORCE, dry_run=True)
    assert (await operator.PutPolicy(valid, timeout=5)).version == before.version


async def test_oversized_policy(operator: Any) -> None:
    error = await refused(operator.PutPolicy(op.PutPolicyRequest(document="#" * 70_000), timeout=5))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 65536" in str(error.details())
    error = await refused(operator.PutPolicy(op.PutPolicyRequest(document="version: 1", comment="x" * 2000), timeout=5))
    assert details_of(error, error_details_pb2.BadRequest).field_violations[0].field == "comment"


async def test_unknown_and_ambiguous_names(controller: ControllerProcess, operator: Any) -> None:
    for call in (
        operator.GetVm(op.GetVmRequest(vm="nobody")),
        operator.GetVm(op.GetVmRequest(vm="")),
        operator.Explain(op.ExplainRequest(vm="nobody")),
        operator.Drain(op.DrainRequest(vm="nobody")),
        operator.ListVms(op.ListVmsRequest(node_id="nobody")),
        operator.Freeze(op.FreezeRequest(node_id="nobody")),
        operator.Unfreeze(op.UnfreezeRequest(vm="nobody")),
    ):
        assert (await refused(call)).code() is grpc.StatusCode.NOT_FOUND
    async with RawAgent(controller.address, "twins") as agent:
        await agent.hello([identity("t1", name="twin", uuid="u-1"), identity("t2", name="twin", uuid="u-2")])
        await agent.budgets()
        error = await refused(operator.GetVm(op.GetVmRequest(vm="twin")))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "t1 on twins, t2 on twins" in str(error.details())
        assert (await operator.GetVm(op.GetVmRequest(vm="u-2"))).vm.identity.vm_id == "t2"


async def test_excluded_vm_gets_no_leave(controller: ControllerProcess, operator: Any) -> None:
    async with RawAgent(controller.address, "excluding") as agent:
        await agent.hello([identity("excluded"), identity("included")])
        vms = [identity("excluded"), identity("included")]
        await agent.report([state("excluded"), state("included")], full=True, vms=vms)
        await agent.budget_where(lambda budget: budget.bytes == GIB // 2, "included")
        explained = await operator.Explain(op.ExplainRequest(vm="excluded"))
        assert explained.reason == pb.REASON_EXCLUDED
        assert explained.sentence == "name-excluded is excluded by policy: Frostline leaves it alone."
        assert explained.decision.mode == pb.MODE_OFF
        assert explained.decision.budget_bytes == explained.decision.planned_bytes == 0


async def test_freeze_and_unfreeze_at_every_level(controller: ControllerProcess, operator: Any) -> None:
    async with RawAgent(controller.address, "freezing") as agent:
        await agent.hello([identity("f")])
        await agent.report([state("f", evicted_bytes=64 * MIB)], full=True, vms=[identity("f")])
        await agent.budget_where(lambda budget: budget.bytes == GIB // 2, "f")
        for target in ({}, {"node_id": "freezing"}, {"vm": "name-f"}):
            await operator.Freeze(op.FreezeRequest(why="a test", **target), timeout=5)
            frozen = await agent.budget_where(lambda budget: budget.reason == pb.REASON_FROZEN, "f")
            assert frozen.bytes == 64 * MIB
            explained = await operator.Explain(op.ExplainRequest(vm="f"))
            assert "frozen" in explained.sentence
            assert any(detail.endswith(": a test.") for detail in explained.details)
            await operator.Unfreeze(op.UnfreezeRequest(**target), timeout=5)
            await agent.budget_where(lambda budget: budget.reason == pb.REASON_GRANTED, "f")
            again = await refused(operator.Unfreeze(op.UnfreezeRequest(**target), timeout=5))
            assert again.code() is grpc.StatusCode.NOT_FOUND
        error = await refused(operator.Freeze(op.FreezeRequest(vm="f", node_id="freezing")))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_drain_waits_and_leaves_the_vm_frozen(controller: ControllerProcess, operator: Any) -> None:
    async with RawAgent(controller.address, "draining") as agent:
        await agent.hello([identity("d")])
        await agent.report([state("d", evicted_bytes=64 * MIB)], full=True, vms=[identity("d")])
        await agent.budget_where(lambda budget: budget.bytes == GIB // 2, "d")
        drain = asyncio.ensure_future(operator.Drain(op.DrainRequest(vm="d", wait=True), timeout=15))
        command = (await agent.receive("command")).command
        assert command.drain.vm_id == "d"
        draining = await agent.budget_where(lambda budget: budget.bytes == 0, "d")
        assert draining.reason == pb.REASON_DRAINING
        assert not drain.done()
        await agent.send(command_result=wire.CommandResult(command_id=command.command_id, done=True))
        await agent.report([state("d")])
        response = await drain
        assert (response.done, response.evicted_bytes, response.command_id) == (True, 0, command.command_id)
        frozen = await agent.budget_where(lambda budget: budget.reason == pb.REASON_FROZEN, "d")
        assert frozen.bytes == 0
        await operator.Unfreeze(op.UnfreezeRequest(vm="d"), timeout=5)
        await agent.budget_where(lambda budget: budget.bytes == GIB // 2, "d")


async def test_drain_answers_before_the_deadline_and_tells_of_failure(
    controller: ControllerProcess, operator: Any
) -> None:
    async with RawAgent(controller.address, "stuck") as agent:
        await agent.hello([identity("s")])
        await agent.report([state("s", evicted_bytes=64 * MIB)], full=True, vms=[identity("s")])
        await agent.budget_where(lambda budget: budget.bytes == GIB // 2, "s")
        slow = await operator.Drain(op.DrainRequest(vm="s", wait=True), timeout=4)
        assert (slow.done, slow.evicted_bytes) == (False, 64 * MIB)
        failing = asyncio.ensure_future(operator.Drain(op.DrainRequest(vm="s", wait=True), timeout=15))
        await agent.receive("command")
        command = (await agent.receive("command")).command
        await agent.send(command_result=wire.CommandResult(command_id=command.command_id, detail="pager is stuck"))
        error = await refused(failing)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "pager is stuck" in str(error.details())
    await until("the agent is gone", lambda: _is_gone(operator, "stuck"))
    error = await refused(operator.Drain(op.DrainRequest(vm="s"), timeout=5))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    await operator.Unfreeze(op.UnfreezeRequest(vm="s"), timeout=5)


async def _is_gone(operator: Any, node_id: str) -> bool:
    hosts = (await operator.ListHosts(op.ListHostsRequest(), timeout=5)).hosts
    return any(host.node_id == node_id and host.state == op.HOST_STATE_GONE for host in hosts)


async def test_watch_is_coalesced(controller: ControllerProcess, operator: Any) -> None:
    async with RawAgent(controller.address, "watched") as agent:
        await agent.hello([identity("w")])
        await agent.report([state("w")], full=True, vms=[identity("w")])
        await agent.budget_where(lambda budget: budget.bytes == GIB // 2, "w")
        watch = operator.Watch(op.WatchRequest(interval_seconds=0.5, vm="w"), timeout=20)
        first = await watch.read()
        assert [vm.identity.vm_id for vm in first.vms] == ["w"]
        assert list(first.vms[0].state.histogram.min_age_seconds) == [0, 60, 120]
        started = time.monotonic()
        for index in range(20):
            await agent.report([state("w", cold_bytes=(400 + index) * MIB)])
        seen = 0
        while seen != 419 * MIB:
            message = await watch.read()
            for vm in message.vms:
                seen = sum(vm.state.histogram.resident_bytes[2:])
        assert time.monotonic() - started < 5.0
        await agent.report([], gone_vm_ids=["w"])
        while "w" not in (await watch.read()).gone_vm_ids:
            pass
        watch.cancel()
    error = await refused(operator.Watch(op.WatchRequest(interval_seconds=0.01)).read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_and_reflection(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "frostline.v1.SessionService", "frostline.v1.OperatorService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = reflection.ServerReflectionInfo(timeout=5)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert {"frostline.v1.SessionService", "frostline.v1.OperatorService", "grpc.health.v1.Health"} <= names
    call.cancel()


async def test_trace_goes_through_decide_and_push(
    controller: ControllerProcess, operator: Any, receiver: OtlpReceiver
) -> None:
    trace_id, report_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with RawAgent(controller.address, "traced") as agent:
        await agent.hello([identity("tr")])
        await agent.budgets()
        await agent.report([state("tr")], full=True, vms=[identity("tr")], traceparent=f"00-{trace_id}-{report_id}-01")
        budget_set = await agent.budgets()
        assert budget_set.traceparent.split("-")[1] == trace_id

        def found() -> Any:
            traces = [trace for trace in receiver.traces() if trace.trace_id == trace_id]
            return traces[0] if traces and {"controller.decide", "budget.push"} <= traces[0].names else None

        trace = await until("both spans arrived", found)
        [push] = trace.named("budget.push")
        decide = trace.parent(push)
        assert decide is not None
        assert (decide.name, decide.parent_id) == ("controller.decide", report_id)
        assert push.span_id == budget_set.traceparent.split("-")[2]
        assert push.attributes["frostline.node_id"] == "traced"
        assert push.ok
        # Garbage in a traceparent begins a new trace, and nothing else.
        await agent.report([state("tr", cold_bytes=GIB)], traceparent="00-zz-\x00")
        await agent.budget_where(lambda budget: budget.bytes == GIB, "tr")


async def test_prometheus_endpoint(controller: ControllerProcess, operator: Any) -> None:
    url = controller.logged("metrics")[-1]["url"]

    def scrape() -> str:
        with urllib.request.urlopen(url, timeout=5) as response:
            return str(response.read(), "utf-8")

    async with RawAgent(controller.address, "scraped") as agent:
        await agent.hello([identity("sc")])
        await agent.report([state("sc")], full=True, vms=[identity("sc")])
        await agent.budget_where(lambda budget: budget.bytes == GIB // 2, "sc")

        async def counted() -> bool:
            text = await asyncio.to_thread(scrape)
            return "frostline_controller_pushes_total{" in text and 'state="connected"' in text

        await until("pushes are counted", counted)
        text = await asyncio.to_thread(scrape)
        for name in (
            "frostline_controller_memory_budget_bytes",
            "frostline_controller_decide_duration_seconds_bucket",
            "\nfrostline_controller_store_available",
            'frostline_controller_decisions_total{reason="granted"',
        ):
            assert name in text


async def test_decisions_are_logged_and_kept(controller: ControllerProcess, operator: Any) -> None:
    async with RawAgent(controller.address, "logged") as agent:
        await agent.hello([identity("lg")])
        await agent.report([state("lg")], full=True, vms=[identity("lg")])
        await agent.budget_where(lambda budget: budget.bytes == GIB // 2, "lg")
    lines = [line for line in controller.logged("decision") if line["vm"] == "name-lg"]
    granted = lines[-1]
    assert (granted["old_budget_bytes"], granted["new_budget_bytes"]) == (0, GIB // 2)
    assert granted["reason"] == "granted"
    assert "may have all of its cold memory away" in granted["sentence"]


async def test_stop_ends_streams_with_unavailable(tmp_path: Path) -> None:
    controller = ControllerProcess(tmp_path / "c").start()
    async with RawAgent(controller.address) as agent, make_channel(controller.address) as channel:
        await agent.hello([])
        watch = controller.operator(channel).Watch(op.WatchRequest(interval_seconds=0.2), timeout=20)
        await watch.read()
        stopping = asyncio.ensure_future(asyncio.to_thread(controller.stop, signal.SIGTERM))
        code, text = await agent.ended()
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "stopping" in text
        assert await watch.code() is grpc.StatusCode.UNAVAILABLE
        assert await stopping == 0
    assert controller.logged("stopped")


async def test_suspect_host_gets_no_renewal(tmp_path: Path) -> None:
    arguments = ["--heartbeat-seconds", "0.3", "--lease-seconds", "1.5"]
    controller = ControllerProcess(tmp_path / "c", *arguments).start()
    try:
        async with RawAgent(controller.address, "quiet") as agent, make_channel(controller.address) as channel:
            operator = controller.operator(channel)
            await agent.hello([])
            budget_set = (await agent.receive("budget_set")).budget_set
            await agent.ack(budget_set)

            async def suspect() -> bool:
                hosts = (await operator.ListHosts(op.ListHostsRequest(), timeout=5)).hosts
                return hosts[0].state == op.HOST_STATE_SUSPECT

            await until("it is suspect", suspect)
            # Twelve heartbeats: the stream of a dead agent is not kept for ever.
            code, text = await agent.ended()
            assert code is grpc.StatusCode.ABORTED
            assert "nothing heard" in text or "no result" in text
    finally:
        controller.stop()
