# SPDX-License-Identifier: Apache-2.0
"""Logs: one shape whoever logs, bounded, and readable by machines or by people."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider

from frostline.wire.logs import MAX_TEXT, configure_logs


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_both_kinds_of_logger_come_out_as_json_lines() -> None:
    out = io.StringIO()
    configure_logs("json", "info", stream=out)
    structlog.get_logger("frostline.x").info("decided", vm="vm-1", budget_bytes=2**30)
    logging.getLogger("grpc").warning("lost %s", "peer", extra={"attempt": 3})
    ours, theirs = _lines(out)
    assert ours["event"] == "decided"
    assert (ours["vm"], ours["budget_bytes"], ours["level"], ours["logger"]) == ("vm-1", 2**30, "info", "frostline.x")
    assert (theirs["event"], theirs["attempt"], theirs["level"]) == ("lost peer", 3, "warning")
    at = datetime.fromisoformat(ours["timestamp"])
    assert at.tzinfo is not None
    assert abs(datetime.now(UTC) - at) < timedelta(seconds=10)


def test_the_level_holds_for_both() -> None:
    out = io.StringIO()
    configure_logs("json", "warning", stream=out)
    structlog.get_logger("a").info("quiet")
    logging.getLogger("b").info("quiet")
    structlog.get_logger("a").warning("loud")
    assert [line["event"] for line in _lines(out)] == ["loud"]


def test_values_are_bounded_wherever_they_hide() -> None:
    out = io.StringIO()
    configure_logs("json", "info", stream=out)
    huge = "x" * 10**6
    deep: dict[str, Any] = {"a": {"b": {"c": {"d": {"e": {"f": huge}}}}}}
    structlog.get_logger("a").info("e", text=huge, items=[huge] * 1000, raw=huge.encode(), deep=deep)
    line = out.getvalue()
    assert len(line) < 100 * MAX_TEXT
    parsed = json.loads(line)
    assert parsed["text"].endswith(f"... ({10**6 - MAX_TEXT} more characters)")
    assert parsed["items"][-1] == "(936 more)"


def test_an_exception_is_one_line_of_json_with_its_traceback() -> None:
    out = io.StringIO()
    configure_logs("json", "info", stream=out)
    try:
        raise ValueError("budget above memory")
    except ValueError:
        structlog.get_logger("a").exception("refused", vm="vm-1")
    (line,) = _lines(out)
    assert "ValueError: budget above memory" in line["exception"]


def test_people_get_colours_on_a_terminal_only() -> None:
    terminal, pipe = _Terminal(), io.StringIO()
    configure_logs("auto", "info", stream=terminal)
    structlog.get_logger("a").info("hello", vm="vm-1")
    configure_logs("console", "info", stream=pipe)
    structlog.get_logger("a").info("hello", vm="vm-1")
    assert "\x1b[" in terminal.getvalue()
    assert "\x1b[" not in pipe.getvalue()
    assert "vm=vm-1" in pipe.getvalue()


def test_auto_is_json_where_nobody_watches() -> None:
    out = io.StringIO()
    configure_logs("auto", "info", stream=out)
    structlog.get_logger("a").info("hello")
    assert _lines(out)[0]["event"] == "hello"


def test_lines_inside_a_span_carry_its_ids() -> None:
    out = io.StringIO()
    configure_logs("json", "info", stream=out)
    provider = TracerProvider(shutdown_on_exit=False)
    with provider.get_tracer("t").start_as_current_span("s") as span:
        structlog.get_logger("a").info("inside")
    structlog.get_logger("a").info("outside")
    inside, outside = _lines(out)
    assert inside["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert "trace_id" not in outside


def test_a_reader_that_went_away_kills_nobody() -> None:
    out = io.StringIO()
    configure_logs("json", "info", stream=out)
    out.close()
    structlog.get_logger("a").info("nobody reads this")


@pytest.mark.parametrize(("format", "level"), [("xml", "info"), ("json", "loud")])
def test_unknown_settings_are_refused(format: Any, level: str) -> None:
    with pytest.raises(ValueError, match="known are"):
        configure_logs(format, level)
