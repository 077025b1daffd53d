# SPDX-License-Identifier: Apache-2.0
"""Controllers, Redis and agents that go away and come back while pages are away: budgets are renewed or run out into
HOLD, what is away stays readable, and nobody loses a byte."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from frostline.native import State, Status, View, Why
from frostline.v1 import common_pb2
from tests.chaos.killer import serves
from tests.conftest import why_no_guest
from tests.system.daemons import AgentDaemon
from tests.system.guest import Guest, GuestConfig, Workload
from tests.system.world import MIB, Timing, World, WorldError, kill_pid, until

CONFIG: Final = GuestConfig(
    name="steady", memory_mib=224, workload=Workload(mib=112, hot_mib=4, rate=100, rewrite_percent=20)
)
POLICY: Final[dict[str, Any]] = {
    "version": 1,
    "default_class": "chaos",
    "classes": {"chaos": {"mode": "enforce", "min_idle_age": "1s", "floor": "20%", "cap": "80%"}},
}
AWAY: Final = 60 * MIB
WAIT_SECONDS: Final = 60.0

pytestmark = pytest.mark.timeout(240)


class ShortTiming(Timing):
    scan = 0.5
    lease = 6.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Redis, a controller, an agent and a guest with most of its memory away; tests put right what they break."""
    reason = why_no_guest()
    if reason is not None:
        pytest.skip(reason)
    with World(keep_logs_in=tmp_path_factory.mktemp("world"), timing=ShortTiming) as started:
        started.start_redis()
        started.start_controller()
        started.put_policy(POLICY)
        guest = started.start_guest(CONFIG)
        guest.wait_filled()
        started.start_agent([CONFIG], limits={"stall_target": "100%"})
        yield started


@pytest.fixture
def guest(world: World) -> Iterator[Guest]:
    """The guest, with most of its memory away and a lease; compared whole afterwards."""
    guest = world.guests[0]
    settled(world)
    yield guest
    assert guest.verify() == 0, guest.describe()
    last = status(world)
    assert last.checksum_errors == 0 and last.poisoned_pages == 0, last


def status(world: World) -> Status:
    found = world.status(world.guests[0])
    assert found is not None, f"the guest is not attached\n{world.words()}"
    return found


def settled(world: World) -> Status:
    """A lease in force and most of the memory away."""
    return see(world, "most of it away", lambda s: s.state is State.ACTIVE and s.evicted_bytes >= AWAY)


def see(world: World, what: str, wanted: Callable[[Status], bool], seconds: float = WAIT_SECONDS) -> Status:
    def look() -> Status | None:
        found = world.status(world.guests[0])
        return found if found is not None and wanted(found) else None

    found = until(what, look, seconds, lambda: f"{world.status(world.guests[0])}\n{world.words()}")
    assert found is not None
    return found


def agent_of(world: World) -> AgentDaemon:
    return world.agents["node-1"]


