# SPDX-License-Identifier: Apache-2.0
"""The controller's metrics: one table that both the code and docs/metrics.md are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation

Attributes = dict[str, str | int]
Observe = Callable[[], Iterable[tuple[int | float, Attributes]]]


@dataclass(frozen=True, slots=True)
class Instrument:
    name: str
    kind: Literal["counter", "histogram", "gauge"]
    unit: str
    attributes: tuple[str, ...]
    says: str


INSTRUMENTS: tuple[Instrument, ...] = (
    Instrument("frostline.controller.hosts", "gauge", "{host}", ("state",), "Hosts by state of their session"),
    Instrument("frostline.controller.vms", "gauge", "{vm}", ("mode",), "VMs by the mode decided for them"),
    Instrument("frostline.controller.memory.evicted", "gauge", "By", (), "Guest memory away, as last reported"),
    Instrument("frostline.controller.memory.resident", "gauge", "By", (), "Guest memory in host RAM, as last reported"),
    Instrument("frostline.controller.memory.pool", "gauge", "By", (), "Host RAM held by compressed pools"),
    Instrument("frostline.controller.memory.budget", "gauge", "By", (), "Sum of the budgets decided"),
    Instrument("frostline.controller.memory.planned", "gauge", "By", (), "Sum of what enforce would allow"),
    Instrument("frostline.controller.epoch", "gauge", "1", (), "Epoch of this controller, 0 while it has none"),
    Instrument(
        "frostline.controller.policy.version", "gauge", "1", (), "Version of the policy in force, 0 is built in"
    ),
    Instrument("frostline.controller.fleet.frozen", "gauge", "1", (), "1 while the fleet is frozen"),
    Instrument("frostline.controller.store.available", "gauge", "1", (), "1 while Redis answers and takes writes"),
    Instrument("frostline.controller.store.errors", "counter", "{error}", ("kind",), "Redis operations that failed"),
    Instrument("frostline.controller.store.losses", "counter", "{loss}", (), "Times that Redis had lost its data"),
    Instrument("frostline.controller.store.restarts", "counter", "{restart}", (), "Restarts of the private Redis"),
    Instrument("frostline.controller.journal.dropped", "counter", "{entry}", (), "Decisions not kept, buffer full"),
    Instrument("frostline.controller.session.opened", "counter", "{session}", (), "Streams that said hello"),
    Instrument("frostline.controller.session.refused", "counter", "{session}", ("reason",), "Streams turned away"),
    Instrument("frostline.controller.session.closed", "counter", "{session}", ("code",), "Streams ended, by status"),
    Instrument("frostline.controller.reports", "counter", "{report}", ("verdict",), "Reports by what was done to them"),
    Instrument("frostline.controller.report.bad_states", "counter", "{vm}", (), "VM states that were not believed"),
    Instrument("frostline.controller.resyncs", "counter", "{request}", (), "Full reports asked for"),
    Instrument("frostline.controller.decide.duration", "histogram", "s", (), "Time to decide for one host"),
    Instrument("frostline.controller.decisions", "counter", "{decision}", ("reason",), "Decisions that changed"),
    Instrument("frostline.controller.push.duration", "histogram", "s", (), "From sending a budget set to its result"),
    Instrument("frostline.controller.pushes", "counter", "{push}", ("result",), "Budget sets by result"),
    Instrument("frostline.controller.nacks", "counter", "{budget}", ("reason",), "Budgets not taken, by reason"),
    Instrument("frostline.controller.watchers", "gauge", "{stream}", (), "Open Watch streams"),
)


class Metrics:
    """All counters and histograms by name; gauges are asked for through `observe`."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._gauges: dict[str, Observe] = {}
        for each in INSTRUMENTS:
            if each.kind == "counter":
                self._counters[each.name] = meter.create_counter(each.name, unit=each.unit, description=each.says)
            elif each.kind == "histogram":
                self._histograms[each.name] = meter.create_histogram(each.name, unit=each.unit, description=each.says)
            else:
                meter.create_observable_gauge(
                    each.name, callbacks=[self._callback(each.name)], unit=each.unit, description=each.says
                )

    def count(self, name: str, amount: int = 1, **attributes: str | int) -> None:
        self._counters[f"frostline.controller.{name}"].add(amount, attributes)

    def record(self, name: str, value: float) -> None:
        self._histograms[f"frostline.controller.{name}"].record(value)

    def observe(self, name: str, what: Observe) -> None:
        """Give a gauge its values. Called on the exporter's thread: read plain values, and build nothing."""
        full_name = f"frostline.controller.{name}"
        if not any(each.name == full_name and each.kind == "gauge" for each in INSTRUMENTS):
            raise KeyError(f"{full_name} is not in the table of gauges")
        self._gauges[full_name] = what

    def unobserved(self) -> set[str]:
        """Gauges of the table that nothing feeds."""
        return {each.name for each in INSTRUMENTS if each.kind == "gauge"} - self._gauges.keys()

    def _callback(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def callback(_options: CallbackOptions) -> Iterable[Observation]:
            observe = self._gauges.get(name)
            return [Observation(value, attributes) for value, attributes in observe()] if observe else []

        return callback
