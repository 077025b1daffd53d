# SPDX-License-Identifier: Apache-2.0
"""The figures of a run as the Markdown tables of docs/trackers.md, so that none of them is copied by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.bench.trackers import reading, report
from tests.bench.trackers.points import Point
from tests.bench.trackers.suite import TRACKERS, PlaceResults


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.2g}"


def _percent(part: int, whole: int) -> str:
    """100 is said of all of it only."""
    return "-" if not whole else "100" if part == whole else f"{part * 100 / whole:.3f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def _fraction(point: Point) -> str:
    if not point.touched:
        return "nothing"
    return "all" if point.touched == point.pages else f"1/{round(point.pages / point.touched)}"


def costs(points: Sequence[Point]) -> str:
    """A row a touched part: arm + harvest of each tracker, ms a GiB, and the guest's charge, µs a touched page.

    A cell of rounds that saw by regions says so.
    """
    of = reading.by_tracker(points)
    names = [name for name in TRACKERS if name in of]
    rows = []
    for touched in sorted({point.touched for point in points}):
        here = {name: next((p for p in of[name] if p.touched == touched), None) for name in names}
        row = [next(_fraction(point) for point in here.values() if point)]
        row += [
            f"{_number(p.arm_ms / p.gib)} + {_number(p.harvest_ms / p.gib)}"
            + (f" (regions of {p.finest} pages)" if p.finest > 1 else "")
            if (p := here[name])
            else "-"
            for name in names
        ]
        row += [_number(p.guest_us_per_page) if (p := here[name]) else "-" for name in names]
        rows.append(row)
    head = ["touched", *(f"`{name}` arm + harvest, ms/GiB" for name in names)]
    return _table([*head, *(f"guest, µs a page: `{name}`" for name in names)], rows)


def stops(points: Sequence[Point]) -> str:
    """The longest single chunk of the best round, in µs: so long a fault, or for `zap` the main thread, may wait."""
    of = reading.by_tracker(points)
    rows = []
    for touched in sorted({point.touched for point in points}):
        here = [next((p for p in of[name] if p.touched == touched), None) for name in of]
        row = [next(_fraction(point) for point in here if point)]
        rows.append([*row, *("-" if point is None else _number(point.stop_us) for point in here)])
    return _table(["touched", *(f"`{name}`, longest stop, µs" for name in of)], rows)


def slow_downs(points: Sequence[Point]) -> str:
    """What scans take of the time of one vCPU, if it alone touches so much of 1 GiB: from the charge for one page."""
    of = reading.by_tracker(points)
    rows = []
    for touched in sorted({point.touched for point in points if point.touched * 16 >= point.pages}):
        here = [next((p for p in of[name] if p.touched == touched), None) for name in of]
        row = [next(_fraction(point) for point in here if point)]
        for point in here:
            seconds = (point.guest_us_per_page or 0.0) * touched / point.gib / 1e6 if point else None
            shares = ["-" if seconds is None else _number(seconds * 100 / each) for each in report.INTERVALS_SECONDS]
            row.append(" / ".join(shares))
        rows.append(row)
    when = " / ".join(str(seconds) for seconds in report.INTERVALS_SECONDS)
    return _table(["touched", *(f"`{name}`, % at {when} s" for name in of)], rows)


def accuracy(place: PlaceResults) -> str:
    """A row a tracker, kind of guest and pages of which one spoke for all: all such rounds together."""
    kinds = (
        ("plain process", place.by_touched),
        *(
            (f"plain process of {pages // 256:,} MiB", points)
            for pages, points in reading.by_pages(place.by_size).items()
        ),
        ("KVM guest", place.kvm),
        ("KVM guest, its VMM busy in memory of its own", place.heated),
    )
    rows = []
    for kind, all_points in kinds:
        for (name, grain), points in reading.by_grain(all_points).items():
            right, missed, wrong = (
                sum(sum(getattr(point, what)) for point in points) for what in ("right", "missed", "wrong")
            )
            rounds = sum(len(point.right) for point in points)
            row = [f"`{name}`", kind, str(grain), str(rounds), f"{right + missed:,}"]
            rows.append([*row, _percent(right, right + missed), _percent(right, right + wrong)])
    head = ["tracker", "guest", "pages a region", "rounds", "pages touched", "recall, %", "precision, %"]
    return _table(head, rows)


def crossings(points: Sequence[Point]) -> str:
    """From which part touched on the row's total is above the column's."""
    of = reading.by_tracker(points)
    rows = []
    for name, mine in of.items():
        found = [reading.crossing(mine, other) for other in of.values()]
        rows.append([f"`{name}`", *("-" if at is None else f"{at * 100:.1f} %" for at in found)])
    return _table(["total above that of", *(f"`{name}`" for name in of)], rows)


def _other(place: PlaceResults) -> str:
    sizes = [
        [f"`{name}`", _number(reading.slope_ms_per_gib(place.sizes_by(name)))]
        for name in place.trackers()
        if place.sizes_by(name)
    ]
    text = _table(["tracker", "scanner, ms a further GiB"], sizes) + "\n" if sizes else ""
    if place.mapped:
        rows = [
            [f"`{point.tracker}`", str(point.mappers), _number(point.scanner_ms / point.gib)] for point in place.mapped
        ]
        text += _table(["tracker", "other processes", "scanner, ms/GiB"], rows) + "\n"
    if place.steady:
        rows = [
            [f"`{one.tracker}`", f"{one.window_seconds} s", f"{one.slow_down * 100:.1f}",
             " to ".join(f"{each * 100:.1f}" for each in one.spread), str(len(one.alone))]
            for one in place.steady
        ]  # fmt: skip
        text += _table(["tracker", "a scan each", "slow-down, %", "pairs, %", "pairs"], rows) + "\n"
    return text


def tables(places: Sequence[PlaceResults]) -> str:
    text = ""
    for place in places:
        text += f"## {place.title}: Linux {place.release}\n\n"
        for guest, points in place.guests().items():
            text += f"A {guest} of {points[0].pages // 256} MiB.\n\n"
            text += f"{costs(points)}\n{slow_downs(points)}\n{stops(points)}\n{crossings(points)}\n"
        text += accuracy(place) + "\n" + _other(place)
    return text