def stays_away(world: World, seconds: float = 3.0) -> None:
    """Whoever has just come back knows nothing yet: no reason to call back what is away."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = status(world)
        if now.pager_alive and now.state is not State.STARTING:
            assert now.state in (State.ACTIVE, State.HOLD) and now.evicted_bytes >= AWAY // 2, f"{now}\n{world.words()}"
        time.sleep(0.02)


def held_and_served(world: World, guest: Guest) -> None:
    """The lease has run out: nothing new goes, what is away stays so, and is read when it is touched."""
    held = see(world, "HOLD", lambda s: s.state is State.HOLD and s.why is Why.LEASE)
    assert held.evicted_bytes > AWAY // 2
    guest.command("rate 1000")
    later = see(world, "faults served in HOLD", lambda s: s.faults > held.faults + 200)
    guest.command(f"rate {CONFIG.workload.rate}")
    assert later.evictions == held.evictions and later.state is State.HOLD


def test_a_controller_that_is_killed_and_comes_back(world: World, guest: Guest) -> None:
    before = world.cli("hosts")["hosts"][0]
    world.controller.kill()
    held_and_served(world, guest)
    world.controller.start()
    settled(world)
    after = world.cli("hosts")["hosts"][0]
    assert after["epoch"] > before["epoch"], "a controller's new life has a higher epoch"
    assert world.cli("policy", "get")["document"].strip() == json.dumps(POLICY, indent=1)


def test_a_controller_that_comes_back_soon_is_not_noticed(world: World, guest: Guest) -> None:
    states = set()
    killed = time.monotonic()
    world.controller.kill()
    world.controller.start()
    soon = time.monotonic() - killed <= 1.0
    deadline = time.monotonic() + 2 * ShortTiming.lease
    while time.monotonic() < deadline:
        now = status(world)
        states.add(now.state)
        assert now.evicted_bytes >= AWAY // 2, now
        time.sleep(0.05)
    # Agents dial again after at most a second, then two and three later; three of a lease's six seconds may have gone.
    assert states == {State.ACTIVE} or (not soon and states == {State.ACTIVE, State.HOLD}), states


def test_redis_that_is_killed_and_comes_back_empty(world: World, guest: Guest) -> None:
    assert world.redis is not None
    version = int(world.cli("policy", "get")["version"])
    world.redis.kill()
    try:
        until("the controller says so", lambda: not world.cli("hosts")["store_available"], 20, world.words)
        refused = world.cli("policy", "check", str(world.folder / "policy.yaml"), ok=(0, 7))
        assert refused is not None
        with pytest.raises(WorldError, match="exit 7"):
            world.put_policy(POLICY)
        deadline = time.monotonic() + 2 * ShortTiming.lease
        while time.monotonic() < deadline:
            assert status(world).state is State.ACTIVE, "leases are renewed by the last known policy"
            time.sleep(0.1)
        assert status(world).evicted_bytes >= AWAY
    finally:
        world.redis.start()
    until("the store is back", lambda: world.cli("hosts")["store_available"], 30, world.words)
    assert int(world.cli("policy", "get")["version"]) == version
    settled(world)
    assert world.put_policy(POLICY) == version + 1


def test_flushall_costs_history_only(world: World, guest: Guest) -> None:
    assert world.redis is not None
    before = status(world)
    version = int(world.cli("policy", "get")["version"])
    with world.redis.client() as client:
        client.flushall()
    deadline = time.monotonic() + 2 * ShortTiming.lease
    while time.monotonic() < deadline:
        now = status(world)
        assert now.state is State.ACTIVE and now.evicted_bytes >= AWAY // 2, now
        time.sleep(0.1)
    assert int(world.cli("policy", "get")["version"]) == version
    assert status(world).evictions >= before.evictions
    world.cli("freeze", "--vm", CONFIG.name)
    with world.redis.client() as client:
        client.flushall()
    time.sleep(3.0)
    assert "frozen" in world.cli("explain", CONFIG.name)["sentence"], "a freeze outlives what Redis forgot"
    world.cli("unfreeze", "--vm", CONFIG.name)


def test_redis_and_the_controller_die_together(world: World, guest: Guest) -> None:
    """The next controller knows nothing but the built-in policy: it plans, and what is away comes back."""
    assert world.redis is not None
    world.controller.kill()
    world.redis.kill()
    held_and_served(world, guest)
    world.redis.start()
    world.controller.start()
    see(world, "the built-in policy calls everything back", lambda s: s.evicted_pages == 0)
    assert guest.verify() == 0
    world.put_policy(POLICY)
    settled(world)


def test_an_agent_killed_with_its_pager(world: World, guest: Guest) -> None:
    agent = agent_of(world)
    agent.kill()
    pager = agent.pagers()[guest.pid]
    before = status(world)
    assert kill_pid(pager)
    time.sleep(1.5)  # vCPUs wait; nobody is there
    assert not status(world).pager_alive
    agent.start()
    see(world, "the next pager", lambda s: s.pager_alive and s.takeovers == before.takeovers + 1)
    stays_away(world)
    settled(world)


def test_an_agent_that_is_stopped_loses_its_leases_only(world: World, guest: Guest) -> None:
    agent = agent_of(world)
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        held_and_served(world, guest)
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    settled(world)


def test_an_agent_that_leaves_politely_leaves_its_pagers(world: World, guest: Guest) -> None:
    agent = agent_of(world)
    pager = agent.pagers()[guest.pid]
    assert agent.stop() == 0
    assert serves(guest) and agent.pagers() == {guest.pid: pager}
    held_and_served(world, guest)
    agent.start()
    stays_away(world)
    settled(world)
    assert agent.pagers() == {guest.pid: pager}, "the next agent adopts what serves"


def test_an_agent_killed_again_and_again(world: World, guest: Guest) -> None:
    """Each successor adopts the pager at some moment of its own start, and nothing comes back for that."""
    agent = agent_of(world)
    pager = agent.pagers()[guest.pid]
    for _ in range(5):
        agent.kill()
        agent.start()
        stays_away(world, 1.5)
    assert agent.pagers() == {guest.pid: pager}
    settled(world)


def test_two_agents_on_one_host(world: World, guest: Guest) -> None:
    """The second one sees the VM as served elsewhere, and never evicts from it or drains it."""
    first = status(world)
    second = world.start_agent([CONFIG], node_id="node-2", limits={"stall_target": "100%"})
    try:
        until("both are known", lambda: len(world.cli("hosts")["hosts"]) == 2, 20, world.words)
        time.sleep(ShortTiming.lease)
        now = status(world)
        assert (now.pager_pid, now.takeovers) == (first.pager_pid, first.takeovers)
        assert now.state is State.ACTIVE and now.evicted_bytes >= AWAY
        assert not second.pagers()
    finally:
        second.stop()
        del world.agents["node-2"]
    # With the same run folder it is refused before it does anything.
    agent = agent_of(world)
    twin = AgentDaemon("node-1", world.folder, world.folder, world.controller.address, agent.limits)
    with pytest.raises(WorldError, match="ended at once with 5"):
        twin.start()
    assert status(world).pager_pid == first.pager_pid


def test_two_agents_with_one_node_id(world: World, guest: Guest) -> None:
    """A cloned host: both want to be node-1. It is said, and whichever speaks, the VM's pages are safe."""
    folder = world.folder / "twin"
    folder.mkdir()
    agent = agent_of(world)
    twin = AgentDaemon("node-1", folder, folder, world.controller.address, agent.limits)
    first = status(world)
    twin.start()
    try:
        note = until("the controller to say so", lambda: world.cli("hosts")["hosts"][0]["note"], 20, world.words)
        assert "agent" in note, note
        time.sleep(ShortTiming.lease)
        now = status(world)
        assert now.pager_pid == first.pager_pid and now.state in (State.ACTIVE, State.HOLD), now
        assert now.evicted_bytes >= AWAY // 2, "nothing is called back for it"
    finally:
        twin.stop()
    settled(world)


