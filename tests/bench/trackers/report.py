# SPDX-License-Identifier: Apache-2.0
"""The figures as tables, rows that are held to something, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tests.bench.machine import Machine
from tests.bench.row import Row
from tests.bench.trackers import reading
from tests.bench.trackers.points import Point
from tests.bench.trackers.suite import PlaceResults

INTERVALS_SECONDS: Final = (10, 30, 120)
SCANNER_RATIO_LIMIT: Final = 20.0
# What is held to be seen and imagined of the touches, %, by a tracker that is exact to a page; in such rounds only.
EXACT: Final = {"rwp": 100.0, "zap": 100.0, "idle": 100.0, "damon": 99.0}


def _text(value: float | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value * 100:.{digits}f}"


def _columns(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table


def _part(point: Point) -> str:
    if not point.touched:
        return "nothing"
    return "all" if point.touched == point.pages else f"1/{round(point.pages / point.touched)}"


def costs(points: Sequence[Point], title: str) -> Table:
    """One row a point: what a scan costs the scanner, and the guest."""
    names = ["tracker", "VM MiB", "touched", "arm ms", "harvest ms", "scanner ms/GiB", "median", "guest µs/page"]
    table = _columns(title, [*names, "median", "longest stop µs", *(f"guest % at {s} s" for s in INTERVALS_SECONDS)])
    for point in points:
        middle = point.guest_median_ms * 1000 / point.touched if point.touched else None
        table.add_row(
            point.tracker, str(point.pages // 256), _part(point), _text(point.arm_ms), _text(point.harvest_ms),
            _text(point.scanner_ms / point.gib), _text(point.scanner_median_ms / point.gib),
            _text(point.guest_us_per_page), _text(middle), _text(point.stop_us),
            *(_percent(point.guest_share(seconds), 3) for seconds in INTERVALS_SECONDS),
        )  # fmt: skip
    return table


def accuracy(points: Sequence[Point], title: str) -> Table:
    names = ["tracker", "VM MiB", "touched", "pages a region", "rounds", "recall %", "precision %", "guest µs/page"]
    table = _columns(title, names)
    for all_rounds in points:
        for grain, point in all_rounds.by_grain().items():
            table.add_row(
                point.tracker, str(point.pages // 256), _part(point), str(grain), str(len(point.right)),
                _percent(point.recall), _percent(point.precision), _text(point.guest_us_per_page),
            )  # fmt: skip
    return table


def mapped(points: Sequence[Point], title: str) -> Table:
    table = _columns(title, ["tracker", "VM MiB", "other processes", "scanner ms/GiB", "guest µs/page"])
    for point in sorted(points, key=lambda each: (each.tracker, each.mappers)):
        table.add_row(
            point.tracker, str(point.pages // 256), str(point.mappers), _text(point.scanner_ms / point.gib),
            _text(point.guest_us_per_page),
        )  # fmt: skip
    return table


def models(points: Sequence[Point], title: str) -> Table:
    """What a cost is made of, and from which fraction on a tracker's total is above that of each other one."""
    of = reading.by_tracker(points)
    known = [model for each in of.values() if (model := reading.cost_model(each))]
    names = ["tracker", "fixed ms/GiB", "scanner µs/page touched", "guest µs/page touched"]
    table = _columns(title, [*names, *(f"total above {m.tracker}'s from" for m in known)])
    for model in known:
        crossings = []
        for other in known:
            at = reading.crossing(of[model.tracker], of[other.tracker])
            crossings.append("" if at is None else f"{at * 100:.1f} % touched")
        table.add_row(
            model.tracker, _text(model.fixed_ms_per_gib), _text(model.scanner_us_per_page, 3),
            _text(model.guest_us_per_page, 3), *crossings,
        )  # fmt: skip
    return table


