# SPDX-License-Identifier: Apache-2.0
"""Budget sets to one host: decide, send when it matters, one in flight, and what the agent made of it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import structlog
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)

from frostline.controller.fleet.deciding import Decider
from frostline.controller.fleet.records import HostRecord
from frostline.controller.session.budgets import Sent, needs_push, to_budget, to_sent
from frostline.controller.session.validate import MAX_EPOCH, MAX_VERSION, clean_detail
from frostline.v1 import common_pb2 as pb
from frostline.v1 import operator_pb2 as op
from frostline.v1 import session_pb2 as wire
from frostline.wire.telemetry import context_from, traceparent_of

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Flight:
    """A set that was sent and not answered yet."""

    nonce: bytes
    version: int
    sent_at: float
    span: Span
    sent: dict[str, Sent]


@dataclass(slots=True)
class Pusher:
    """The budget side of one session. `next_set` says what to send now, `result` takes the answer."""

    host: HostRecord
    decider: Decider
    lease_seconds: float
    ack_seconds: float
    flight: _Flight | None = None
    _last: dict[str, Sent] | None = None
    _last_at: float = 0.0
    _last_epoch: int = 0
    _decided_at: float = float("-inf")
    _seen_report: SpanContext | None = field(default=None)

    def next_set(self, now: float, epoch: int, *, may_send: bool, woken: bool) -> wire.BudgetSet | None:
        """Decide for the host; the set to send now, or None. Without an epoch nothing is sent, only decided.

        While a set is in flight nothing is decided either: what changes meanwhile is merged into the next one.
        Without a reason to decide (`woken`), only time can change anything: reports get stale, leases run down.
        """
        renew_seconds = self.lease_seconds / 3
        due = self._last is None or now - self._last_at >= renew_seconds or self._last_epoch != epoch
        waited = now - self._decided_at >= min(renew_seconds, self.decider.fleet.report_seconds)
        if self.flight is not None or not (woken or due or waited):
            return None
        self._decided_at = now
        report, self.host.report_traceparent = self.host.report_traceparent, ""
        span = self._start_decide(report)
        try:
            decisions = self.decider.decide_host(self.host, now)
            budgets = [to_budget(vm_id, decision) for vm_id, decision in decisions.items()]
            sent = {budget.vm_id: to_sent(budget) for budget in budgets}
            memory = {vm_id: vm.identity.memory_bytes for vm_id, vm in self.host.vms.items()}
            if not may_send or epoch == 0:
                return None
            if not due and not needs_push(self._last, sent, memory):
                return None
            if span is None:
                span = self._start_decide(report, always=True)
            return self._launch(now, epoch, budgets, sent, span)
        finally:
            if span is not None:
                span.set_attribute("frostline.node_id", self.host.node_id)
                span.set_attribute("frostline.vms", len(self.host.vms))
                span.end()

    def overdue(self, now: float) -> bool:
        """Whether the agent has had its time to answer."""
        return self.flight is not None and now - self.flight.sent_at > self.ack_seconds

    def result(self, result: wire.BudgetResult, now: float) -> int:
        """Take an answer. Returns an epoch that ours must be raised above, or 0."""
        flight = self.flight
        if flight is None or result.nonce != flight.nonce or result.version != flight.version:
            self.decider.metrics.count("pushes", result="unexpected")
            _log.info("budget result ignored", node_id=self.host.node_id, version=result.version, why="not in flight")
            return 0
        self.flight = None
        self.decider.metrics.record("push.duration", now - flight.sent_at)
        self.decider.metrics.count("pushes", result="applied" if result.applied else "refused")
        self._take_vm_results(result, flight)
        if result.applied:
            self.host.version_applied = flight.version
        else:
            words = clean_detail(result.detail) or pb.Reason.Name(result.reason)
            flight.span.set_status(Status(StatusCode.ERROR, words))
            _log.warning(
                "budget set refused",
                node_id=self.host.node_id,
                version=flight.version,
                reason=words,
                epoch=result.epoch,
            )
            # Not in force there, so the next set must not be held back for being the same.
            self._last = None
        flight.span.end()
        self.decider.fleet.touch(self.host)
        return result.epoch if self._last_epoch < result.epoch <= MAX_EPOCH else 0

    def end(self, why: str) -> None:
        """The session is over; what is in flight is not answered any more."""
        if self.flight is not None:
            self.flight.span.set_status(Status(StatusCode.ERROR, why))
            self.flight.span.end()
            self.flight = None

    def _start_decide(self, report: str, always: bool = False) -> Span | None:
        """A span for decisions that a report caused, as its child; else only for those that send something."""
        parent = context_from(report)
        if report:
            context = get_current_span(parent).get_span_context()
            self._seen_report = context if context.is_valid else None
            return self.decider.tracer.start_span("controller.decide", context=parent)
        if not always:
            return None
        links = [Link(self._seen_report)] if self._seen_report is not None else []
        return self.decider.tracer.start_span("controller.decide", context=Context(), links=links)

    def _launch(
        self, now: float, epoch: int, budgets: list[wire.Budget], sent: dict[str, Sent], parent: Span | None
    ) -> wire.BudgetSet:
        version = min(self.host.version_desired, MAX_VERSION) + 1
        span = self.decider.tracer.start_span(
            "budget.push",
            context=set_span_in_context(parent, Context()) if parent is not None else Context(),
            kind=SpanKind.PRODUCER,
            attributes={
                "frostline.node_id": self.host.node_id,
                "frostline.budget.version": version,
                "frostline.epoch": epoch,
                "frostline.budget.bytes": sum(budget.bytes for budget in budgets),
            },
        )
        self.flight = _Flight(os.urandom(16), version, now, span, sent)
        self._last, self._last_at, self._last_epoch = sent, now, epoch
        self.host.version_desired, self.host.epoch = version, epoch
        for vm_id in sent:
            self.host.vms[vm_id].pushed_version = version
        self.decider.fleet.touch(self.host)
        self.decider.remember_push(self.host, budgets, version, epoch)
        return wire.BudgetSet(
            epoch=epoch,
            version=version,
            nonce=self.flight.nonce,
            lease_seconds=self.lease_seconds,
            budgets=budgets,
            traceparent=traceparent_of(span),
            issued_at_unix_ns=time.time_ns(),
        )

    def _take_vm_results(self, result: wire.BudgetResult, flight: _Flight) -> None:
        answered = {vm.vm_id: vm for vm in result.vms[: len(flight.sent) + 1]}
        for vm_id in flight.sent:
            record = self.host.vms.get(vm_id)
            if record is None:
                continue
            said = answered.get(vm_id)
            accepted = result.applied and (said is None or said.accepted)
            reason = said.reason if said is not None else result.reason
            detail = clean_detail(said.detail if said is not None and said.detail else result.detail)
            record.ack = op.VmAck(
                accepted=accepted,
                reason=reason,
                detail=detail,
                effective_bytes=min(said.effective_bytes, record.identity.memory_bytes) if said is not None else 0,
                version=flight.version,
            )
            self.decider.fleet.touch(record)
            if not accepted:
                self.decider.metrics.count("nacks", reason=_reason_name(reason))
                _log.warning(
                    "budget not taken",
                    node_id=self.host.node_id,
                    vm=self.host.vm_label(vm_id),
                    version=flight.version,
                    reason=_reason_name(reason),
                    detail=detail,
                )


def _reason_name(reason: int) -> str:
    try:
        return pb.Reason.Name(pb.Reason.ValueType(reason)).removeprefix("REASON_").lower()
    except ValueError:
        return "unknown"
