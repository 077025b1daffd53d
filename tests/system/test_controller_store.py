# SPDX-License-Identifier: Apache-2.0
"""Redis is down at the start, goes away, comes back, is full, read-only, hangs or loses its data."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from frostline.v1 import common_pb2 as pb
from frostline.v1 import operator_pb2 as op
from frostline.wire.channels import make_channel
from tests.system.controller_rig import GIB, ControllerProcess, RawAgent, RedisServer, identity, state, until

ENFORCE = "version: 1\nclasses: {standard: {mode: enforce, floor: 0, cap: 100%}}\n"

StartController = Callable[..., ControllerProcess]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartController]:
    started: list[ControllerProcess] = []

    def launch(*arguments: str, redis_url: str = "") -> ControllerProcess:
        folder = tmp_path / f"controller{len(started)}"
        process = ControllerProcess(folder, "--lease-seconds", "3", *arguments, redis_url=redis_url)
        started.append(process)
        return process.start()

    yield launch
    for process in started:
        process.stop()


@pytest.fixture
async def dial() -> AsyncIterator[Callable[[ControllerProcess], Any]]:
    channels: list[grpc.aio.Channel] = []

    def connect(controller: ControllerProcess) -> Any:
        channels.append(make_channel(controller.address))
        return controller.operator(channels[-1])

    yield connect
    for channel in channels:
        await channel.close()


async def put(operator: Any, document: str = ENFORCE, expected: int = 0) -> int:
    request = op.PutPolicyRequest(document=document, expected_version=expected, comment="a test")
    return int((await operator.PutPolicy(request, timeout=10)).version)


async def enforced(agent: RawAgent) -> Any:
    """Bring an agent to the point where it has a budget."""
    await agent.hello([identity("a")])
    await agent.report([state("a")], full=True, vms=[identity("a")])
    return await agent.budget_where(lambda budget: budget.bytes == GIB // 2)


async def available(operator: Any) -> op.ListHostsResponse | None:
    response: op.ListHostsResponse = await operator.ListHosts(op.ListHostsRequest(), timeout=5)
    return response if response.store_available else None


async def unavailable(operator: Any) -> op.ListHostsResponse | None:
    response: op.ListHostsResponse = await operator.ListHosts(op.ListHostsRequest(), timeout=5)
    return None if response.store_available else response


async def test_down_at_start(redis: RedisServer, start: StartController, dial: Any) -> None:
    redis.start().stop()
    controller = start(redis_url=redis.url)
    operator = dial(controller)
    assert controller.logged("starting without Redis")
    assert (await operator.GetPolicy(op.GetPolicyRequest(), timeout=5)).policy.version == 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await put(operator)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "does not answer" in str(caught.value.details())
    async with RawAgent(controller.address) as agent:
        assert (await agent.hello([identity("a")])).epoch == 0
        await agent.report([state("a")], full=True, vms=[identity("a")])

        async def planned() -> bool:
            decision = (await operator.GetVm(op.GetVmRequest(vm="a"), timeout=5)).vm.decision
            return bool(decision.mode == pb.MODE_PLAN and decision.planned_bytes > 0)

        await until("the built-in policy plans", planned)
        explained = await operator.Explain(op.ExplainRequest(vm="a"), timeout=5)
        assert any("no epoch yet" in detail for detail in explained.details)
        redis.start()
        first = await agent.budgets()
        assert first.epoch == 1
        assert first.budgets[0].mode == pb.MODE_PLAN
        assert first.budgets[0].bytes == 0
    await until("Redis is taken into use", lambda: available(operator))
    assert await put(operator) == 2


async def test_no_budget_of_the_built_in_policy_while_the_real_one_is_not_read_yet(
    redis: RedisServer, start: StartController, dial: Any
) -> None:
    redis.start()
    first = start(redis_url=redis.url)
    await put(dial(first))
    first.stop()
    redis.stop()
    controller = start(redis_url=redis.url)
    async with RawAgent(controller.address) as agent:
        await agent.hello([identity("a")], quiet=True, highest_epoch=1)
        await agent.report([state("a", evicted_bytes=GIB // 4)], full=True, vms=[identity("a")])
        redis.start()
        # Plan mode would have said 0, and its pager would have brought everything back.
        budget_set = await agent.budgets()
        assert budget_set.epoch == 2
        assert (budget_set.budgets[0].mode, budget_set.budgets[0].bytes) == (pb.MODE_ENFORCE, GIB // 2)


async def test_away_and_back(redis: RedisServer, start: StartController, dial: Any) -> None:
    redis.start()
    controller = start(redis_url=redis.url)
    operator = dial(controller)
    await put(operator)
    async with RawAgent(controller.address) as agent:
        await enforced(agent)
        redis.stop(signal.SIGKILL)
        response = await until("it says so", lambda: unavailable(operator))
        assert "does not answer" in response.store_problem
        # Leases go on being renewed, under the same epoch, with the last known policy.
        for _ in range(3):
            renewed = await agent.budgets()
            assert renewed.epoch == 1
            assert renewed.budgets[0].bytes == GIB // 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await put(operator)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        # The brake works without Redis, and Redis learns of it later.
        await operator.Freeze(op.FreezeRequest(why="redis is gone"), timeout=10)
        await agent.budget_where(lambda budget: budget.reason == pb.REASON_FROZEN)
        with pytest.raises(grpc.aio.AioRpcError) as loosened:
            await operator.Unfreeze(op.UnfreezeRequest(), timeout=10)
        assert loosened.value.code() is grpc.StatusCode.UNAVAILABLE
        redis.start()
        await until("it is back", lambda: available(operator))
        await until("the freeze is stored", lambda: redis.client().hget("{frostline}:freezes", "fleet"))
        assert not controller.logged("Redis had lost its data; policy, freezes and epoch were put back from memory")
        await operator.Unfreeze(op.UnfreezeRequest(), timeout=10)
        await agent.budget_where(lambda budget: budget.bytes == GIB // 2)
        client: Any = redis.client()
        await until(
            "decisions made meanwhile are stored",
            lambda: any(entry["reason"] == "frozen" for _, entry in client.xrange("{frostline}:decisions")),
        )


async def test_hanging_redis(redis: RedisServer, start: StartController, dial: Any) -> None:
    redis.start()
    controller = start(redis_url=redis.url)
    operator = dial(controller)
    await put(operator)
    async with RawAgent(controller.address) as agent:
        await enforced(agent)
        redis.send(signal.SIGSTOP)
        try:
            for _ in range(3):
                await agent.budgets(5)
            await until("it says so", lambda: unavailable(operator))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await put(operator)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            redis.send(signal.SIGCONT)
        await until("it is back", lambda: available(operator))


async def test_full(redis: RedisServer, start: StartController, dial: Any) -> None:
    redis.start("--maxmemory-policy", "noeviction")
    controller = start(redis_url=redis.url)
    operator = dial(controller)
    await put(operator)
    async with RawAgent(controller.address) as agent:
        await enforced(agent)
        redis.client().config_set("maxmemory", "1")
        await until("it says so", lambda: unavailable(operator))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await put(operator)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "is full" in str(caught.value.details())
        assert (await agent.budgets()).budgets[0].bytes == GIB // 2
        assert (await operator.GetPolicy(op.GetPolicyRequest(version=1), timeout=5)).policy.version == 1
        redis.client().config_set("maxmemory", "0")
        await until("it takes writes again", lambda: available(operator))
        assert await put(operator) == 3


async def test_read_only_replica(redis: RedisServer, start: StartController, dial: Any) -> None:
    redis.start()
    controller = start(redis_url=redis.url)
    operator = dial(controller)
    await put(operator)
    client: Any = redis.client()
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    await until("it says so", lambda: unavailable(operator))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await put(operator)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "read-only replica" in str(caught.value.details())
    assert (await operator.GetPolicy(op.GetPolicyRequest(), timeout=5)).policy.version == 2


async def test_loses_its_data(redis: RedisServer, start: StartController, dial: Any) -> None:
    redis.start()
    controller = start(redis_url=redis.url)
    operator = dial(controller)
    await put(operator)
    await put(operator, ENFORCE + "# again\n")
    async with RawAgent(controller.address) as agent:
        await enforced(agent)
        await operator.Freeze(op.FreezeRequest(vm="a", why="stays"), timeout=10)
        redis.client().flushall()
        client = redis.client()
        await until("the epoch is back", lambda: client.get("{frostline}:epoch") == "1")
        await until("the policy is back", lambda: client.get("{frostline}:policy:current") == "3")
        assert client.hget("{frostline}:policy:3", "document") == ENFORCE + "# again\n"
        await until("the freeze is back", lambda: client.hget("{frostline}:freezes", "vm:a"))
        lost = "Redis had lost its data; policy, freezes and epoch were put back from memory"
        await until("it says so", lambda: controller.logged(lost))
        assert (await agent.budgets()).epoch == 1
        assert (await operator.GetPolicy(op.GetPolicyRequest(), timeout=5)).policy.version == 3


async def test_a_policy_put_right_after_a_loss_gets_the_next_number(
    redis: RedisServer, start: StartController, dial: Any
) -> None:
    redis.start()
    controller = start(redis_url=redis.url)
    operator = dial(controller)
    version = await put(operator)
    client = redis.client()
    for _ in range(5):
        # The controller looks once a second: some of these puts are the first to meet an empty Redis.
        client.flushall()
        version += 1
        document = ENFORCE + f"# {version}\n"
        assert await put(operator, document, expected=version - 1) == version
        assert client.get("{frostline}:policy:current") == str(version)
        assert client.hget(f"{{frostline}}:policy:{version}", "document") == document
        assert client.hget(f"{{frostline}}:policy:{version - 1}", "document"), "the one before was not put back"
    assert controller.logged("Redis had lost its data; policy, freezes and epoch were put back from memory")


async def test_data_lost_before_the_start_is_seen_by_the_agents_epoch(
    redis: RedisServer, start: StartController, dial: Any
) -> None:
    redis.start()
    controller = start(redis_url=redis.url)
    async with RawAgent(controller.address) as agent:
        welcome = await agent.hello([identity("a")], highest_epoch=41, applied_version=7)
        assert welcome.epoch == 42
        first = await agent.budgets()
        assert first.epoch == 42
        assert first.version == 8
    assert redis.client().get("{frostline}:epoch") == "42"
    assert controller.logged("an agent has seen a higher epoch")


async def test_epoch_refused_in_a_result_is_raised(redis: RedisServer, start: StartController) -> None:
    redis.start()
    controller = start(redis_url=redis.url)
    async with RawAgent(controller.address) as agent:
        await agent.hello([identity("a")])
        refused = await agent.budgets(ack=False)
        await agent.ack(refused, applied=False, reason=pb.REASON_EPOCH, epoch=9)
        assert (await agent.budgets()).epoch == 10


async def test_epoch_grows_and_policy_stays_over_restarts(
    redis: RedisServer, start: StartController, dial: Any
) -> None:
    redis.start()
    controller = start(redis_url=redis.url)
    await put(dial(controller))
    async with RawAgent(controller.address) as agent:
        assert (await agent.hello()).epoch == 1
    controller.stop(signal.SIGKILL)
    controller.start()
    async with RawAgent(controller.address) as agent:
        assert (await agent.hello()).epoch == 2
    assert (await dial(controller).GetPolicy(op.GetPolicyRequest(), timeout=5)).policy.document == ENFORCE


async def test_stored_policy_that_is_broken_is_passed_over(
    redis: RedisServer, start: StartController, dial: Any
) -> None:
    redis.start()
    controller = start(redis_url=redis.url)
    await put(dial(controller))
    client = redis.client()
    client.hset("{frostline}:policy:3", mapping={"document": "version: 1\nnonsense: 1\n", "author": "somebody"})
    client.set("{frostline}:policy:current", "3")
    await until("it says so", lambda: controller.logged("stored policy is not usable; the last good one stays"))
    assert (await dial(controller).GetPolicy(op.GetPolicyRequest(), timeout=5)).policy.version == 2
    controller.stop()
    controller.start()
    operator = dial(controller)
    assert (await operator.GetPolicy(op.GetPolicyRequest(), timeout=5)).policy.version == 2
    assert await put(operator) == 4


async def test_private_redis_is_started_restarted_and_ended(start: StartController, dial: Any) -> None:
    controller = start()
    operator = dial(controller)
    assert await put(operator) == 2
    [line] = controller.logged("private Redis started")
    os.kill(line["pid"], signal.SIGKILL)
    await until("it is started again", lambda: len(controller.logged("private Redis started")) == 2)
    await until("it is in use again", lambda: available(operator))
    assert (await operator.ListPolicies(op.ListPoliciesRequest(), timeout=5)).policies[0].version == 2
    controller.stop()
    second = controller.logged("private Redis started")[1]["pid"]
    assert not os.path.exists(f"/proc/{second}")
    controller.start()
    assert (await dial(controller).GetPolicy(op.GetPolicyRequest(), timeout=5)).policy.document == ENFORCE


async def test_private_redis_does_not_outlive_a_killed_controller(start: StartController) -> None:
    controller = start()
    pid = controller.logged("private Redis started")[0]["pid"]
    controller.stop(signal.SIGKILL)
    await until("its Redis ends, too", lambda: not os.path.exists(f"/proc/{pid}"))
    # The data folder is free again at once, and the epoch is another one.
    controller.start()
    assert controller.logged("controller ready")[-1]["epoch"] == 2


async def test_two_controllers_on_one_data_folder(start: StartController, tmp_path: Path) -> None:
    controller = start()
    twin = ControllerProcess(tmp_path / "twin", "--data-dir", str(controller.folder / "data"))
    with pytest.raises(AssertionError, match="another controller"):
        await asyncio.to_thread(twin.start)


async def test_what_is_kept(redis: RedisServer, start: StartController, dial: Any) -> None:
    redis.start()
    controller = start("--heartbeat-seconds", "1", redis_url=redis.url)
    operator = dial(controller)
    client: Any = redis.client()
    await put(operator)
    async with RawAgent(controller.address, "kept") as agent:
        await enforced(agent)
        await operator.Freeze(op.FreezeRequest(vm="a", why="look"), timeout=10)
        await operator.Unfreeze(op.UnfreezeRequest(vm="a"), timeout=10)
        lease_ms = await until("the host has a lease", lambda: max(client.pttl("{frostline}:host:kept"), 0))
        assert lease_ms <= 4000

        def last_push() -> Any:
            return json.loads(client.get("{frostline}:budgets:kept") or "{}")

        pushed = await until("the budgets are kept", lambda: last_push() if last_push().get("version") else None)
        assert set(pushed["budgets"]) == {"a"}
        assert pushed["epoch"] == 1
        await until("the decisions are kept", lambda: client.xlen("{frostline}:decisions") >= 2)
        actions = [entry["action"] for _, entry in client.xrange("{frostline}:audit")]
        assert actions == ["policy.put", "freeze", "unfreeze"]
    await until("a host that left loses its lease", lambda: client.pttl("{frostline}:host:kept") == -2)


async def test_wrong_password_is_said(redis: RedisServer, start: StartController, dial: Any) -> None:
    redis.start()
    redis.client().config_set("requirepass", "right")
    controller = start(redis_url=redis.url)
    response = await until("it says so", lambda: unavailable(dial(controller)))
    assert "does not let us in" in response.store_problem
