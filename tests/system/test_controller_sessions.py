# SPDX-License-Identifier: Apache-2.0
"""Sessions with a real controller and a real Redis: good agents, broken ones and hostile ones."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from frostline.v1 import common_pb2 as pb
from frostline.v1 import operator_pb2 as op
from frostline.v1 import session_pb2 as wire
from frostline.wire.channels import make_channel
from tests.system.controller_rig import GIB, MIB, ControllerProcess, RawAgent, identity, state, until

ENFORCE = "version: 1\nclasses: {standard: {mode: enforce, floor: 0, cap: 100%}}\n"


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    process = ControllerProcess(tmp_path_factory.mktemp("c"), "--lease-seconds", "6", "--ack-seconds", "2")
    process.start()
    yield process
    assert process.stop() == 0


@pytest.fixture
async def operator(controller: ControllerProcess) -> AsyncIterator[Any]:
    async with make_channel(controller.address) as channel:
        stub = controller.operator(channel)
        await stub.PutPolicy(op.PutPolicyRequest(document=ENFORCE), timeout=10)
        yield stub


def agent(controller: ControllerProcess, node_id: str, **more: Any) -> RawAgent:
    return RawAgent(controller.address, node_id, **more)


async def test_report_leads_to_a_leased_budget(controller: ControllerProcess, operator: Any) -> None:
    async with agent(controller, "good") as good:
        welcome = await good.hello([identity("a")])
        assert welcome.epoch >= 1
        assert welcome.report_seconds == 5.0
        first = await good.budgets()
        assert [(budget.bytes, budget.reason) for budget in first.budgets] == [(0, pb.REASON_WARMUP)]
        await good.report([state("a", cold_bytes=512 * MIB)], full=True, vms=[identity("a")])
        second = await good.budgets()
        assert [(b.vm_id, b.mode, b.bytes, b.reason) for b in second.budgets] == [
            ("a", pb.MODE_ENFORCE, 512 * MIB, pb.REASON_GRANTED)
        ]
        assert second.version > first.version
        assert second.epoch == welcome.epoch
        assert second.lease_seconds == 6.0
        assert second.nonce != first.nonce

        async def shown() -> bool:
            vm = (await operator.GetVm(op.GetVmRequest(vm="a"), timeout=5)).vm
            return bool(vm.ack.version == second.version and vm.ack.effective_bytes == 512 * MIB)

        await until("desired and effective budget shown", shown)
        host = next(h for h in (await operator.ListHosts(op.ListHostsRequest())).hosts if h.node_id == "good")
        assert host.budget_version_applied == host.budget_version_desired == second.version
        assert host.state == op.HOST_STATE_CONNECTED


async def test_nothing_is_pushed_before_it_is_known_what_is_away(controller: ControllerProcess, operator: Any) -> None:
    async with agent(controller, "returning") as good:
        # As after a restart of the controller: the agent is back, and has pages away.
        await good.hello([identity("back-a")], quiet=True)
        await asyncio.sleep(1.0)
        vms = [identity("back-a")]
        await good.report([state("back-a", cold_bytes=GIB // 2, evicted_bytes=GIB // 4)], full=True, vms=vms)
        first = (await good.budgets()).budgets[0]
        assert (first.bytes, first.reason) == (GIB // 2, pb.REASON_GRANTED)


async def test_lease_is_renewed_at_a_third(controller: ControllerProcess, operator: Any) -> None:
    async with agent(controller, "renew") as good:
        await good.hello([identity("renew-a")])
        await good.report([state("renew-a")], full=True, vms=[identity("renew-a")])
        await good.budget_where(lambda budget: budget.bytes == GIB // 2, "renew-a")
        started = time.monotonic()
        renewed = await good.budgets()
        assert 1.5 < time.monotonic() - started < 4.0
        assert renewed.budgets[0].bytes == GIB // 2


async def test_noise_is_not_pushed(controller: ControllerProcess, operator: Any) -> None:
    async with agent(controller, "noise") as good:
        await good.hello([identity("noise-a")])
        await good.report([state("noise-a", cold_bytes=500 * MIB)], full=True, vms=[identity("noise-a")])
        await good.budget_where(lambda budget: budget.bytes == 500 * MIB, "noise-a")
        pushed = time.monotonic()
        await good.report([state("noise-a", cold_bytes=510 * MIB)])
        # The next set is the renewal at a third of the lease, and carries the exact value.
        assert (await good.budgets()).budgets[0].bytes == 510 * MIB
        assert time.monotonic() - pushed > 1.5


async def test_one_push_in_flight_and_a_silent_agent_is_closed(controller: ControllerProcess, operator: Any) -> None:
    async with agent(controller, "silent") as bad:
        await bad.hello([identity("silent-a")])
        await bad.receive("budget_set")
        await bad.report([state("silent-a")], full=True, vms=[identity("silent-a")])
        code, text = await bad.ended()
        assert code is grpc.StatusCode.ABORTED
        assert "no result for budget set" in text


async def test_refused_budget_is_shown_and_sent_again(controller: ControllerProcess, operator: Any) -> None:
    async with agent(controller, "nack") as bad:
        await bad.hello([identity("nack-a")])
        first = (await bad.receive("budget_set")).budget_set
        refusal = wire.BudgetResult(
            nonce=first.nonce, version=first.version, applied=False, reason=pb.REASON_INVALID, detail="no such tier"
        )
        await bad.send(budget_result=refusal)
        again = await bad.budgets()
        assert again.version > first.version

        async def explained() -> bool:
            said = await operator.Explain(op.ExplainRequest(vm="nack-a"), timeout=5)
            return bool(said.details)

        await until("explained", explained)
        assert any("no such tier" in entry["detail"] for entry in controller.logged("budget not taken"))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"heartbeat": wire.Heartbeat()}, "began with heartbeat"),
        ({"hello": wire.Hello(node_id="../etc", protocol_version=1, agent_instance=b"0" * 16)}, "no node id"),
        ({"hello": wire.Hello(node_id="n" * 200, protocol_version=1, agent_instance=b"0" * 16)}, "no node id"),
        ({"hello": wire.Hello(node_id="x", protocol_version=7, agent_instance=b"0" * 16)}, "speaks 1"),
        ({"hello": wire.Hello(node_id="x", protocol_version=1, agent_instance=b"0")}, "16"),
        (
            {"hello": wire.Hello(node_id="x", protocol_version=1, agent_instance=b"0" * 16, highest_epoch=2**60)},
            "never given out",
        ),
        (
            {
                "hello": wire.Hello(
                    node_id="x", protocol_version=1, agent_instance=b"0" * 16, vms=[identity("a"), identity("a")]
                )
            },
            "twice",
        ),
    ],
)
async def test_bad_beginnings(controller: ControllerProcess, message: dict[str, Any], words: str) -> None:
    async with agent(controller, "unused") as bad:
        await bad.send(**message)
        code, text = await bad.ended()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in text
        assert b"google.rpc.BadRequest" in await bad.status_details()


async def test_no_hello_at_all_ends(controller: ControllerProcess) -> None:
    async with agent(controller, "mute") as bad:
        # A stream exists on the other side only once something was sent: its headers.
        await bad.call.wait_for_connection()
        code, text = await bad.ended(15)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "no hello within 5 s" in text


async def test_a_vm_twice_in_a_report(controller: ControllerProcess, operator: Any) -> None:
    async with agent(controller, "twice") as bad:
        await bad.hello([identity("twice-a")])
        await bad.report([state("twice-a", cold_bytes=256 * MIB)], full=True, vms=[identity("twice-a")])
        await bad.budget_where(lambda budget: budget.bytes == 256 * MIB, "twice-a")
        await bad.report([state("twice-a", cold_bytes=GIB), state("twice-a", cold_bytes=0)])
        assert "twice" in (await bad.receive("resync_request")).resync_request.why
        vm = (await operator.GetVm(op.GetVmRequest(vm="twice-a"), timeout=5)).vm
        assert vm.decision.budget_bytes == 256 * MIB
        await bad.report([state("twice-a", cold_bytes=512 * MIB)], full=True, vms=[identity("twice-a")])
        await bad.budget_where(lambda budget: budget.bytes == 512 * MIB, "twice-a")


async def test_skipped_and_repeated_sequences(controller: ControllerProcess, operator: Any) -> None:
    async with agent(controller, "gaps") as bad:
        await bad.hello([identity("gaps-a")])
        await bad.report([state("gaps-a", cold_bytes=128 * MIB)], full=True, vms=[identity("gaps-a")])
        await bad.budget_where(lambda budget: budget.bytes == 128 * MIB, "gaps-a")
        await bad.report([state("gaps-a", cold_bytes=256 * MIB)], sequence=9)
        assert "missing before 9" in (await bad.receive("resync_request")).resync_request.why
        await bad.budget_where(lambda budget: budget.bytes == 256 * MIB, "gaps-a")
        # A repeat carries an old picture: not taken.
        await bad.report([state("gaps-a", cold_bytes=GIB)], sequence=4)
        assert "repeat" in (await bad.receive("resync_request")).resync_request.why
        vm = (await operator.GetVm(op.GetVmRequest(vm="gaps-a"), timeout=5)).vm
        assert vm.decision.cold_bytes == 256 * MIB


def _broken(**histogram: Any) -> pb.VmState:
    broken = state("h")
    columns: dict[str, Any] = {
        "min_age_seconds": [0, 60, 120],
        "resident_bytes": [0, 0, GIB],
        "evicted_bytes": [0, 0, 0],
        "promotions_per_minute": [0, 0, 0],
        **histogram,
    }
    broken.histogram.CopyFrom(pb.Histogram(**columns))
    return broken


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"resident_bytes": [1]}, "different lengths"),
        ({"min_age_seconds": [0, math.nan, 120]}, "no duration"),
        ({"min_age_seconds": [0, -60, 120]}, "no duration"),
        ({"min_age_seconds": [0, 120, 60]}, "do not grow"),
        ({"min_age_seconds": [0, math.inf, 120]}, "no duration"),
        ({"resident_bytes": [0, 2**63, 2**63]}, "more than its memory"),
        ({"evicted_bytes": [GIB, GIB, GIB]}, "more than its memory"),
        ({"promotions_per_minute": [0, math.nan, 0]}, "no rate"),
        ({"promotions_per_minute": [0, -1, 0]}, "no rate"),
    ],
)
async def test_garbage_histograms(
    controller: ControllerProcess, operator: Any, columns: dict[str, Any], words: str
) -> None:
    # One node per case: more hellos than that from one node would look like flapping.
    node = f"garbage-{abs(hash(str(columns)))}"
    async with agent(controller, node) as bad:
        await bad.hello([identity("h"), identity("ok")])
        await bad.report(
            [state("h", cold_bytes=128 * MIB), state("ok")], full=True, vms=[identity("h"), identity("ok")]
        )
        await bad.budget_where(lambda budget: budget.bytes == 128 * MIB, "h")
        await bad.report([_broken(**columns), state("ok", cold_bytes=GIB)])
        held = await bad.budget_where(lambda budget: budget.reason == pb.REASON_STALE, "h")
        assert held.bytes == 128 * MIB
        listed = (await operator.ListVms(op.ListVmsRequest(node_id=node), timeout=5)).vms
        by_id = {vm.identity.vm_id: vm for vm in listed}
        assert words in by_id["h"].decision.sentence
        assert by_id["h"].state.evicted_bytes == 0
        assert by_id["ok"].decision.budget_bytes == GIB


async def test_oversized_message_ends_only_its_own_stream(controller: ControllerProcess) -> None:
    async with agent(controller, "big") as bad, agent(controller, "bystander") as good:
        await good.hello([])
        await bad.hello([])
        # The client's own limit is the same, so the bytes have to go around it.
        async with grpc.aio.insecure_channel(
            controller.address, options=[("grpc.max_send_message_length", -1)]
        ) as channel:
            raw: Any = channel.stream_stream("/frostline.v1.SessionService/Session")
            bad.call = raw()
            await bad.call.write(b"\x12" + b"\xff" * (8 * MIB))
            code, _ = await bad.ended()
            assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
        await good.send(heartbeat=wire.Heartbeat())
        await good.budgets()


async def test_garbage_bytes_do_not_crash(controller: ControllerProcess, operator: Any) -> None:
    async with grpc.aio.insecure_channel(controller.address) as channel:
        call: Any = channel.stream_stream("/frostline.v1.SessionService/Session")()
        await call.write(b"\xff\xfe garbage")
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await asyncio.wait_for(call.read(), 10) is not grpc.aio.EOF:
                pass
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no SessionRequest" in await call.details()
    await operator.ListHosts(op.ListHostsRequest(), timeout=5)
    assert not any("exception" in line for line in controller.all_logged())


async def test_newest_hello_wins(controller: ControllerProcess) -> None:
    async with agent(controller, "moved") as old, agent(controller, "moved", instance=b"f" * 16) as new:
        await old.hello([identity("moved-a")])
        await new.hello([identity("moved-a")])
        code, text = await old.ended()
        assert code is grpc.StatusCode.ABORTED
        assert "took over" in text
        await new.budgets()


async def test_two_agents_with_one_node_id_are_stopped_and_named(controller: ControllerProcess, operator: Any) -> None:
    refused: Any = None
    stayed: Any = None
    for attempt in range(12):
        bad = agent(controller, "flap", instance=(b"1" if attempt % 2 else b"2") * 16)
        try:
            await bad.hello([])
        except (AssertionError, grpc.aio.AioRpcError):
            refused = bad
            break
        stayed = bad
    assert refused is not None, "two agents pushed each other out twelve times"
    assert await refused.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "several agents use the node id 'flap'" in await refused.call.details()
    assert b"google.rpc.RetryInfo" in await refused.status_details()
    # The one that stayed goes on as if nothing were wrong, and operators are still told.
    await stayed.report([], full=True, host_available_bytes=5 * MIB)

    async def flap() -> Any:
        hosts = (await operator.ListHosts(op.ListHostsRequest(), timeout=5)).hosts
        return next((host for host in hosts if host.node_id == "flap" and host.host_available_bytes == 5 * MIB), None)

    host = await until("its report to be taken", flap)
    assert "give each host its own" in host.note


async def test_flooding_agent_is_closed(controller: ControllerProcess) -> None:
    async with agent(controller, "flood") as bad:
        await bad.hello([])
        with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
            for _ in range(5000):
                await bad.send(heartbeat=wire.Heartbeat())
        # The client has unsent messages when the end arrives, and may report that instead of the reason.
        code, _ = await bad.ended()
        assert code is not grpc.StatusCode.OK
        ends = [entry for entry in controller.logged("session ended") if entry["node_id"] == "flood"]
        assert [entry["code"] for entry in ends] == ["RESOURCE_EXHAUSTED"]
        assert "messages a second" in ends[0]["why"]


async def test_unknown_vm_state_asks_for_a_resync(controller: ControllerProcess) -> None:
    async with agent(controller, "unknown") as bad:
        await bad.hello([])
        await bad.report([state("never-introduced")])
        assert "never-introduced" in (await bad.receive("resync_request")).resync_request.why


async def test_full_report_is_everything(controller: ControllerProcess, operator: Any, tmp_path: Path) -> None:
    async with agent(controller, "full") as good:
        await good.hello([identity("full-a"), identity("full-b")])
        await good.report([state("full-a")], full=True, vms=[identity("full-a")])
        await good.budget_where(lambda budget: budget.bytes > 0, "full-a")
        listed = (await operator.ListVms(op.ListVmsRequest(node_id="full"), timeout=5)).vms
        assert [vm.identity.vm_id for vm in listed] == ["full-a"]


async def test_unchanged_vms_do_not_go_stale(tmp_path: Path) -> None:
    controller = ControllerProcess(tmp_path / "c", "--report-seconds", "0.5").start()
    try:
        async with make_channel(controller.address) as channel, agent(controller, "delta") as good:
            operator = controller.operator(channel)
            await operator.PutPolicy(op.PutPolicyRequest(document=ENFORCE), timeout=10)
            await good.hello([identity("delta-a"), identity("delta-b")])
            vms = [identity("delta-a"), identity("delta-b")]
            await good.report([state("delta-a"), state("delta-b")], full=True, vms=vms)
            await good.budget_where(lambda budget: budget.bytes == GIB // 2, "delta-b")
            # Deltas without the VM say that it is as it was; three report intervals pass meanwhile.
            for index in range(8):
                await asyncio.sleep(0.3)
                await good.report([state("delta-a", cold_bytes=(400 + index) * MIB)])
            vm = (await operator.GetVm(op.GetVmRequest(vm="delta-b"), timeout=5)).vm
            assert vm.decision.reason == pb.REASON_GRANTED
            assert vm.report_age_seconds < 1.5

            # Silence is something else.
            held = await good.budget_where(lambda budget: budget.reason == pb.REASON_STALE, "delta-b")
            assert held.bytes == GIB // 2
    finally:
        controller.stop()


async def test_too_many_new_streams_are_told_when_to_come_back(tmp_path: Path) -> None:
    controller = ControllerProcess(tmp_path / "c", "--streams-per-second", "1").start()
    agents: list[RawAgent] = []
    refused: list[RawAgent] = []
    try:
        codes = []
        for index in range(40):
            if len(refused) >= 3:
                break
            agents.append(agent(controller, f"crowd-{index}"))
            try:
                await agents[-1].call.wait_for_connection()
                time.sleep(0.02)  # one that is slow to say hello must not miss why it is turned away
                await agents[-1].hello([])
            except (AssertionError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                codes.append(await agents[-1].call.code())
                refused.append(agents[-1])
        assert refused, "forty came within some seconds, where one a second may"
        assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert b"google.rpc.RetryInfo" in await refused[-1].status_details()
        # Those that are in stay in.
        await agents[0].budgets()
    finally:
        for each in agents:
            await each.__aexit__()
        controller.stop()
