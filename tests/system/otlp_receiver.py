# SPDX-License-Identifier: Apache-2.0
"""An OTLP gRPC trace receiver that keeps what it gets, for tests and the demo.

It is a real endpoint of the OTLP trace service: whoever exports to it cannot tell it from a collector.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

# More than any test makes; a runaway exporter must not take the test's memory with it.
MAX_SPANS: Final = 200_000


@dataclass(frozen=True)
class ReceivedSpan:
    """One span as it arrived. Ids are lower-case hex; `parent_id` is "" for the root of a trace."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    ok: bool
    attributes: dict[str, Any] = field(hash=False)
    links: tuple[str, ...] = ()  # trace_id:span_id each

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


class Trace:
    """The spans of one trace id."""

    def __init__(self, trace_id: str, spans: Sequence[ReceivedSpan]) -> None:
        self.trace_id = trace_id
        self.spans = sorted(spans, key=lambda span: (span.start_ns, span.end_ns))
        self._by_id = {span.span_id: span for span in self.spans}

    def __iter__(self) -> Iterator[ReceivedSpan]:
        return iter(self.spans)

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def names(self) -> set[str]:
        return {span.name for span in self.spans}

    def named(self, name: str) -> list[ReceivedSpan]:
        return [span for span in self.spans if span.name == name]

    def parent(self, span: ReceivedSpan) -> ReceivedSpan | None:
        return self._by_id.get(span.parent_id)

    def roots(self) -> list[ReceivedSpan]:
        return [span for span in self.spans if not span.parent_id]

    def orphans(self) -> list[ReceivedSpan]:
        """Spans that name a parent that never arrived."""
        return [span for span in self.spans if span.parent_id and span.parent_id not in self._by_id]

    def ancestry(self, span: ReceivedSpan) -> list[str]:
        """Names from the root down to this span; ends early at a parent that never arrived."""
        names: list[str] = []
        seen: set[str] = set()
        at: ReceivedSpan | None = span
        while at is not None and at.span_id not in seen:
            seen.add(at.span_id)
            names.append(at.name)
            at = self.parent(at)
        return names[::-1]

    def chains(self, *names: str) -> list[list[ReceivedSpan]]:
        """Every path on which spans with these names follow one another, with others allowed in between."""
        found: list[list[ReceivedSpan]] = []
        for last in self.named(names[-1]):
            path = [last]
            at: ReceivedSpan | None = last
            wanted = list(names[:-1])
            seen = {last.span_id}
            while wanted and at is not None:
                at = self.parent(at)
                if at is None or at.span_id in seen:
                    break
                seen.add(at.span_id)
                if at.name == wanted[-1]:
                    wanted.pop()
                    path.append(at)
            if not wanted:
                found.append(path[::-1])
        return found

    def tree(self) -> str:
        """The trace as indented text, for failure messages and people."""
        children: dict[str, list[ReceivedSpan]] = {}
        for span in self.spans:
            children.setdefault(span.parent_id if span.parent_id in self._by_id else "", []).append(span)
        lines = [f"trace {self.trace_id}"]

        def walk(parent_id: str, depth: int) -> None:
            for span in children.get(parent_id, []):
                note = " (parent missing)" if span.parent_id and depth == 1 else ""
                lines.append(f"{'  ' * depth}{span.name} [{span.service}] {span.duration_ns / 1e6:.3f} ms{note}")
                if depth < 64:
                    walk(span.span_id, depth + 1)

        walk("", 1)
        return "\n".join(lines)


class OtlpReceiver:
    """`with OtlpReceiver() as receiver:` listens on a port of loopback; `endpoint` is what exporters are given."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._arrived = threading.Condition()
        self._spans: dict[tuple[str, str], ReceivedSpan] = {}
        self.export_calls = 0
        self.dropped = 0
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=4, thread_name_prefix="otlp-receiver"),
            options=[("grpc.max_receive_message_length", 16 * 2**20), ("grpc.so_reuseport", 0)],
        )
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]
            _Servicer(self), self._server
        )
        self.port: int = self._server.add_insecure_port(f"{host}:0")
        self.endpoint = f"{host}:{self.port}"

    def __enter__(self) -> OtlpReceiver:
        self._server.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> OtlpReceiver:
        return self.__enter__()

    def stop(self) -> None:
        self._server.stop(grace=0.5).wait(5)

    @property
    def spans(self) -> list[ReceivedSpan]:
        with self._arrived:
            return list(self._spans.values())

    def traces(self) -> list[Trace]:
        """What has arrived, by trace id, in order of first start."""
        by_trace: dict[str, list[ReceivedSpan]] = {}
        for span in self.spans:
            by_trace.setdefault(span.trace_id, []).append(span)
        return sorted(
            (Trace(trace_id, spans) for trace_id, spans in by_trace.items()), key=lambda t: t.spans[0].start_ns
        )

    def traces_with(self, *names: str) -> list[Trace]:
        return [trace for trace in self.traces() if set(names) <= trace.names]

    def wait_for(self, ready: Callable[[OtlpReceiver], Any], limit_seconds: float) -> Any:
        """Wait until `ready(self)` is true and return what it gave; TimeoutError says what had arrived instead."""
        deadline = time.monotonic() + limit_seconds
        while True:
            with self._arrived:
                seen = len(self._spans)
            result = ready(self)
            if result:
                return result
            with self._arrived:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"not seen within {limit_seconds} s; arrived so far:\n{self.describe()}")
                if len(self._spans) == seen:
                    self._arrived.wait(min(left, 1.0))

    def wait_for_trace(self, *names: str, limit_seconds: float = 30.0) -> Trace:
        """The first trace in which a chain of spans with these names, each below the one before, is complete."""

        def complete(receiver: OtlpReceiver) -> Trace | None:
            return next((trace for trace in receiver.traces_with(*names) if trace.chains(*names)), None)

        trace = self.wait_for(complete, limit_seconds)
        assert isinstance(trace, Trace)
        return trace

    def describe(self, limit: int = 10) -> str:
        traces = self.traces()
        counts: dict[str, int] = {}
        for span in self.spans:
            counts[span.name] = counts.get(span.name, 0) + 1
        head = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) or "nothing"
        return "\n".join([f"{head} in {len(traces)} traces", *(trace.tree() for trace in traces[-limit:])])

    def _take(self, request: trace_service_pb2.ExportTraceServiceRequest) -> int:
        taken = list(_spans_of(request))
        with self._arrived:
            self.export_calls += 1
            dropped = 0
            for span in taken:
                if len(self._spans) >= MAX_SPANS:
                    dropped += 1
                    continue
                # An exporter that retried sends spans twice; they are still one span each.
                self._spans[(span.trace_id, span.span_id)] = span
            self.dropped += dropped
            self._arrived.notify_all()
        return dropped


class _Servicer(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(  # noqa: N802, the name is the protocol's
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        dropped = self._receiver._take(request)
        answer = trace_service_pb2.ExportTraceServiceResponse()
        if dropped:
            answer.partial_success.rejected_spans = dropped
            answer.partial_success.error_message = f"the receiver keeps at most {MAX_SPANS} spans"
        return answer


def _spans_of(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for resource_spans in request.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        service = str(resource.get("service.name", ""))
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield ReceivedSpan(
                    name=span.name,
                    service=service,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    ok=span.status.code != trace_pb2.Status.STATUS_CODE_ERROR,
                    attributes=_attributes(span.attributes),
                    links=tuple(f"{link.trace_id.hex()}:{link.span_id.hex()}" for link in span.links),
                )


def _attributes(pairs: Sequence[common_pb2.KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return getattr(value, kind)
