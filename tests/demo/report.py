# SPDX-License-Identifier: Apache-2.0
"""What the demo found: the report for programs, the table for people, and whether it counts as a success."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from frostline.controller.cli.screen import ASCII, UNICODE, Glyphs
from frostline.wire.units import format_size

LEAST_SAVED: Final = 0.5


@dataclass
class Report:
    """Figures of one run; None: the story did not come that far. Bytes, microseconds and milliseconds."""

    guest_rounds: int | None = None
    guest_errors: int | None = None
    guest_memory_bytes: int | None = None
    guest_checked_pages: int | None = None
    memfd_bytes_before: int | None = None
    memfd_bytes_after: int | None = None
    pool_bytes: int | None = None
    metadata_bytes: int | None = None
    evicted_pages: int | None = None
    evicted_zero_pages: int | None = None
    evicted_same_pages: int | None = None
    evicted_ram_pages: int | None = None
    faults: int | None = None
    fault_p50_us: float | None = None
    fault_p99_us: float | None = None
    attach_stop_us: float | None = None
    takeover_ms: float | None = None
    killed_at_bytes: int | None = None
    decisions: int | None = None
    trace_id: str | None = None
    trace_spans: int | None = None
    outlived_detach: bool = False
    excluded_lost_nothing: bool = False
    excluded_errors: int | None = None
    excluded_bytes: int | None = None
    seconds: float = 0.0
    accelerator: str = ""

    @property
    def saved_bytes(self) -> int | None:
        """Host RAM that the guest's touched memory no longer took, the compressed pool counted against it."""
        if self.memfd_bytes_before is None or self.memfd_bytes_after is None or self.pool_bytes is None:
            return None
        return self.memfd_bytes_before - self.memfd_bytes_after - self.pool_bytes

    @property
    def saved_share(self) -> float | None:
        if self.saved_bytes is None or not self.memfd_bytes_before:
            return None
        return self.saved_bytes / self.memfd_bytes_before

    def checks(self) -> list[tuple[bool, str, str]]:
        """What decides the exit status: held or not, the promise, and what was seen."""
        share = self.saved_share
        return [
            (
                self.guest_errors == 0 and bool(self.guest_checked_pages),
                "the guest read back every byte that it wrote",
                f"{_count(self.guest_errors)} errors in {_count(self.guest_checked_pages)} pages checked",
            ),
            (
                share is not None and share >= LEAST_SAVED,
                f"at least {LEAST_SAVED:.0%} of its touched memory left host RAM",
                "not measured"
                if share is None or self.saved_bytes is None
                else f"{share:.0%}: {format_size(max(self.saved_bytes, 0))} net of the compressed pool",
            ),
            (
                self.outlived_detach,
                "the VM outlived the detach",
                "it runs on, as it was started" if self.outlived_detach else "not seen",
            ),
            (
                self.excluded_lost_nothing and self.excluded_errors == 0,
                "the excluded VM never lost a page",
                f"never attached, {_size(self.excluded_bytes)} in RAM as before, {_count(self.excluded_errors)} errors"
                if self.excluded_lost_nothing
                else "it did, or this was not seen to the end",
            ),
        ]

    @property
    def success(self) -> bool:
        return all(held for held, _, _ in self.checks())

    def document(self) -> dict[str, Any]:
        """demo-report.json."""
        return {
            "guest": {
                "rounds": self.guest_rounds,
                "errors": self.guest_errors,
                "memory_bytes": self.guest_memory_bytes,
            },
            "memfd_bytes_before": self.memfd_bytes_before,
            "memfd_bytes_after": self.memfd_bytes_after,
            "pool_bytes": self.pool_bytes,
            "evicted_pages": self.evicted_pages,
            "faults": {"count": self.faults, "p50_us": self.fault_p50_us, "p99_us": self.fault_p99_us},
            "attach_stop_us": self.attach_stop_us,
            "pager_kill": {"takeover_ms": self.takeover_ms},
            "controller": {"decisions": self.decisions},
            "trace": {"id": self.trace_id, "spans": self.trace_spans},
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.document(), indent=2) + "\n")

    def show(self, console: Console) -> None:
        """The table that ends the demo."""
        figures = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        figures.add_column(style="bold")
        figures.add_column(justify="right", style="cyan")
        figures.add_column(style="dim")
        for name, value, meaning in self._figures():
            figures.add_row(name, value, meaning)
        verdict = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        for held, promise, seen in self.checks():
            mark = Text("yes", style="bold green") if held else Text("NO", style="bold red")
            verdict.add_row(mark, promise, Text(seen, style="" if held else "red"))
        utf = (console.encoding or "").lower().startswith("utf")
        body: list[RenderableType] = [_bars(self, UNICODE if utf else ASCII), Text(), figures, Text(), verdict]
        title = "Frostline demo: everything held" if self.success else "Frostline demo: FAILED"
        style = "green" if self.success else "red"
        footer = f"{self.seconds:.0f} s, guests under {self.accelerator or '?'}"
        console.print(Panel(Group(*body), title=title, subtitle=footer, border_style=style, box=box.ROUNDED, padding=1))

    def _figures(self) -> list[tuple[str, str, str]]:
        tiers = f"{_count(self.evicted_zero_pages)} zero, {_count(self.evicted_same_pages)} same-filled, "
        tiers += f"{_count(self.evicted_ram_pages)} compressed"
        return [
            ("guest RAM", _size(self.guest_memory_bytes), f"{_size(self.memfd_bytes_before)} of it touched"),
            ("in host RAM, then", _size(self.memfd_bytes_after), "blocks of the guest's memfd"),
            ("compressed pool", _size(self.pool_bytes), f"and {_size(self.metadata_bytes)} of page table and ages"),
            ("pages away", _count(self.evicted_pages), tiers),
            ("faults served", _count(self.faults), "pages that came back because the guest touched them"),
            (
                "fault latency",
                f"{_number(self.fault_p50_us)} us",
                f"median; 99 % below {_number(self.fault_p99_us)} us",
            ),
            ("attaching", f"{_number(self.attach_stop_us)} us", "the VMM's main thread stood still; once"),
            (
                "pager kill -9",
                f"{_number(self.takeover_ms)} ms",
                f"until the next one served, with {_size(self.killed_at_bytes)} away",
            ),
            ("decisions", _count(self.decisions), "by the controller, kept in Redis with their reasons"),
            (
                "one trace",
                f"{_count(self.trace_spans)} spans",
                f"from agent.scan to swap.evict: {self.trace_id or '-'}",
            ),
            (
                "guest",
                f"{_count(self.guest_rounds)} rounds",
                f"{_count(self.guest_checked_pages)} pages compared inside",
            ),
        ]


def _bars(report: Report, glyphs: Glyphs) -> RenderableType:
    """Before and then, drawn to one scale."""
    before = report.memfd_bytes_before
    if not before:
        return Text("The story ended before there was anything to measure.", style="red")
    width = 44
    lines = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    after, pool = report.memfd_bytes_after, report.pool_bytes
    lines.add_row("before", Text(glyphs.resident * width, style="cyan"), _size(before))
    if after is not None and pool is not None:
        cells = [max(1, round(part * width / before)) for part in (after, pool)]
        bar = Text(glyphs.resident * cells[0], style="cyan") + Text(glyphs.evicted * cells[1], style="yellow")
        bar += Text(glyphs.empty * max(0, width - sum(cells)), style="dim")
        lines.add_row("then", bar, f"{_size(after)} in RAM + {_size(pool)} pool")
    return lines


def _size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
