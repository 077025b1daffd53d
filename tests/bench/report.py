# SPDX-License-Identifier: Apache-2.0
"""The figures as tables for people and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.machine import QUIET_LOAD, Machine
from tests.bench.row import Row
from tests.bench.suite import Results


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _mark(row: Row) -> str:
    if row.skipped:
        return "[yellow]skipped[/]"
    if row.met is None:
        return ""
    return "[green]met[/]" if row.met else "[red]missed[/]"


def show_machine(console: Console, machine: Machine) -> None:
    console.print(
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / (1 << 30):.1f} GiB, "
        f"Linux {machine.kernel} {machine.architecture}, load {machine.load_average:.2f}"
    )
    if not machine.quiet:
        console.print(
            f"[yellow]The machine is not quiet (load {machine.load_average:.2f} > {QUIET_LOAD}): look at the ratios "
            f"and at the best blocks, not at the times.[/]"
        )


def _figures(rows: list[Row]) -> Table:
    table = Table(title="Figures")
    table.add_column("what")
    for name in ("figure", "unit", "spread", "best", "target", ""):
        table.add_column(name, justify="left" if name in ("unit", "") else "right")
    for row in rows:
        spread = f"{_number(row.low)} - {_number(row.high)}" if row.low is not None else ""
        figure = _number(row.value)
        table.add_row(row.what, figure, row.unit, spread, _number(row.best), row.target, _mark(row))
    return table


def _faults(details: dict[str, Any]) -> Table:
    table = Table(title="One touch of a page that is away, as the touching thread sees it")
    for name in ("where", "side", "faults", "p50 µs", "p99 µs", "best block p50 µs"):
        table.add_column(name, justify="left" if name in ("where", "side") else "right")
    for key, where in (("fault", "one CPU"), ("fault_unpinned", "unpinned"), ("fault_two_cpus", "two CPUs")):
        for side, summary in details.get(key, {}).get("sides", {}).items():
            table.add_row(
                where, side, str(summary["faults"]), _number(summary["p50_us"]), _number(summary["p99_us"]),
                _number(summary["best_block_p50_us"]),
            )  # fmt: skip
    return table


def _pieces(details: dict[str, Any]) -> Table:
    table = Table(title="Where the time goes, ns a page, caches cold")
    for name in ("of", "piece", "ns"):
        table.add_column(name, justify="right" if name == "ns" else "left")
    for group, pieces in details.get("pieces_ns_per_page", {}).items():
        for name, nanoseconds in pieces.items():
            table.add_row(group, name, str(nanoseconds))
    return table


def show(console: Console, results: Results) -> None:
    console.print(_faults(results.details))
    console.print(_pieces(results.details))
    console.print(_figures(results.rows))
    for reason in dict.fromkeys(row.skipped for row in results.rows if row.skipped):
        console.print(f"[yellow]skipped: {reason}[/]")


def write(path: Path, machine: Machine, load_after: float, quick: bool, results: Results) -> None:
    document = {
        "machine": machine.as_json(),
        "load_average_after": load_after,
        "quick": quick,
        "rows": [row.as_json() for row in results.rows],
        "details": results.details,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
