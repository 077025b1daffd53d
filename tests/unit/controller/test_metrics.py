# SPDX-License-Identifier: Apache-2.0
"""docs/metrics.md and the code say the same, and every metric of the table is really fed."""

from __future__ import annotations

import re
from pathlib import Path

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import frostline.controller
from frostline.controller.api.watch import Watchers
from frostline.controller.fleet.deciding import Decider
from frostline.controller.fleet.fleet import Fleet
from frostline.controller.gauges import Gauges
from frostline.controller.session.hub import Hub, Timing
from frostline.controller.state.journal import Journal
from frostline.controller.state.store import Store
from frostline.controller.telemetry.metrics import INSTRUMENTS, Metrics
from frostline.wire.telemetry import configure

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"
SOURCES = Path(frostline.controller.__file__).parent


def _documented() -> dict[str, tuple[str, ...]]:
    """Rows of the section 'Controller': name to the other cells."""
    text = DOCS.read_text(encoding="utf-8")
    match = re.search(r"^## Controller$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, "docs/metrics.md has no section '## Controller'"
    rows = [line.strip("|").split("|") for line in match.group(1).splitlines() if line.startswith("| `")]
    return {cells[0].strip().strip("`"): tuple(cell.strip() for cell in cells[1:]) for cells in rows}


def test_documentation_is_the_table() -> None:
    table = {
        each.name: (
            each.kind,
            f"`{each.unit}`",
            ", ".join(f"`{name}`" for name in each.attributes) or "-",
            each.says,
        )
        for each in INSTRUMENTS
    }
    assert _documented() == table


def test_every_counter_and_histogram_is_used_with_its_attributes() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py"))
    for each in INSTRUMENTS:
        short = each.name.removeprefix("frostline.controller.")
        if each.kind == "gauge":
            continue
        verb = "count" if each.kind == "counter" else "record"
        calls = re.findall(rf'\.{verb}\(\s*"{re.escape(short)}"([^)]*)', code)
        assert calls, f"{each.name} is in the table, and nothing feeds it"
        for call in calls:
            assert set(re.findall(r"(\w+)=", call)) == set(each.attributes), each.name


async def test_every_gauge_has_values() -> None:
    reader = InMemoryMetricReader()
    metrics = Metrics(MeterProvider(metric_readers=[reader]).get_meter("test"))
    store = Store("redis://localhost:1", metrics)
    fleet = Fleet(10.0, 60.0)
    tracer = configure("test", install_global=False).tracer("test")
    decider = Decider(fleet, Journal(store, metrics), metrics, tracer)

    async def no_epoch(_above: int, _node_id: str) -> None:
        raise AssertionError("nobody asked for an epoch")

    hub = Hub(fleet, decider, Timing(), no_epoch)
    Gauges(fleet, hub, store, Watchers(fleet), metrics).refresh()
    assert metrics.unobserved() == set()
    data = reader.get_metrics_data()
    assert data is not None
    seen = {metric.name for scope in data.resource_metrics[0].scope_metrics for metric in scope.metrics}
    assert seen == {each.name for each in INSTRUMENTS if each.kind == "gauge"}
    await store.close()
