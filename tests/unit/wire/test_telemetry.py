# SPDX-License-Identifier: Apache-2.0
"""Telemetry: one trace over two processes' worth of providers, real OTLP, and nothing that can hold up an exit."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace

from frostline.wire import telemetry
from frostline.wire.channels import AddressError
from frostline.wire.telemetry import Telemetry, configure, context_from, record_span, traceparent_of
from tests.system.otlp_receiver import OtlpReceiver


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as made:
        yield made


@pytest.fixture
def agent(receiver: OtlpReceiver) -> Iterator[Telemetry]:
    made = configure("agent", otlp_endpoint=receiver.endpoint, install_global=False)
    yield made
    made.shutdown(2)


@pytest.fixture
def controller(receiver: OtlpReceiver) -> Iterator[Telemetry]:
    made = configure("controller", otlp_endpoint=f"http://{receiver.endpoint}", install_global=False)
    yield made
    made.shutdown(2)


def test_one_trace_crosses_both_services(receiver: OtlpReceiver, agent: Telemetry, controller: Telemetry) -> None:
    tracer = agent.tracer("a")
    with tracer.start_as_current_span("agent.scan"), tracer.start_as_current_span("agent.report") as report:
        wire = traceparent_of()
        assert wire == traceparent_of(report) == traceparent_of(report.get_span_context())
    with controller.tracer("c").start_as_current_span("controller.decide", context=context_from(wire)):
        pushed = traceparent_of()
    now_ns = time.time_ns()
    record_span(
        agent.tracer("a"),
        "swap.evict",
        start_ns=now_ns - 5_000_000,
        end_ns=now_ns,
        parent=context_from(pushed),
        attributes={"frostline.pages": 7},
    )
    assert agent.flush(5)
    assert controller.flush(5)
    got = receiver.wait_for_trace("agent.scan", "agent.report", "controller.decide", "swap.evict", limit_seconds=10)
    assert len(receiver.traces()) == 1
    assert [span.name for span in got.roots()] == ["agent.scan"]
    assert not got.orphans()
    (evict,) = got.named("swap.evict")
    assert (evict.start_ns, evict.end_ns) == (now_ns - 5_000_000, now_ns)
    assert evict.attributes["frostline.pages"] == 7
    assert {span.name: span.service for span in got}["controller.decide"] == "controller"
    assert got.ancestry(evict) == ["agent.scan", "agent.report", "controller.decide", "swap.evict"]


def test_the_receiver_does_not_take_siblings_for_a_chain(receiver: OtlpReceiver, agent: Telemetry) -> None:
    tracer = agent.tracer("a")
    with tracer.start_as_current_span("root"):
        tracer.start_span("one").end()
        tracer.start_span("two").end()
    agent.flush(5)
    (got,) = receiver.wait_for(lambda r: r.traces_with("root", "one", "two"), 10)
    assert got.chains("root", "one") and got.chains("root", "two")
    assert not got.chains("one", "two")
    with pytest.raises(TimeoutError, match="1 x root"):
        receiver.wait_for_trace("one", "two", limit_seconds=0.2)


def test_the_receiver_names_a_parent_that_never_came(receiver: OtlpReceiver, agent: Telemetry) -> None:
    tracer = agent.tracer("a")
    unfinished = tracer.start_span("never.ended")
    tracer.start_span("child", context=trace.set_span_in_context(unfinished)).end()
    agent.flush(5)
    (got,) = receiver.wait_for(lambda r: r.traces_with("child"), 10)
    assert [span.name for span in got.orphans()] == ["child"]
    assert "(parent missing)" in got.tree()


def test_recorded_spans_are_roots_unless_told_otherwise_and_never_negative(
    receiver: OtlpReceiver, agent: Telemetry
) -> None:
    tracer = agent.tracer("a")
    with tracer.start_as_current_span("current") as current:
        record_span(tracer, "root", start_ns=10**18, end_ns=10**18 - 5, links=[current.get_span_context()], error="no")
    agent.flush(5)
    receiver.wait_for(lambda r: len(r.spans) == 2, 10)
    (root,) = [span for span in receiver.spans if span.name == "root"]
    assert (root.parent_id, root.duration_ns, root.ok) == ("", 0, False)
    assert root.links == (f"{current.get_span_context().trace_id:032x}:{current.get_span_context().span_id:016x}",)


@given(st.one_of(st.text(max_size=80), st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.*")))
def test_any_peers_traceparent_is_a_context_or_an_empty_one(text: str) -> None:
    context = context_from(text)
    again = traceparent_of(context)
    assert again == "" or again[3:52] == text.strip()[3:52]


@pytest.mark.parametrize("text", ["", "00", f"00-{'0' * 32}-{'1' * 16}-01", f"ff-{'1' * 32}-{'1' * 16}-01", "00-" * 99])
def test_garbage_gives_an_empty_context(text: str) -> None:
    assert traceparent_of(context_from(text)) == ""


def _deaf_port() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)
    return listener


def test_a_dead_or_deaf_collector_costs_no_more_than_the_limit() -> None:
    with _deaf_port() as deaf:
        dead = _deaf_port()
        dead_port = dead.getsockname()[1]
        dead.close()
        for port in (deaf.getsockname()[1], dead_port):
            made = configure("agent", otlp_endpoint=f"127.0.0.1:{port}", install_global=False)
            for _ in range(3 * telemetry.MAX_QUEUED_SPANS):
                made.tracer("a").start_span("s").end()
            started = time.monotonic()
            assert made.shutdown(0.5) is False
            assert time.monotonic() - started < 1.5


def test_a_process_with_a_deaf_collector_ends_in_time() -> None:
    with _deaf_port() as deaf:
        script = (
            "from frostline.wire.telemetry import configure\n"
            f"t = configure('agent', otlp_endpoint='127.0.0.1:{deaf.getsockname()[1]}')\n"
            "t.tracer('a').start_span('s').end()\n"
            "import time; started = time.monotonic(); t.shutdown(0.5)\n"
            "assert time.monotonic() - started < 1.5\n"
        )
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
        # Without the bound this takes the SDK's 30 s.
        assert time.monotonic() - started < 10


def test_spans_as_lines_for_people() -> None:
    out = io.StringIO()
    made = configure("agent", console=True, console_stream=out, install_global=False)
    with made.tracer("a").start_as_current_span("agent.scan", attributes={"frostline.vm.id": "vm-1"}) as parent:
        made.tracer("a").start_span("agent.report").end()
    assert made.shutdown(5)
    report, scan = sorted(out.getvalue().splitlines(), key=lambda line: "agent.scan" in line)
    assert " span agent.scan " in scan and " ms " in scan and "frostline.vm.id=vm-1" in scan
    assert f"parent={parent.get_span_context().span_id:016x}" in report


def test_metrics_are_served_on_the_port_that_zero_became() -> None:
    made = configure("agent", metrics_listen="127.0.0.1:0", install_global=False)
    try:
        assert made.metrics_address is not None and not made.metrics_address.endswith(":0")
        made.meter("m").create_counter("frostline.faults", unit="{fault}").add(3, {"frostline.vm.id": "vm-1"})
        with urllib.request.urlopen(f"http://{made.metrics_address}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        assert 'frostline_faults_total{frostline_vm_id="vm-1"} 3.0' in text
        assert 'service_name="agent"' in text
        assert "process_resident_memory_bytes" in text
        with pytest.raises(OSError, match="choose another port"):
            configure("other", metrics_listen=made.metrics_address, install_global=False)
    finally:
        made.shutdown(2)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{made.metrics_address}/metrics", timeout=2)


def test_spans_do_not_leave_the_host_in_plain_text() -> None:
    with pytest.raises(AddressError, match="plain text"):
        configure("agent", otlp_endpoint="192.0.2.9:4317", install_global=False)
    with pytest.raises(AddressError, match="scheme"):
        configure("agent", otlp_endpoint="ftp://127.0.0.1:4317", install_global=False)
