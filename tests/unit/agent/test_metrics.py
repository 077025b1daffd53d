# SPDX-License-Identifier: Apache-2.0
"""What a scrape sees of VMs."""

from __future__ import annotations

from typing import Any, cast

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from frostline.agent.host import Host
from frostline.agent.metrics import AgentCounts, AgentMetrics
from frostline.native import Freeze, Tracker
from tests.unit.agent.doubles import StandInVm, a_status, a_vm


def scrape(*vms: StandInVm) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """Every data point by its metric's name."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    AgentMetrics(provider.get_meter("test"), cast(Host, list(vms)), AgentCounts(), lambda: None, lambda: 0)
    data = reader.get_metrics_data()
    assert data is not None
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        points = [cast(Any, point) for point in metric.data.data_points]
        found[metric.name] = [(point.value, dict(point.attributes)) for point in points]
    provider.shutdown()
    return found


def test_what_a_vm_uses_and_costs_is_seen() -> None:
    rwp = a_status(
        tracker=Tracker.RWP,
        freeze=Freeze.RWP,
        tracker_switches=2,
        arm_ns=1_500_000_000,
        harvest_ns=250_000_000,
        swapped_bytes=4096,
        minor_faults=7,
        sync_windows=9,
        sync_long_windows=3,
        sync_max_ns=4_000_000,
    )
    found = scrape(a_vm(1, status=rwp), a_vm(2, status=a_status(tracker=Tracker.NONE)), a_vm(3))
    assert found["frostline.vm.tracker"] == [
        (1, {"vm_id": "id-1", "vm_name": "vm-1", "tracker": "rwp", "freeze": "rwp"}),
        (1, {"vm_id": "id-2", "vm_name": "vm-2", "tracker": "none", "freeze": "wp"}),
    ]
    seen = {name: points[0][0] for name, points in found.items() if points}
    assert seen["frostline.vm.scan.arm"] == 1.5 and seen["frostline.vm.scan.harvest"] == 0.25
    assert seen["frostline.vm.tracker.switches"] == 2 and seen["frostline.vm.minor_faults"] == 7
    assert seen["frostline.vm.swapped"] == 4096 and seen["frostline.vm.sync.max"] == 0.004
    assert seen["frostline.vm.sync"] == 9 and seen["frostline.vm.sync.long"] == 3
    assert "tracker" not in found["frostline.vm.memory"][0][1]
