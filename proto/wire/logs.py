# SPDX-License-Identifier: Apache-2.0
"""Structured logs on stderr: JSON for machines, coloured lines for people, one set-up for both daemons.

Whatever logs through the standard library (grpc, redis, OpenTelemetry) comes out in the same shape. Every value is
bounded, so that no guest's command line or peer's message can fill a disk with one line.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final, Literal, TextIO

import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["json", "console", "auto"]

LEVELS: Final = ("debug", "info", "warning", "error")
MAX_TEXT: Final = 4096
MAX_TRACEBACK: Final = 16384
_MAX_ITEMS: Final = 64
_MAX_DEPTH: Final = 4


def configure_logs(format: LogFormat = "auto", level: str = "info", *, stream: TextIO | None = None) -> None:
    """Route structlog and the standard library to `stream` (stderr when None). May be called again to change both.

    `auto` is `console` on a terminal and `json` elsewhere. Raises ValueError for an unknown format or level.
    """
    if format not in ("json", "console", "auto"):
        raise ValueError(f"unknown log format {format!r}; known are json, console and auto")
    if level.lower() not in LEVELS:
        raise ValueError(f"unknown log level {level!r}; known are {', '.join(LEVELS)}")
    out = stream if stream is not None else sys.stderr
    on_terminal = out.isatty()
    if format == "auto":
        format = "console" if on_terminal else "json"

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace,
    ]
    last: list[Processor]
    if format == "json":
        last = [
            structlog.processors.format_exc_info,
            _bound_values,
            _lead_with_the_usual,
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ]
    else:
        last = [
            _bound_values,
            structlog.dev.ConsoleRenderer(
                colors=on_terminal,
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    # A daemon must not die, nor print a second traceback, because its log's reader went away.
    logging.raiseExceptions = False
    logging.captureWarnings(True)

    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        # Cached loggers would keep what an earlier call configured.
        cache_logger_on_first_use=False,
    )


def _add_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
        event["span_id"] = f"{context.span_id:016x}"
    return event


def _lead_with_the_usual(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    # Whoever reads JSON lines by eye looks for these first.
    first = {key: event.pop(key) for key in ("timestamp", "level", "logger", "event") if key in event}
    return {**first, **event}


def _bound_values(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {
        key: _bounded(value, MAX_TRACEBACK if key == "exception" else MAX_TEXT, _MAX_DEPTH)
        if key != "exc_info"
        else value
        for key, value in list(event.items())[:_MAX_ITEMS]
    }


def _bounded(value: Any, limit: int, depth: int) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value if len(value) <= limit else f"{value[:limit]}... ({len(value) - limit} more characters)"
    if isinstance(value, dict) and depth > 0:
        return {
            _bounded(str(key), limit, 0): _bounded(item, limit, depth - 1)
            for key, item in list(value.items())[:_MAX_ITEMS]
        }
    if isinstance(value, (list, tuple, set, frozenset)) and depth > 0:
        items = [_bounded(item, limit, depth - 1) for item in list(value)[:_MAX_ITEMS]]
        return [*items, f"({len(value) - _MAX_ITEMS} more)"] if len(value) > _MAX_ITEMS else items
    if isinstance(value, (bytes, bytearray)):
        return _bounded(bytes(value[:limit]).hex(), limit, 0)
    return _bounded(str(value), limit, 0)
