# SPDX-License-Identifier: Apache-2.0
"""One trace from a scan to the evictions that followed from it, with the pagers' own times.

For each report of a host there is one root span ``agent.scan``: it covers the newest scan of every VM since the
last report, each a child span ``agent.scan.vm``. ``agent.report`` is its child; its traceparent travels in the
report, so ``controller.decide`` and ``budget.push`` continue the trace, and ``budget.apply`` is made from the
traceparent in the budget set. The pager writes the number of the set (its generation) into its records, by which
bursts of eviction become ``swap.evict`` children of that ``budget.apply``. Sampled ``swap.fault`` spans are traces
of their own with a link to the last ``budget.apply``: one budget has many effects, at any later time.

Spans are made from records after the fact: the pager has no clock but CLOCK_BOOTTIME, whose distance to Unix time
is measured once a cycle. What is remembered is bounded; what is older than that gets no span.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from opentelemetry import trace
from opentelemetry.trace import Span, SpanContext, SpanKind

from frostline.agent.procfs import ProcessId
from frostline.agent.vm import Vm
from frostline.native import Record, RecordKind
from frostline.v1 import session_pb2
from frostline.wire.telemetry import Telemetry, context_from, record_span, traceparent_of

MAX_REMEMBERED_SETS: Final = 64
MAX_SCAN_SPANS: Final = 64
MAX_FAULT_SPANS: Final = 8
# Bursts of one generation that follow each other within a cycle are one span.
MAX_EVICT_SPANS: Final = 16
_TIERS: Final = {0: "zero", 1: "same", 2: "ram"}


@dataclass(slots=True)
class _Burst:
    """Consecutive eviction records of one generation."""

    generation: int
    start_ns: int
    end_ns: int
    pages: int
    stored_bytes: int
    bursts: int


class Traces:
    """Makes the agent's spans, and those of its pagers."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._tracer: Final = telemetry.tracer("frostline.agent")
        self._applied: OrderedDict[int, SpanContext] = OrderedDict()
        self._scans: dict[ProcessId, tuple[Vm, Record]] = {}
        self._offset_ns = boot_to_unix_ns()

    def measure_clocks(self) -> None:
        """Call it once a cycle: Unix time is stepped and slewed, CLOCK_BOOTTIME is not."""
        self._offset_ns = boot_to_unix_ns()

    def note(self, vm: Vm, records: Sequence[Record]) -> None:
        """Take what a pager recorded since the last call."""
        faults = 0
        for record in records:
            if record.kind is RecordKind.SCAN:
                self._scans[vm.vmm.process] = (vm, record)
            elif record.kind is RecordKind.FAULT and faults < MAX_FAULT_SPANS:
                faults += 1
                self._fault(vm, record)
        bursts = list(_bursts(record for record in records if record.kind is RecordKind.EVICT))
        for burst in bursts[-MAX_EVICT_SPANS:]:
            self._evict(vm, burst)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[str]:
        """The span ``agent.report`` around making and sending one report; gives its traceparent.

        Without a scan since the last report there is nothing to trace: the traceparent is empty.
        """
        scans, self._scans = list(self._scans.values()), {}
        if not scans:
            yield ""
            return
        root = self._tracer.start_span(
            "agent.scan",
            context=trace.set_span_in_context(trace.INVALID_SPAN),
            start_time=min(record.start_ns for _, record in scans) + self._offset_ns,
            attributes={
                "frostline.vms": len(scans),
                "frostline.pages_accessed": sum(record.pages for _, record in scans),
                "frostline.resident_bytes": sum(record.bytes for _, record in scans),
            },
        )
        for vm, record in scans[:MAX_SCAN_SPANS]:
            self._record("agent.scan.vm", vm, record, root.get_span_context())
        span = self._tracer.start_span("agent.report", context=trace.set_span_in_context(root), kind=SpanKind.PRODUCER)
        try:
            yield traceparent_of(span)
        finally:
            span.end()
            root.end(end_time=max(record.end_ns for _, record in scans) + self._offset_ns)

    @contextlib.contextmanager
    def applying(self, budget_set: session_pb2.BudgetSet) -> Iterator[Span]:
        """The span ``budget.apply``, child of the controller's ``budget.push``."""
        with self._tracer.start_as_current_span(
            "budget.apply",
            context=context_from(budget_set.traceparent),
            kind=SpanKind.CONSUMER,
            attributes={
                "frostline.version": str(budget_set.version),
                "frostline.epoch": str(budget_set.epoch),
                "frostline.vms": len(budget_set.budgets),
            },
        ) as span:
            yield span

    def applied(self, version: int, span: Span) -> None:
        """From now on the pagers' records may name this version: their evictions follow from this span."""
        self._applied[version] = span.get_span_context()
        self._applied.move_to_end(version)
        while len(self._applied) > MAX_REMEMBERED_SETS:
            self._applied.popitem(last=False)

    def deciding(self, traceparent: str) -> contextlib.AbstractContextManager[Span]:
        """Standalone: the span ``agent.decide`` in the place of the controller's."""
        return self._tracer.start_as_current_span("agent.decide", context=context_from(traceparent))

    def _evict(self, vm: Vm, burst: _Burst) -> None:
        parent = self._applied.get(burst.generation)
        if parent is None:
            return
        record_span(
            self._tracer,
            "swap.evict",
            start_ns=burst.start_ns + self._offset_ns,
            end_ns=burst.end_ns + self._offset_ns,
            parent=parent,
            attributes={
                **_who(vm),
                "frostline.pages": burst.pages,
                "frostline.stored_bytes": burst.stored_bytes,
                "frostline.bursts": burst.bursts,
                "frostline.version": str(burst.generation),
            },
        )

    def _fault(self, vm: Vm, record: Record) -> None:
        last = self._applied.get(record.generation)
        record_span(
            self._tracer,
            "swap.fault",
            start_ns=record.start_ns + self._offset_ns,
            end_ns=record.end_ns + self._offset_ns,
            attributes={
                **_who(vm),
                "frostline.page": record.page,
                "frostline.tier": _TIERS.get(record.tier, str(record.tier)),
                "frostline.stored_bytes": record.bytes,
            },
            links=[last] if last else [],
        )

    def _record(self, name: str, vm: Vm, record: Record, parent: SpanContext) -> None:
        record_span(
            self._tracer,
            name,
            start_ns=record.start_ns + self._offset_ns,
            end_ns=record.end_ns + self._offset_ns,
            parent=parent,
            attributes={
                **_who(vm),
                "frostline.pages_accessed": record.pages,
                "frostline.resident_bytes": record.bytes,
            },
        )


def boot_to_unix_ns() -> int:
    """What to add to CLOCK_BOOTTIME to get Unix time, both in ns."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _bursts(records: Iterable[Record]) -> Iterator[_Burst]:
    current: _Burst | None = None
    for record in records:
        if current is None or current.generation != record.generation:
            if current is not None:
                yield current
            current = _Burst(record.generation, record.start_ns, record.end_ns, 0, 0, 0)
        current.end_ns = max(current.end_ns, record.end_ns)
        current.pages += record.pages
        current.stored_bytes += record.bytes
        current.bursts += 1
    if current is not None:
        yield current


def _who(vm: Vm) -> dict[str, str | int]:
    return {"frostline.vm_id": vm.vm_id, "frostline.vm_name": vm.vmm.name, "frostline.pager_pid": vm.pager_pid}