def test_a_pool_without_room_stops_eviction(world: World, guest: Guest) -> None:
    """The limits file gets tighter, the pager is exchanged, the pool is full: nothing is lost, and it is said."""
    agent = agent_of(world)
    limits = json.loads(agent.limits.read_text())
    agent.limits.write_text(json.dumps({**limits, "vm_pool_max": "8MiB"}))
    try:
        os.kill(agent.pid, signal.SIGHUP)
        time.sleep(1.0)
        world.cli("drain", CONFIG.name, "--wait")
        world.agent_cli(agent, "release", CONFIG.name)
        world.cli("unfreeze", "--vm", CONFIG.name)
        full = see(world, "a full pool", lambda s: s.why is Why.TIER_FULL)
        assert full.pool_bytes <= 8 * MIB and full.evicted_ram_pages > 0
        vm = until("the controller knows", lambda: _holding_back(world, guest) == "TIER_FULL", 20, world.words)
        assert vm
        assert guest.verify() == 0
    finally:
        agent.limits.write_text(json.dumps(limits))
        os.kill(agent.pid, signal.SIGHUP)
        time.sleep(1.0)
        world.agent_cli(agent, "release", CONFIG.name)
    settled(world)


def _holding_back(world: World, guest: Guest) -> str:
    vm = world.vm(guest)
    return common_pb2.Reason.Name(vm.state.holding_back).removeprefix("REASON_") if vm is not None else ""


def test_a_vm_that_dies_is_forgotten_and_a_new_one_is_found(world: World) -> None:
    """The last test of this file: it takes another guest into the world, and loses it."""
    config = GuestConfig(name="short-lived", memory_mib=160, workload=Workload(mib=48, hot_mib=4))
    agent = agent_of(world)
    limits = json.loads(agent.limits.read_text())
    agent.limits.write_text(json.dumps({**limits, "only": [*limits["only"], config.uuid]}))
    os.kill(agent.pid, signal.SIGHUP)
    guest = world.start_guest(config)
    guest.wait_filled()
    until("its memory to go", lambda: _away(guest) > 20 * MIB, WAIT_SECONDS, world.words)
    pager = agent.pagers()[guest.pid]
    guest.kill()
    until("its pager to end", lambda: guest.pid not in agent.pagers(), 10, world.words)
    known = {vm["name"] for vm in world.cli("vms")["vms"]}
    until("the controller to forget it", lambda: "short-lived" not in _names(world), 20, world.words)
    assert "steady" in known and pager not in agent.pagers().values()
    assert status(world).state in (State.ACTIVE, State.HOLD)


def _names(world: World) -> set[str]:
    return {vm["name"] for vm in world.cli("vms")["vms"]}


def _away(guest: Guest) -> int:
    try:
        with View(guest.pid) as view:
            return view.status().evicted_bytes
    except OSError:
        return 0
