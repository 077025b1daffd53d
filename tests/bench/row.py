# SPDX-License-Identifier: Apache-2.0
"""One line of the result: a figure, how far it spread, and what it is held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.attach import Spread
from tests.bench.stats import Ratio


@dataclass(frozen=True, slots=True)
class Row:
    """``limit`` None: shown for information. A row that could not be measured has a reason instead of a value."""

    key: str
    what: str
    unit: str = "x"
    value: float | None = None
    low: float | None = None
    high: float | None = None
    best: float | None = None
    limit: float | None = None
    at_least: bool = False
    skipped: str = ""

    @property
    def met(self) -> bool | None:
        """None when there is nothing to hold it to."""
        if self.value is None or self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def target(self) -> str:
        if self.limit is None:
            return ""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def of_ratio(key: str, what: str, ratio: Ratio, limit: float | None = None, *, at_least: bool = False) -> Row:
    return Row(key, what, "x", ratio.middle, ratio.low, ratio.high, ratio.best, limit, at_least)


def of_spread(key: str, what: str, unit: str, spread: Spread, limit: float | None = None) -> Row:
    """Held to its limit by the worst of all rounds."""
    return Row(key, what, unit, spread.worst, spread.median, spread.worst, spread.best, limit)
