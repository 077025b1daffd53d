# SPDX-License-Identifier: Apache-2.0
"""One trace runs from a scan of a real guest to the evictions that follow from it, over OTLP gRPC.

A real controller, a real agent with its pager, and a guest whose memory really leaves: the spans that arrive at the
receiver must hang together, carry real times, and agree with what the pager counted.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from frostline.controller.cli.main import app
from tests.conftest import GuestFactory
from tests.system.agent_rig import AgentRig
from tests.system.controller_rig import ControllerProcess
from tests.system.guest import GuestConfig, Workload
from tests.system.otlp_receiver import OtlpReceiver, ReceivedSpan, Trace

MIB = 1 << 20
CHAIN = ("agent.scan", "agent.report", "controller.decide", "budget.push", "budget.apply", "swap.evict")
# The pager's clock is CLOCK_BOOTTIME, which the agent maps to Unix time once a cycle.
CLOCK_SLACK_NS = 50_000_000
POLICY = """\
version: 1
classes:
  standard: {mode: enforce, min_idle_age: 2s, floor: 5%, cap: 95%, rate: unlimited}
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's own folders are too deep for the path of a unix socket.
    with tempfile.TemporaryDirectory(prefix="fl-trace-") as name:
        yield Path(name)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as made:
        yield made


@pytest.fixture
def controller(folder: Path, receiver: OtlpReceiver) -> Iterator[ControllerProcess]:
    process = ControllerProcess(folder, "--otlp-endpoint", receiver.endpoint).start()
    yield process
    process.stop()


def frostline(controller: ControllerProcess, *arguments: str, stdin: str = "") -> str:
    result = CliRunner().invoke(app, ["--controller", controller.address, *arguments], input=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_one_trace_from_scan_to_evict(
    guest_factory: GuestFactory, receiver: OtlpReceiver, controller: ControllerProcess
) -> None:
    started_ns = time.time_ns()
    name = f"traced-{os.getpid()}"
    guest = guest_factory(GuestConfig(name=name, memory_mib=224, workload=Workload(mib=96, hot_mib=4)))
    guest.wait_filled()
    frostline(controller, "policy", "put", "-", stdin=POLICY)
    with AgentRig([name]) as agent:
        agent.start(
            "--controller", controller.address, "--otlp-endpoint", receiver.endpoint, "--node-id", "node-traced",
            standalone=False,
        )  # fmt: skip
        vm = agent.wait_evicted(name, 32 * MIB)
        trace_id = receiver.wait_for_trace(*CHAIN, limit_seconds=30).trace_id
        # Spans of other branches may still be on their way.
        trace = receiver.wait_for(lambda r: _whole(r, trace_id), 20)
        ended_ns = time.time_ns()

        (chain, *_others) = trace.chains(*CHAIN)
        _check_chain(trace, chain, vm["vm_id"])
        _check_times(chain, started_ns, ended_ns)
        for span in trace:
            assert started_ns - CLOCK_SLACK_NS <= span.start_ns <= span.end_ns <= ended_ns + CLOCK_SLACK_NS, (
                trace.tree()
            )
        assert [span.name for span in trace.roots()] == ["agent.scan"], trace.tree()

        # The guest goes back to cold pages all the time, so faults must follow; each is a trace of its own, linked to
        # the budget that let its page go.
        fault = receiver.wait_for(_linked_fault, 30)
        assert fault.trace_id != trace.trace_id and not fault.parent_id
        assert 0 < fault.duration_ns < 10_000_000_000

        agent.stop()
        assert guest.verify() == 0  # by the pager, which stays
    # 32 MiB were seen to be away; what was away before the first budget.apply of this agent has no span.
    shown = sum(int(span.attributes["frostline.pages"]) for span in receiver.spans if span.name == "swap.evict")
    assert shown * 4096 >= 16 * MIB, receiver.describe(3)


def _whole(receiver: OtlpReceiver, trace_id: str) -> Trace | None:
    (trace,) = [trace for trace in receiver.traces() if trace.trace_id == trace_id]
    return None if trace.orphans() else trace


def _linked_fault(receiver: OtlpReceiver) -> ReceivedSpan | None:
    applied = {f"{span.trace_id}:{span.span_id}" for span in receiver.spans if span.name == "budget.apply"}
    faults = [span for span in receiver.spans if span.name == "swap.fault"]
    return next((span for span in faults if span.links and set(span.links) <= applied), None)


def _check_chain(trace: Trace, chain: list[ReceivedSpan], vm_id: str) -> None:
    scan, report, decide, push, apply, evict = chain
    assert len({span.trace_id for span in chain}) == 1
    # Nothing stands between these: each is the direct parent of the next.
    for parent, child in itertools.pairwise(chain):
        assert trace.parent(child) is parent, trace.tree()
    assert [span.service for span in chain] == [
        "frostline-agent",
        "frostline-agent",
        "frostline-controller",
        "frostline-controller",
        "frostline-agent",
        "frostline-agent",
    ]
    assert all(span.ok for span in chain)
    assert evict.attributes["frostline.pages"] > 0
    assert vm_id in evict.attributes.values(), evict
    # Other tests' VMs may run on this machine, observed from their vaults; ours must be among those scanned.
    scanned = [span for span in trace.named("agent.scan.vm") if vm_id in span.attributes.values()]
    assert [trace.parent(span) for span in scanned] == [scan], trace.tree()
    assert report.span_id != scan.span_id and decide.span_id != push.span_id
    assert str(apply.attributes["frostline.version"]) == str(evict.attributes["frostline.version"])


def _check_times(chain: list[ReceivedSpan], started_ns: int, ended_ns: int) -> None:
    scan, report, decide, push, apply, evict = chain
    order = [scan, report, decide, push, apply, evict]
    for before, after in itertools.pairwise(order):
        assert before.start_ns <= after.start_ns + CLOCK_SLACK_NS, (before, after)
    assert scan.end_ns <= decide.start_ns + CLOCK_SLACK_NS
    assert apply.end_ns <= evict.end_ns + CLOCK_SLACK_NS
    assert started_ns <= evict.start_ns and evict.end_ns <= ended_ns + CLOCK_SLACK_NS
    assert evict.duration_ns > 0
    # From a scan to what follows from it is a matter of one report and one decision, not of minutes.
    assert evict.start_ns - scan.start_ns < 30_000_000_000
