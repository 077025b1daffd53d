# SPDX-License-Identifier: Apache-2.0
"""Agent, controller and pager together on real guests: one trace, leases, epochs, and a controller that goes away."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GuestFactory
from tests.system.agent_rig import ENFORCE, AgentRig, wait_for
from tests.system.controller_rig import ControllerProcess
from tests.system.guest import GuestConfig, Workload
from tests.system.otlp_receiver import OtlpReceiver

MIB = 1 << 20
CLOCK_SLACK_NS = 50_000_000
pytestmark = pytest.mark.timeout(300)
CHAIN = ("agent.scan", "agent.report", "controller.decide", "budget.push", "budget.apply", "swap.evict")


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def frostline(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "frostline"), *arguments]
    environment = {**os.environ, "FROSTLINE_CONTROLLER": address}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_one_trace_from_scan_to_eviction_and_the_ladder_without_a_controller(
    guest_factory: GuestFactory, receiver: OtlpReceiver, tmp_path: Path
) -> None:
    kept = guest_factory(GuestConfig(name=f"fleet-kept-{os.getpid()}", memory_mib=160, workload=Workload(mib=32)))
    guest = guest_factory(
        GuestConfig(name=f"fleet-{os.getpid()}", memory_mib=224, workload=Workload(mib=96, hot_mib=4))
    )
    name = guest.config.name
    with AgentRig([name, kept.config.name]) as rig:
        controller = ControllerProcess(
            rig.folder / "controller", "--lease-seconds", "6", "--otlp-endpoint", receiver.endpoint
        )
        controller.start()
        try:
            policy = rig.folder / "fleet.yaml"
            policy.write_text(ENFORCE + f"vms:\n  {kept.config.name}: {{exclude: true}}\n")
            put = frostline(controller.address, "policy", "put", str(policy))
            assert put.returncode == 0, put.stderr
            agent = ["--controller", controller.address, "--node-id", "host-1", "--otlp-endpoint", receiver.endpoint]
            agent += ["--drain-after", "12s", "--attach-grace", "30s"]
            rig.start(*agent, standalone=False)
            guest.wait_filled()
            rig.wait_evicted(name, 48 * MIB)

            # The excluded one has never been attached to.
            excluded = rig.vm(kept.config.name)
            assert excluded["phase"] == "idle" and not excluded["pager"]
            assert excluded["grant"]["mode"] == "off"
            assert not rig.logged("attached") or all(line["vm"] == name for line in rig.logged("attached"))

            # One trace, from the scan to what left because of it.
            trace = wait_for(
                "a whole trace", lambda: next((t for t in receiver.traces() if t.chains(*CHAIN)), None), 30
            )
            path = trace.chains(*CHAIN)[0]
            assert path[0].parent_id == "" and not trace.orphans(), trace.tree()
            assert [span.service for span in path] == ["frostline-agent"] * 2 + ["frostline-controller"] * 2 + [
                "frostline-agent"
            ] * 2
            starts = [span.start_ns for span in path]
            # An eviction may have begun in the round of the mover in which its budget came.
            assert all(before <= after + CLOCK_SLACK_NS for before, after in itertools.pairwise(starts)), trace.tree()
            # Faults come when the guest goes back to a page, and their spans with the next export.
            wait_for(
                "a fault that is linked to its eviction",
                lambda: any(span.links for t in receiver.traces() for span in t.named("swap.fault")) or None,
                30,
            )

            # Restarted agent: the same epoch fence, the same pager, excluded VM still alone.
            pager = rig.vm(name)["pager"]["pid"]
            rig.kill()
            rig.start(*agent, standalone=False)
            rig.wait_vm(name, lambda vm: vm["pager"]["pid"] == pager and vm["grant"], "adopted with a budget")
            status: dict[str, Any] = json.loads(rig.ask("status", "--json").stdout)["agent"]
            assert status["highest_epoch"] >= 1 and status["connected"]
            assert not rig.vm(kept.config.name)["pager"]

            # An operator's drain over the session.
            drained = frostline(controller.address, "drain", name, "--wait")
            assert drained.returncode == 0, drained.stderr
            rig.wait_vm(name, lambda vm: vm["pager"]["evicted_pages"] == 0, "drained")
            assert frostline(controller.address, "unfreeze", "--vm", name).returncode == 0
            rig.wait_evicted(name, 32 * MIB)

            # The controller goes: the lease runs out by itself, then, as RAM allows, everything comes back.
            assert controller.stop() == 0
            held = rig.wait_vm(
                name, lambda vm: (vm["pager"]["state"], vm["pager"]["why"]) == ("hold", "lease"), "on hold"
            )
            assert held["pager"]["evicted_pages"] > 0
            rig.wait_vm(name, lambda vm: vm["pager"]["evicted_pages"] == 0, "drained for want of a controller", 40)
            assert rig.logged("the controller is gone for long; draining")

            # It comes back: a session by itself, and budgets again.
            controller.start()
            rig.wait_evicted(name, 32 * MIB)
            assert guest.verify() == 0 and kept.verify() == 0
        finally:
            controller.stop()
