# SPDX-License-Identifier: Apache-2.0
"""One trace from scan to eviction, made of records."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from frostline.agent.traces import MAX_EVICT_SPANS, MAX_FAULT_SPANS, MAX_REMEMBERED_SETS, Traces
from frostline.native import RecordKind
from frostline.v1.session_pb2 import BudgetSet
from frostline.wire.telemetry import configure
from tests.unit.agent.doubles import a_record, a_vm, as_managed


class Rig:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.telemetry = configure("test", install_global=False)
        self.telemetry.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.traces = Traces(self.telemetry)
        self.vm = as_managed(a_vm(1))

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def apply(self, version: int, traceparent: str = "") -> None:
        with self.traces.applying(BudgetSet(version=version, traceparent=traceparent)) as span:
            self.traces.applied(version, span)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.telemetry.shutdown()


def ids(span: ReadableSpan) -> tuple[int, int, int | None]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id, span.parent.span_id if span.parent else None


def test_scan_report_apply_and_evict_are_one_trace(rig: Rig) -> None:
    rig.traces.note(rig.vm, [a_record(RecordKind.SCAN)])
    with rig.traces.reporting() as traceparent:
        pass
    rig.apply(7, traceparent)
    rig.traces.note(rig.vm, [a_record(RecordKind.EVICT, generation=7)])
    chain = [rig.named(name)[0] for name in ("agent.scan", "agent.report", "budget.apply", "swap.evict")]
    assert len({ids(span)[0] for span in chain}) == 1
    assert ids(chain[0])[2] is None
    for parent, child in itertools.pairwise(chain):
        assert ids(child)[2] == ids(parent)[1]
    assert ids(rig.named("agent.scan.vm")[0])[2] == ids(chain[0])[1]


def test_times_are_the_pagers_own(rig: Rig) -> None:
    record = a_record(RecordKind.SCAN)
    rig.traces.note(rig.vm, [record])
    with rig.traces.reporting():
        pass
    span = rig.named("agent.scan")[0]
    assert span.start_time is not None and span.end_time is not None
    assert span.end_time - span.start_time == record.end_ns - record.start_ns
    assert abs(span.end_time - time.time_ns()) < 10**9


def test_all_vms_newest_scans_are_under_one_root_and_told_once(rig: Rig) -> None:
    other = as_managed(a_vm(2))
    rig.traces.note(rig.vm, [a_record(RecordKind.SCAN, 1), a_record(RecordKind.SCAN, 2)])
    rig.traces.note(other, [a_record(RecordKind.SCAN, 1)])
    with rig.traces.reporting() as traceparent:
        assert traceparent
    with rig.traces.reporting() as traceparent:
        assert traceparent == ""
    assert len(rig.named("agent.scan")) == 1 and len(rig.named("agent.scan.vm")) == 2
    assert len(rig.named("agent.report")) == 1


def test_bursts_of_one_budget_are_one_span_and_another_budgets_are_another(rig: Rig) -> None:
    rig.apply(1)
    rig.apply(2)
    bursts = [a_record(RecordKind.EVICT, n, generation=1 if n < 4 else 2, pages=n) for n in range(1, 6)]
    rig.traces.note(rig.vm, bursts)
    pages = [(span.attributes or {})["frostline.pages"] for span in rig.named("swap.evict")]
    assert pages == [6, 9]
    parents = [ids(span)[2] for span in rig.named("swap.evict")]
    assert parents == [ids(span)[1] for span in rig.named("budget.apply")]


def test_an_eviction_of_an_unknown_budget_has_no_span(rig: Rig) -> None:
    rig.traces.note(rig.vm, [a_record(RecordKind.EVICT, generation=99)])
    assert not rig.named("swap.evict")


def test_faults_are_traces_of_their_own_with_a_link_and_a_limit(rig: Rig) -> None:
    rig.apply(3)
    rig.traces.note(rig.vm, [a_record(RecordKind.FAULT, n, generation=3) for n in range(1, 50)])
    faults = rig.named("swap.fault")
    assert len(faults) == MAX_FAULT_SPANS
    apply = ids(rig.named("budget.apply")[0])
    assert all(ids(span)[0] != apply[0] and span.parent is None for span in faults)
    assert all([link.context.span_id for link in span.links] == [apply[1]] for span in faults)


def test_what_is_remembered_is_bounded(rig: Rig) -> None:
    for version in range(1, MAX_REMEMBERED_SETS + 10):
        rig.apply(version)
    rig.traces.note(rig.vm, [a_record(RecordKind.EVICT, generation=1)])
    assert not rig.named("swap.evict")
    many = [a_record(RecordKind.EVICT, n, generation=20 + n % 2) for n in range(1, 200)]
    rig.traces.note(rig.vm, many)
    assert len(rig.named("swap.evict")) == MAX_EVICT_SPANS


def test_a_traceparent_that_is_none_starts_a_new_trace(rig: Rig) -> None:
    rig.apply(1, "garbage")
    assert rig.named("budget.apply")[0].parent is None