def growth(place: PlaceResults) -> Table:
    """What each further GiB of a VM costs, whose guest touches no more than before."""
    smallest, largest = (f(point.pages // 256 for point in place.by_size) for f in (min, max))
    table = _columns(f"{place.title}: VM grows, {smallest} to {largest} MiB", ["tracker", "scanner ms a further GiB"])
    for name in place.trackers():
        slope = reading.slope_ms_per_gib(place.sizes_by(name))
        if slope is not None:
            table.add_row(name, _text(slope))
    return table


def steady(place: PlaceResults) -> Table:
    names = ["tracker", "VM MiB, all touched", "a scan each", "slow-down %", "of its windows", "void scans"]
    table = _columns(f"{place.title}: a guest that does not rest", names)
    for one in place.steady:
        low, high = one.spread
        table.add_row(
            one.tracker,
            str(one.pages // 256),
            f"{one.window_seconds} s",
            _percent(one.slow_down),
            f"{_percent(low)} ... {_percent(high)}",
            str(one.voids),
        )
    return table


def rows(place: PlaceResults) -> list[Row]:
    """What is held to a limit; a tracker that is not possible there makes no row, nor does one that sees by regions."""
    found: list[Row] = []
    if place.by_touched:
        ratio = reading.ratio_at(place.by_touched, "idle", "rwp", place.by_touched[0].pages // 16)
        if ratio is not None:
            what = f"{place.title}: scanner's cost, idle / rwp, 1/16 touched"
            found.append(Row(f"{place.key}.idle_by_rwp", what, value=ratio, limit=SCANNER_RATIO_LIMIT, at_least=True))
    for pages, points in reading.by_pages(place.by_size).items():  # one working set, which is 1/16 of some size
        ratio = reading.ratio_at(points, "idle", "rwp", pages // 16)
        if ratio is not None:
            mib = pages // 256
            what = f"{place.title}: scanner's cost, idle / rwp, 1/16 touched of {mib} MiB"
            found.append(
                Row(f"{place.key}.idle_by_rwp.{mib}", what, value=ratio, limit=SCANNER_RATIO_LIMIT, at_least=True)
            )
    for name, limit in EXACT.items():
        guests = (("kvm", place.kvm + place.heated), ("plain", place.by_touched + place.by_size))
        for guest, all_points in guests:
            of_name = (point.by_grain() for point in all_points if point.tracker == name)
            points = [grains[1] for grains in of_name if 1 in grains]
            worst = [value for point in points for value in (point.recall, point.precision) if value is not None]
            if worst:
                key, what = f"{place.key}.exact.{name}.{guest}", f"{name}, worst recall or precision, {guest} guest"
                row = Row(key, f"{place.title}: {what}", "%", min(worst) * 100, limit=limit, at_least=True)
                found.append(row)
    return found


def show(console: Console, place: PlaceResults) -> None:
    console.rule(f"{place.title}: Linux {place.release}")
    for probe in place.probes:
        if not probe.possible:
            console.print(f"{probe.tracker}: {probe.detail}", style="yellow", markup=False)
    if place.by_touched:
        console.print(costs(place.by_touched, f"{place.title}: working set grows"))
    for guest, points in place.guests().items():
        console.print(models(points, f"{place.title}: what a scan of a {guest} costs"))
    if place.by_size:
        console.print(costs(place.by_size, f"{place.title}: VM grows"))
        console.print(growth(place))
    if place.mapped:
        console.print(mapped(place.mapped, f"{place.title}: memory that others have mapped, 1/16 touched"))
    if place.kvm:
        console.print(accuracy(place.kvm, f"{place.title}: KVM guest"))
    if place.heated:
        console.print(accuracy(place.heated, f"{place.title}: KVM guest beside a VMM busy in memory of its own"))
    console.print(accuracy(place.by_touched, f"{place.title}: plain process"))
    if place.steady:
        console.print(steady(place))
    for failure in place.failures:
        console.print(f"failed: {failure}", style="red", markup=False)


def show_rows(console: Console, found: Sequence[Row]) -> None:
    table = _columns("Held to", ["what", "figure", "target", ""])
    for row in found:
        mark = "" if row.met is None else "[green]met[/]" if row.met else "[red]missed[/]"
        table.add_row(row.what, f"{_text(row.value)} {row.unit}", row.target, mark)
    console.print(table)


def document(
    machine: Machine, load_after: float, quick: bool, places: Sequence[PlaceResults], skipped: Sequence[str]
) -> dict[str, Any]:
    return {
        "machine": machine.as_json(),
        "load_average_after": load_after,
        "quick": quick,
        "skipped": list(skipped),
        "rows": [row.as_json() for place in places for row in rows(place)],
        "models": {
            place.key: {
                guest: [model.as_json() for each in reading.by_tracker(points).values()
                        if (model := reading.cost_model(each))]
                for guest, points in place.guests().items()
            }
            for place in places
        },
        "places": {place.key: place.as_json() for place in places},
    }  # fmt: skip


def write(path: Path, what: dict[str, Any]) -> None:
    path.write_text(json.dumps(what, indent=2) + "\n")
