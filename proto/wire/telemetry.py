# SPDX-License-Identifier: Apache-2.0
"""Traces and metrics for both daemons, and W3C trace context between them.

Telemetry is never worth a stall: queues are bounded and drop, exports have a deadline, and a collector that is dead
or deaf cannot hold up the end of the process.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TextIO
from wsgiref.simple_server import WSGIServer

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from frostline.wire.channels import Address, AddressError, parse_address

# 2048 spans of about 1 KiB: the most that telemetry may hold while the collector is away.
MAX_QUEUED_SPANS: Final = 2048
MAX_BATCH_SPANS: Final = 256
BATCH_DELAY_SECONDS: Final = 1.0
EXPORT_TIMEOUT_SECONDS: Final = 5.0
SHUTDOWN_LIMIT_SECONDS: Final = 3.0

_PROPAGATOR: Final = TraceContextTextMapPropagator()
_log = logging.getLogger(__name__)


@dataclass
class Telemetry:
    """What `configure` set up. `metrics_address` is where Prometheus can scrape, with the real port."""

    tracer_provider: TracerProvider
    meter_provider: MeterProvider
    metrics_address: str | None = None
    _metrics_server: WSGIServer | None = field(default=None, repr=False)
    _ended: bool = field(default=False, repr=False)

    def tracer(self, name: str) -> Tracer:
        return self.tracer_provider.get_tracer(name)

    def meter(self, name: str) -> metrics.Meter:
        return self.meter_provider.get_meter(name)

    def flush(self, limit_seconds: float = SHUTDOWN_LIMIT_SECONDS) -> bool:
        """Export what is queued now. False when that was not done within the limit. Blocks: not for an event loop."""
        return _within(limit_seconds, lambda: self.tracer_provider.force_flush(int(limit_seconds * 1000)))

    def shutdown(self, limit_seconds: float = SHUTDOWN_LIMIT_SECONDS) -> bool:
        """Export what is queued, then end. Returns within the limit whatever the collector does; False when spans
        may have been lost for that. Blocks: from an event loop, call it through `asyncio.to_thread`."""
        if self._ended:
            return True
        self._ended = True
        deadline = time.monotonic() + limit_seconds
        if self._metrics_server is not None:
            server = self._metrics_server
            _within(1.0, server.shutdown)
            server.server_close()
        done = _within(max(0.0, deadline - time.monotonic()), self.tracer_provider.shutdown)
        if not done:
            _log.warning("gave up sending the last spans after %.1f s; the collector did not take them", limit_seconds)
        self.meter_provider.shutdown(timeout_millis=500)
        return done


def configure(
    service_name: str,
    *,
    otlp_endpoint: str | None = None,
    console: bool = False,
    metrics_listen: str | None = None,
    resource: Mapping[str, str | int | float | bool] | None = None,
    insecure_off_loopback: bool = False,
    console_stream: TextIO | None = None,
    install_global: bool = True,
) -> Telemetry:
    """Set up tracing and metrics for this process.

    otlp_endpoint: `host:port` or `http://host:port` of an OTLP gRPC receiver; plain text is for loopback only, unless
        `insecure_off_loopback` says otherwise (`https://host:port` uses the system's roots).
    console: also write each finished span as one line to stderr (or `console_stream`).
    metrics_listen: `host:port` for Prometheus, port 0 for any; the real address is in `metrics_address`.
    install_global: make these the process's default providers, if there are none yet.

    Raises AddressError for an address that is none, OSError when metrics_listen cannot be bound.
    """
    attributes: dict[str, str | int | float | bool] = {"service.name": service_name, "service.version": _version()}
    attributes.update(resource or {})
    described = Resource.create(attributes)

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    reader = PrometheusMetricReader(registry=registry, scope_info_enabled=False)
    meter_provider = MeterProvider(metric_readers=[reader], resource=described, shutdown_on_exit=False)
    tracer_provider = TracerProvider(
        resource=described,
        shutdown_on_exit=False,  # its own exit hook waits 30 s for a deaf collector
        span_limits=SpanLimits(max_attributes=64, max_events=32, max_links=64, max_span_attribute_length=1024),
        meter_provider=meter_provider,
    )
    exporters: list[SpanExporter] = []
    if otlp_endpoint:
        exporters.append(_otlp_exporter(otlp_endpoint, insecure_off_loopback, meter_provider))
    if console:
        exporters.append(LineSpanExporter(console_stream))
    for exporter in exporters:
        tracer_provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=MAX_QUEUED_SPANS,
                max_export_batch_size=MAX_BATCH_SPANS,
                schedule_delay_millis=BATCH_DELAY_SECONDS * 1000,
                meter_provider=meter_provider,
            )
        )
    telemetry = Telemetry(tracer_provider, meter_provider)
    if metrics_listen:
        server, address = _serve_metrics(metrics_listen, registry)
        telemetry._metrics_server, telemetry.metrics_address = server, str(address)
    if install_global:
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            trace.set_tracer_provider(tracer_provider)
            metrics.set_meter_provider(meter_provider)
        else:
            _log.debug("tracing is already set up in this process; %s keeps its own providers", service_name)
    return telemetry


def traceparent_of(of: Span | SpanContext | Context | None = None) -> str:
    """The W3C traceparent of a span, a span context, a context, or (None) of what is current; "" when there is none."""
    if of is None or isinstance(of, Context):
        span_context = trace.get_current_span(of).get_span_context()
    elif isinstance(of, Span):
        span_context = of.get_span_context()
    else:
        span_context = of
    if not span_context.is_valid:
        return ""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(NonRecordingSpan(span_context), Context()))
    return carrier.get("traceparent", "")


def context_from(traceparent: str) -> Context:
    """A context whose current span is the remote one named by a W3C traceparent.

    Peers can send anything: what is not a traceparent gives an empty context (a new trace), never an error.
    """
    if not isinstance(traceparent, str) or not 55 <= len(traceparent) <= 256:
        return Context()
    try:
        return _PROPAGATOR.extract({"traceparent": traceparent}, context=Context())
    except Exception:  # whatever a library makes of a peer's garbage must not end a session
        return Context()


def record_span(
    tracer: Tracer,
    name: str,
    *,
    start_ns: int,
    end_ns: int,
    parent: Context | Span | SpanContext | None = None,
    attributes: Attributes = None,
    links: Sequence[SpanContext] = (),
    kind: SpanKind = SpanKind.INTERNAL,
    error: str | None = None,
) -> SpanContext:
    """Record a span for work that is already over: the pager's, told by its own times (Unix ns).

    An end before the start (a clock that was set back) is shown as an empty span at the start. `parent` None makes it
    the root of a new trace, whatever is current. Returns its span context, for children and traceparent_of.
    """
    span = tracer.start_span(
        name,
        context=_parent_context(parent),
        kind=kind,
        attributes=attributes,
        links=[Link(link) for link in links],
        start_time=start_ns,
    )
    if error is not None:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(end_time=max(start_ns, end_ns))
    return span.get_span_context()


class LineSpanExporter(SpanExporter):
    """Finished spans as lines for people without a collector: when, how long, what, which trace, attributes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        stream = self._stream if self._stream is not None else sys.stderr
        try:
            stream.writelines(_span_line(span) for span in spans)
            stream.flush()
        except (OSError, ValueError):  # the terminal went away; the daemon stays
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def _span_line(span: ReadableSpan) -> str:
    start_ns, end_ns = span.start_time or 0, span.end_time or 0
    at = time.strftime("%H:%M:%S", time.gmtime(start_ns // 10**9)) + f".{start_ns // 10**6 % 1000:03d}Z"
    context = span.get_span_context()
    ids = f"trace={context.trace_id:032x} span={context.span_id:016x}" if context is not None else ""
    parent = f" parent={span.parent.span_id:016x}" if span.parent is not None else ""
    shown = "".join(f" {key}={value!s}" for key, value in (span.attributes or {}).items())
    failed = f" ERROR {span.status.description or ''}" if span.status.status_code is StatusCode.ERROR else ""
    return f"{at} span {span.name} {(end_ns - start_ns) / 1e6:.3f} ms {ids}{parent}{shown}{failed}\n"


def _parent_context(parent: Context | Span | SpanContext | None) -> Context:
    if parent is None:
        return Context()
    if isinstance(parent, Context):
        return parent
    span = parent if isinstance(parent, Span) else NonRecordingSpan(parent)
    return trace.set_span_in_context(span, Context())


def _otlp_exporter(endpoint: str, insecure_off_loopback: bool, meter_provider: MeterProvider) -> OTLPSpanExporter:
    scheme, slashes, rest = endpoint.partition("://")
    target, secure = (rest.rstrip("/"), scheme == "https") if slashes else (endpoint, False)
    if slashes and scheme not in ("http", "https"):
        raise AddressError(
            f"OTLP endpoint {endpoint!r}: unknown scheme {scheme!r}; write host:port or http://host:port"
        )
    address = parse_address(target)
    if not secure and not address.is_loopback and not insecure_off_loopback:
        raise AddressError(
            f"OTLP endpoint {endpoint!r} is not on this host and would be sent in plain text; "
            "run a collector on loopback, use https://, or allow it explicitly"
        )
    return OTLPSpanExporter(
        endpoint=address.target,
        insecure=not secure,
        timeout=EXPORT_TIMEOUT_SECONDS,
        meter_provider=meter_provider,
    )


def _serve_metrics(listen: str, registry: CollectorRegistry) -> tuple[WSGIServer, Address]:
    wanted = parse_address(listen)
    if wanted.path is not None:
        raise AddressError(f"metrics cannot listen on {listen!r}: Prometheus needs host:port")
    try:
        server, _thread = start_http_server(wanted.port, addr=wanted.host, registry=registry)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot listen for metrics on {listen}: {error.strerror}; choose another port, or 0 for any"
        ) from error
    server.timeout = 5
    return server, Address(host=wanted.host, port=server.server_port)


def _within(limit_seconds: float, work: Any) -> bool:
    """Run blocking work on a thread that the process need not wait for; True when it ended in time without error."""
    ended: list[bool] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            _log.warning("telemetry could not be ended cleanly: %s", error)
        else:
            ended.append(True)

    thread = threading.Thread(target=run, name="telemetry-end", daemon=True)
    thread.start()
    thread.join(limit_seconds)
    return bool(ended)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("frostline")
    except PackageNotFoundError:
        return "unknown"
