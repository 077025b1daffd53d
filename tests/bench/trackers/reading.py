# SPDX-License-Identifier: Apache-2.0
"""What the points of one boot say together: what a tracker's cost is made of, and where the totals of two cross."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from tests.bench.trackers.points import Point


@dataclass(frozen=True, slots=True)
class CostModel:
    """A scan's cost, as measured at nothing touched and at everything touched, and as a straight line between."""

    tracker: str
    fixed_ms_per_gib: float
    scanner_us_per_page: float
    guest_us_per_page: float

    def as_json(self) -> dict[str, float | str]:
        return asdict(self)


def cost_model(points: Iterable[Point]) -> CostModel | None:
    """From points of one tracker and one size; None when the ends (nothing and everything touched) are not there."""
    by_touched = {point.touched: point for point in points}
    none = by_touched.get(0)
    everything = next((point for point in by_touched.values() if point.touched == point.pages), None)
    if none is None or everything is None:
        return None
    return CostModel(
        none.tracker,
        none.scanner_ms / none.gib,
        (everything.scanner_ms - none.scanner_ms) * 1000 / everything.pages,
        everything.guest_ms * 1000 / everything.pages,
    )


def by_tracker(points: Iterable[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.tracker, []).append(point)
    return found


def by_grain(points: Iterable[Point]) -> dict[tuple[str, int], list[Point]]:
    """The rounds of each tracker, by how many pages one spoke for."""
    found: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        for grain, rounds in point.by_grain().items():
            found.setdefault((point.tracker, grain), []).append(rounds)
    return found


def by_pages(points: Iterable[Point]) -> dict[int, list[Point]]:
    found: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.pages):
        found.setdefault(point.pages, []).append(point)
    return found


def crossing(one: Sequence[Point], other: Sequence[Point]) -> float | None:
    """The touched fraction from which on the total (scanner and guest) of ``one`` is above that of ``other``.

    Both were measured at the same fractions, of the same size. Straight lines between the measured points; None when
    they do not cross from below within them.
    """
    left = {point.touched: point for point in one}
    right = {point.touched: point for point in other}
    before: tuple[float, float] | None = None
    for touched in sorted(left.keys() & right.keys()):
        fraction, above = left[touched].fraction, left[touched].total_ms - right[touched].total_ms
        if before is not None and before[1] <= 0 < above:
            return before[0] + (fraction - before[0]) * -before[1] / (above - before[1])
        before = fraction, above
    return None


def ratio_at(points: Iterable[Point], one: str, other: str, touched: int) -> float | None:
    """The scanner's cost of ``one`` by that of ``other``, where so many pages were touched."""
    costs = {point.tracker: point.scanner_ms for point in points if point.touched == touched}
    return costs[one] / costs[other] if one in costs and costs.get(other) else None


def slope_ms_per_gib(points: Sequence[Point]) -> float | None:
    """What each further GiB of the VM costs the scanner, by the smallest and the largest of these points."""
    ordered = sorted(points, key=lambda point: point.pages)
    if len(ordered) < 2 or ordered[0].pages == ordered[-1].pages:
        return None
    return (ordered[-1].scanner_ms - ordered[0].scanner_ms) / (ordered[-1].gib - ordered[0].gib)
