# SPDX-License-Identifier: Apache-2.0
"""What ``native/bench/bench_trackers.c`` measured: one line of its output, and what follows from it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Final

PAGE_BYTES: Final = 4096
PAGES_PER_GIB: Final = (1 << 30) // PAGE_BYTES


_ROUNDS: Final = (
    "arm_ns", "harvest_ns", "plain_ns", "armed_ns", "stop_ns", "right", "missed", "wrong", "grain",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Probe:
    """What a kernel allows."""

    tracker: str
    possible: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Point:
    """Rounds of one tracker on one guest. Times in ns, a value a round; pages of all rounds by what was seen of them.

    ``plain_ns``: a pass of the guest over its pages with nothing armed; ``armed_ns``: the first pass after an arming.
    ``grain``: pages of which one spoke for all; 1: exact to a page.
    The best round is the one that the rest of the machine disturbed least, so costs go by it; medians are beside. Of
    rounds that saw with different grain only the finest are asked for costs: a region costs as much as a page.
    """

    guest: str
    tracker: str
    pages: int
    touched: int
    mappers: int
    arm_ns: tuple[int, ...]
    harvest_ns: tuple[int, ...]
    plain_ns: tuple[int, ...]
    armed_ns: tuple[int, ...]
    stop_ns: tuple[int, ...]
    right: tuple[int, ...]
    missed: tuple[int, ...]
    wrong: tuple[int, ...]
    grain: tuple[int, ...]

    @property
    def gib(self) -> float:
        return self.pages / PAGES_PER_GIB

    @property
    def fraction(self) -> float:
        """Of the guest's pages, how many it touched."""
        return self.touched / self.pages

    @property
    def finest(self) -> int:
        """How many pages one spoke for in the rounds that costs go by."""
        return min(self.grain)

    def _costs(self, name: str) -> tuple[int, ...]:
        values: tuple[int, ...] = getattr(self.by_grain()[self.finest], name)
        return values

    @property
    def arm_ms(self) -> float:
        return min(self._costs("arm_ns")) / 1e6

    @property
    def harvest_ms(self) -> float:
        return min(self._costs("harvest_ns")) / 1e6

    @property
    def scanner_ms(self) -> float:
        """A whole scan, as the pager's thread sees it: arm, collect and harvest."""
        return self.arm_ms + self.harvest_ms

    @property
    def scanner_median_ms(self) -> float:
        scans = zip(self._costs("arm_ns"), self._costs("harvest_ns"), strict=True)
        return median(arm + harvest for arm, harvest in scans) / 1e6

    @property
    def guest_ms(self) -> float:
        """What the guest's touches took longer, once, because of the arming."""
        return max(0.0, (min(self._costs("armed_ns")) - min(self._costs("plain_ns"))) / 1e6)

    @property
    def guest_median_ms(self) -> float:
        passes = zip(self._costs("armed_ns"), self._costs("plain_ns"), strict=True)
        return median(armed - plain for armed, plain in passes) / 1e6

    @property
    def guest_us_per_page(self) -> float | None:
        return self.guest_ms * 1000 / self.touched if self.touched else None

    @property
    def total_ms(self) -> float:
        return self.scanner_ms + self.guest_ms

    @property
    def stop_us(self) -> float:
        """The longest single stop or lock of the best round."""
        return min(self._costs("stop_ns")) / 1000

    @property
    def recall(self) -> float | None:
        """Of the touches, how many were seen."""
        all_touched = sum(self.right) + sum(self.missed)
        return sum(self.right) / all_touched if all_touched else None

    @property
    def precision(self) -> float | None:
        """Of the pages seen as touched, how many were."""
        seen = sum(self.right) + sum(self.wrong)
        return sum(self.right) / seen if seen else None

    def guest_share(self, interval_seconds: float) -> float:
        """Part of the guest's time that a scan each ``interval_seconds`` takes: faults, and the longest stop."""
        return (self.guest_ms / 1e3 + min(self._costs("stop_ns")) / 1e9) / interval_seconds

    def with_rounds_of(self, other: Point) -> Point:
        """Both together: the same was measured twice, at different times."""
        rounds = {name: getattr(self, name) + getattr(other, name) for name in _ROUNDS}
        return replace(self, **rounds)

    def by_grain(self) -> dict[int, Point]:
        """The rounds in which one page spoke for so many."""
        found = {}
        for grain in sorted(set(self.grain)):
            rounds: dict[str, Any] = {
                name: tuple(value for value, each in zip(getattr(self, name), self.grain, strict=True) if each == grain)
                for name in _ROUNDS
            }
            found[grain] = replace(self, **rounds)
        return found

    @property
    def what(self) -> tuple[str, str, int, int, int]:
        """What was measured: points that have it in common differ in nothing but time."""
        return self.guest, self.tracker, self.pages, self.touched, self.mappers

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "scanner_ms": self.scanner_ms,
            "guest_ms": self.guest_ms,
            "recall": self.recall,
            "precision": self.precision,
        }


@dataclass(frozen=True, slots=True)
class Steady:
    """Touches in windows of a guest that does not rest: with a scan at the beginning of each, and without one.

    ``voids``: scans of these that came to nothing.
    """

    guest: str
    tracker: str
    pages: int
    touched: int
    window_seconds: int
    voids: int
    scanned: tuple[int, ...]
    alone: tuple[int, ...]

    @property
    def slow_down(self) -> float:
        """Part of the touches that are lost to the scans: the middle of neighbouring windows' pairs."""
        return median(1 - scanned / alone for scanned, alone in zip(self.scanned, self.alone, strict=True))

    @property
    def spread(self) -> tuple[float, float]:
        each = [1 - scanned / alone for scanned, alone in zip(self.scanned, self.alone, strict=True)]
        return min(each), max(each)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "slow_down": self.slow_down}


def parse(document: dict[str, Any]) -> Probe | Point | Steady:
    """A line of bench_trackers' output. ValueError for one of another kind; KeyError for one that lacks something."""
    kinds: dict[str, type[Probe] | type[Point] | type[Steady]] = {"probe": Probe, "rounds": Point, "steady": Steady}
    kind = kinds.get(document["kind"])
    if kind is None:
        raise ValueError(f"bench_trackers says {document['kind']!r}, which is not known here")
    make: Callable[..., Probe | Point | Steady] = kind
    wanted = {name: document[name] for name in kind.__dataclass_fields__}
    return make(**{name: tuple(value) if isinstance(value, list) else value for name, value in wanted.items()})
