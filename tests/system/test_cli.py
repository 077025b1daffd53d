# SPDX-License-Identifier: Apache-2.0
"""The operator's command against a real controller, Redis and a hand-driven agent: every command, every exit code."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from frostline.controller.cli.main import app
from frostline.v1 import common_pb2 as pb
from frostline.v1 import session_pb2 as wire
from tests.system.controller_rig import GIB, MIB, ControllerProcess, RawAgent, RedisServer, identity, state, until

ENFORCE = """\
version: 1
classes:
  standard: {mode: enforce, min_idle_age: 60s, floor: 128 MiB, cap: 75%}
vms:
  db: {exclude: true}
"""
LIMIT_SECONDS = 30.0


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Operator:
    """Runs `frostline`: mostly inside this process (starting Python takes longer than all the rest), on a thread so
    that the test's event loop goes on; as a process of its own where signals or a shell matter."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def __call__(self, *arguments: str, stdin: str = "") -> Run:
        def invoke() -> Run:
            environ = {"FROSTLINE_CONTROLLER": self.address, "COLUMNS": "120", "LANG": "C.UTF-8", "LC_ALL": None}
            result = CliRunner().invoke(app, list(arguments), input=stdin, env=environ)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            return Run(result.exit_code, result.stdout, result.stderr)

        return await asyncio.wait_for(asyncio.to_thread(invoke), LIMIT_SECONDS)

    async def ok(self, *arguments: str, stdin: str = "") -> Run:
        run = await self(*arguments, stdin=stdin)
        assert run.code == 0, f"frostline {' '.join(arguments)} ended with {run.code}: {run.err}"
        return run

    @contextlib.asynccontextmanager
    async def process(self, *arguments: str, **environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / "frostline"),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "FROSTLINE_CONTROLLER": self.address, "COLUMNS": "120", **environ},
            limit=2**20,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _json_line(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    return json.loads(await asyncio.wait_for(process.stdout.readline(), LIMIT_SECONDS))


async def _ends(process: asyncio.subprocess.Process, number: int) -> int:
    process.send_signal(number)
    return await asyncio.wait_for(process.wait(), LIMIT_SECONDS)


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's own folders are too deep for the path of a unix socket.
    with tempfile.TemporaryDirectory(prefix="fl-cli-") as name:
        yield Path(name)


@pytest.fixture
def redis_server(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(folder / "redis").start()
    yield server
    server.stop()


@pytest.fixture
def controller(folder: Path, redis_server: RedisServer) -> Iterator[ControllerProcess]:
    process = ControllerProcess(folder / "controller", redis_url=redis_server.url).start()
    yield process
    process.stop()


@pytest.fixture
def frostline(controller: ControllerProcess) -> Operator:
    return Operator(controller.address)


@pytest.fixture
async def agent(controller: ControllerProcess) -> AsyncIterator[RawAgent]:
    """node-1 with four VMs: web (half of it cold), db, and two that share a name."""
    async with RawAgent(controller.address) as raw:
        await raw.hello(
            [
                identity("a", name="web"),
                identity("b", name="db"),
                identity("c", name="twin"),
                identity("d", name="twin"),
            ],
            agent_version="0.1.0",
        )
        await raw.report([state(vm_id) for vm_id in "abcd"])

        async def known() -> bool:
            vms = (await Operator(controller.address).ok("vms", "--json")).json["vms"]
            return len(vms) == 4 and all(vm["resident_bytes"] for vm in vms)

        await until("the first report is known", known)
        yield raw


async def _enforced(frostline: Operator, agent: RawAgent) -> int:
    """Put the policy in force and acknowledge budgets until web has one; returns its bytes."""
    await frostline.ok("policy", "put", "-", stdin=ENFORCE)
    budget = await agent.budget_where(lambda b: b.mode == pb.MODE_ENFORCE and b.bytes > 0)
    return int(budget.bytes)


async def _vm(frostline: Operator, name: str) -> Any:
    return (await frostline.ok("vm", name, "--json")).json


async def test_the_picture(frostline: Operator, agent: RawAgent) -> None:
    run = await frostline.ok("hosts")
    assert run.out.splitlines()[1].split()[:2] == ["node-1", "connected"]
    (host,) = (await frostline.ok("hosts", "--json")).json["hosts"]
    assert (host["node_id"], host["vms"], host["memory_bytes"]) == ("node-1", 4, 4 * GIB)
    assert host["agent_version"] == "0.1.0"

    lines = (await frostline.ok("vms")).out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["db", "twin", "twin", "web"]
    assert (await frostline.ok("vms", "--host", "node-1", "--json")).json["vms"][3]["name"] == "web"

    out = (await frostline.ok("vm", "web")).out
    assert out.startswith("web  on node-1 · plan · class standard · active")
    bars = [line for line in out.splitlines() if line.lstrip().startswith(("0s", "2m"))]
    assert len(bars) == 2 and all("512 MiB" in bar and "█" in bar for bar in bars)
    document = await _vm(frostline, "web")
    assert [b["resident_bytes"] for b in document["histogram"]] == [GIB // 2, 0, GIB // 2]
    assert document["mode"] == "plan"

    explained = await frostline.ok("explain", "web")
    assert f"reason: {document['reason']}" in explained.out.splitlines()
    assert "Mode plan" in explained.out
    assert (await frostline.ok("explain", "web", "--json")).json["details"]


async def test_a_budget_is_desired_then_in_force(frostline: Operator, agent: RawAgent) -> None:
    await frostline.ok("policy", "put", "-", stdin=ENFORCE.replace("enforce", "plan"))

    async def planned() -> bool:
        return bool((await _vm(frostline, "web"))["decision"]["planned_bytes"])

    await agent.budgets()  # one push is in flight at a time, and the next decision waits for its answer
    await until("the plan is shown", planned)
    assert "plan 512 MiB" in (await frostline.ok("vms")).out
    budget_bytes = await _enforced(frostline, agent)
    document = await _vm(frostline, "web")
    assert document["budget"]["desired_bytes"] == budget_bytes
    assert document["budget"]["effective_bytes"] == 0
    working = state("a", evicted_bytes=256 * MIB)
    working.effective_budget_bytes, working.pool_bytes = budget_bytes, 80 * MIB
    working.effective_version, working.lease_remaining_seconds = 1, 12.0
    await agent.report([working])

    async def applied() -> bool:
        return bool((await _vm(frostline, "web"))["budget"]["effective_bytes"] == budget_bytes)

    await until("the effective budget is shown", applied)
    web = (await frostline.ok("vms")).out.splitlines()[4]
    assert "256 MiB" in web and "176 MiB" in web and web.endswith("granted")
    assert (await _vm(frostline, "db"))["reason"] == "excluded"


async def test_trackers_and_estimates_reach_the_operator_and_lies_do_not(frostline: Operator, agent: RawAgent) -> None:
    served = state("a")
    served.tracker, served.freeze_method, served.swapped_bytes = pb.TRACKER_RWP, pb.FREEZE_METHOD_RWP, 8 * MIB
    refused = pb.VmState(vm_id="b", refusal=pb.REFUSAL_LOCKED, memory_bytes=GIB, cold_estimate_looked_seconds=14)
    refused.cold_estimate_min_age_seconds.extend([120, 600])
    refused.cold_estimate_bytes.extend([300 * MIB, 250 * MIB])
    await agent.report([served, refused])

    async def shown() -> bool:
        return bool((await _vm(frostline, "db"))["cold_estimate"])

    await until("the estimate is shown", shown)
    web = await _vm(frostline, "web")
    assert (web["tracker"], web["freeze_method"], web["swapped_bytes"]) == ("rwp", "rwp", 8 * MIB)
    assert web["cold_estimate"] is None
    assert "rwp, freezes by rwp" in (await frostline.ok("vm", "web")).out
    assert "~300 MiB cold (estimate)" in " ".join((await frostline.ok("vm", "db")).out.split())
    assert "about 300 MiB of its cgroup look cold, which is an estimate" in (await frostline.ok("explain", "db")).out

    served.swapped_bytes = 2 * GIB
    refused.cold_estimate_bytes[:] = [2 * GIB, GIB]
    await agent.report([served, refused])

    async def disbelieved() -> bool:
        said = [(await frostline.ok("explain", name)).out for name in ("web", "db")]
        return all("was not believed" in text for text in said)

    await until("the lies are named", disbelieved)
    assert (await _vm(frostline, "web"))["swapped_bytes"] == 8 * MIB
    assert (await _vm(frostline, "db"))["cold_estimate"]["ages"][0]["cold_bytes"] == 300 * MIB


async def test_policies(frostline: Operator, agent: RawAgent, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(ENFORCE)
    bad.write_text("version: 1\nclasses:\n  standard: {floor: -1, colour: blue}\n")

    assert (await frostline.ok("policy", "check", str(good), "--json")).json == {"valid": True, "dry_run": True}
    run = await frostline("policy", "check", str(bad), "--json")
    places = {violation["place"] for violation in json.loads(run.err)["error"]["violations"]}
    assert run.code == 5
    assert places == {"classes.standard.floor", "classes.standard.colour"}
    run = await frostline("policy", "put", str(bad))
    assert run.code == 5 and "floor" in run.err and "colour" in run.err

    first = (await frostline.ok("policy", "put", str(good), "-m", "let it go", "--json")).json["version"]
    run = await frostline("policy", "put", str(good), "--expect", str(first + 7))
    assert run.code == 6 and "frostline policy list" in run.err
    second = (await frostline.ok("policy", "put", str(good), "--expect", str(first), "--json")).json["version"]
    assert second == first + 1

    assert (await frostline.ok("policy", "get")).out == ENFORCE
    assert (await frostline.ok("policy", "get", str(first), "--json")).json["comment"] == "let it go"
    run = await frostline("policy", "get", "4711")
    assert run.code == 4 and "4711" in run.err
    listed = (await frostline.ok("policy", "list", "--json")).json["policies"]
    assert [(policy["version"], policy["in_force"]) for policy in listed[:2]] == [(second, True), (first, False)]
    assert "let it go" in (await frostline.ok("policy", "list")).out


async def test_freeze_and_unfreeze(frostline: Operator, agent: RawAgent) -> None:
    await _enforced(frostline, agent)
    run = await frostline.ok("freeze", "--why", "incident 7")
    assert "The fleet is frozen" in run.out and "1 host told" in run.out
    await agent.budget_where(lambda b: b.reason == pb.REASON_FROZEN)
    assert (await frostline.ok("hosts", "--json")).json["fleet_frozen"] is True
    assert "the fleet is frozen" in (await frostline.ok("hosts")).out
    assert "incident 7" in (await frostline.ok("explain", "web")).out
    await frostline.ok("unfreeze")
    await agent.budget_where(lambda b: b.reason == pb.REASON_GRANTED and b.bytes > 0)
    run = await frostline("unfreeze")
    assert run.code == 4 and "not frozen" in run.err

    assert "VM 'web' is frozen" in (await frostline.ok("freeze", "--vm", "web")).out
    await frostline.ok("unfreeze", "--vm", "web")
    assert (await frostline.ok("freeze", "--host", "node-1", "--json")).json["hosts_told"] == 1
    await frostline.ok("unfreeze", "--host", "node-1")
    assert (await frostline("freeze", "--host", "nobody")).code == 4


async def test_drain(frostline: Operator, agent: RawAgent) -> None:
    await agent.report([state("a", evicted_bytes=256 * MIB)])

    async def known() -> bool:
        return bool((await _vm(frostline, "web"))["evicted_bytes"] == 256 * MIB)

    await until("the report is known", known)
    run = await frostline.ok("drain", "web")
    assert "256 MiB still away" in run.out
    command = (await agent.receive("command")).command
    assert command.drain.vm_id == "a"

    run = await frostline("drain", "web", "--wait", "--timeout", "1s")
    assert run.code == 8 and "256 MiB still away" in run.err

    waiting = asyncio.create_task(frostline("drain", "web", "--wait", "--json"))
    ids = {command.command_id, (await agent.receive("command")).command.command_id}
    last = (await agent.receive("command")).command.command_id
    assert last not in ids
    await agent.report([state("a")])
    await agent.send(command_result=wire.CommandResult(command_id=last, done=True))
    run = await waiting
    assert run.code == 0
    assert run.json == {"vm": "web", "command_id": last, "done": True, "evicted_bytes": 0}


async def test_a_drain_that_the_agent_cannot_do_is_refused(frostline: Operator, agent: RawAgent) -> None:
    await agent.report([state("a", evicted_bytes=256 * MIB)])

    async def known() -> bool:
        return bool((await _vm(frostline, "web"))["evicted_bytes"] == 256 * MIB)

    await until("the report is known", known)
    waiting = asyncio.create_task(frostline("drain", "web", "--wait"))
    command = (await agent.receive("command")).command
    await agent.send(command_result=wire.CommandResult(command_id=command.command_id, done=False, detail="no room"))
    run = await waiting
    assert run.code == 5 and "no room" in run.err


async def test_watch_follows_reports_and_ends_on_ctrl_c(frostline: Operator, agent: RawAgent) -> None:
    async with frostline.process("watch", "web", "-i", "200ms", "--json") as process:
        first = await _json_line(process)
        assert [vm["name"] for vm in first["vms"]] == ["web"]
        assert first["vms"][0]["histogram"]
        await agent.report([state("a", evicted_bytes=64 * MIB)])
        seen: set[int] = set()
        async with asyncio.timeout(LIMIT_SECONDS):
            while 64 * MIB not in seen:
                seen |= {vm["evicted_bytes"] for vm in (await _json_line(process))["vms"]}
        assert await _ends(process, signal.SIGINT) == 0


async def test_watch_survives_a_new_controller(
    frostline: Operator, agent: RawAgent, controller: ControllerProcess
) -> None:
    async with frostline.process("watch", "-i", "200ms", "--json") as process:
        await _json_line(process)
        controller.stop()
        controller.start()
        async with RawAgent(controller.address, "node-2") as other:
            await other.hello([identity("z", name="later")])
            await other.report([state("z")])
            names: set[str] = set()
            async with asyncio.timeout(LIMIT_SECONDS):
                while "later" not in names:
                    names |= {vm["name"] for vm in (await _json_line(process))["vms"]}
        assert await _ends(process, signal.SIGTERM) == 0


async def test_unknown_and_ambiguous_names(frostline: Operator, agent: RawAgent) -> None:
    for command in ("vm", "explain", "drain"):
        run = await frostline(command, "nobody")
        assert run.code == 4 and "nobody" in run.err, command
        run = await frostline(command, "twin")
        assert run.code == 5 and "c" in run.err and "id" in run.err, command
    assert (await frostline("vms", "--host", "nobody")).code == 4
    async with frostline.process("watch", "nobody") as process:
        _out, err = await asyncio.wait_for(process.communicate(), LIMIT_SECONDS)
        assert process.returncode == 4 and b"nobody" in err
    assert (await frostline.ok("vm", "c", "--json")).json["name"] == "twin"


async def test_a_lost_store_is_7_for_changes_and_nothing_for_reads(
    frostline: Operator, agent: RawAgent, redis_server: RedisServer
) -> None:
    await _enforced(frostline, agent)
    redis_server.stop()
    try:
        run = await frostline("policy", "put", "-", stdin=ENFORCE)
        assert run.code == 7 and "bring Redis back" in run.err
        assert (await frostline.ok("hosts", "--json")).json["store_available"] is False
        assert "state store is away" in (await frostline.ok("hosts")).out
        assert (await frostline.ok("vm", "web", "--json")).json["mode"] == "enforce"
        assert (await frostline.ok("policy", "get")).out == ENFORCE
    finally:
        redis_server.start()


async def test_no_controller_and_a_hung_one_are_3(frostline: Operator, controller: ControllerProcess) -> None:
    assert controller.process is not None
    controller.process.send_signal(signal.SIGSTOP)
    try:
        run = await frostline("hosts", "--timeout", "500ms")
        assert run.code == 3 and "no answer in time" in run.err
    finally:
        controller.process.send_signal(signal.SIGCONT)
    await frostline.ok("hosts")
    controller.stop()
    run = await frostline("hosts")
    assert run.code == 3 and controller.address in run.err


async def test_the_shell_completes_names(frostline: Operator, agent: RawAgent) -> None:
    asked = {"_FROSTLINE_COMPLETE": "complete_bash", "COMP_WORDS": "frostline vm ", "COMP_CWORD": "2"}
    out = b""
    for _ in range(10):  # a shell is not kept waiting: on a busy machine nothing may be offered
        async with frostline.process(**asked) as process:
            out, err = await asyncio.wait_for(process.communicate(), LIMIT_SECONDS)
        assert err == b""
        if out:
            break
    # Of two VMs with one name, each is offered by its id.
    assert sorted(out.decode().split()) == ["c", "d", "db", "web"]
