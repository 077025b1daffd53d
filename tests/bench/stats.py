# SPDX-License-Identifier: Apache-2.0
"""Medians, percentiles and ratios of interleaved blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of them lie (nearest rank). There must be one at least."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass(frozen=True, slots=True)
class Ratio:
    """One side by the other, block by block: their middle, the quarters around it, and best by best."""

    middle: float
    low: float
    high: float
    best: float
    blocks: int

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def ratio_of(left: Sequence[float], right: Sequence[float], *, high_is_good: bool = False) -> Ratio:
    """Blocks that ran next to each other are compared with each other, so that load that comes and goes cancels.

    ``best`` is the best block of one side by the best of the other: what both do when nothing disturbs them.
    """
    each = [one / other for one, other in zip(left, right, strict=True)]
    choose = max if high_is_good else min
    return Ratio(
        middle=median(each),
        low=percentile(each, 25),
        high=percentile(each, 75),
        best=choose(left) / choose(right),
        blocks=len(each),
    )
