# SPDX-License-Identifier: Apache-2.0
"""The arithmetic behind the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import report
from tests.bench.attach import spread_of
from tests.bench.machine import this_machine
from tests.bench.row import Row, of_ratio, of_spread
from tests.bench.stats import percentile, ratio_of
from tests.bench.suite import Results


def test_percentile_is_a_value_that_was_seen() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(values, 0) == 1
    assert percentile(values, 50) == 3
    assert percentile(values, 99) == percentile(values, 100) == 5


def test_blocks_are_compared_with_their_neighbours() -> None:
    # The machine was four times as slow during the second block; the ratio does not see it.
    ratio = ratio_of([2.0, 8.0, 2.0], [1.0, 4.0, 1.0])
    assert (ratio.low, ratio.middle, ratio.high) == (2, 2, 2)
    assert ratio.best == 2
    assert ratio.blocks == 3


def test_best_is_by_the_better_direction() -> None:
    times, throughput = [3.0, 2.0], [10.0, 30.0]
    assert ratio_of(times, [1.0, 4.0]).best == 2
    assert ratio_of(throughput, [10.0, 20.0], high_is_good=True).best == 1.5


def test_sides_of_different_length_are_no_ratio() -> None:
    with pytest.raises(ValueError):
        ratio_of([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("value", "at_least", "met"), [(0.9, True, True), (0.89, True, False), (0.91, False, False)])
def test_a_row_is_held_to_its_limit(value: float, at_least: bool, met: bool) -> None:
    assert Row("key", "what", value=value, limit=0.9, at_least=at_least).met is met


def test_nothing_to_hold_it_to() -> None:
    assert Row("key", "what", value=1.0).met is None
    assert Row("key", "what", limit=1.0, skipped="no zram").met is None


def test_a_spread_is_held_by_its_worst() -> None:
    row = of_spread("key", "what", "ms", spread_of([1.0, 9.0, 2.0]), limit=5.0)
    assert row.value == 9 and row.low == 2 and row.best == 1
    assert row.met is False


def test_report_says_what_was_skipped(tmp_path: Path) -> None:
    results = Results([of_ratio("a", "measured", ratio_of([1.0], [1.0]), 1.9), Row("b", "not", skipped="no zram: why")])
    report.write(tmp_path / "report.json", this_machine(), 0.0, True, results)
    document = json.loads((tmp_path / "report.json").read_text())
    assert [(row["key"], row["met"], row["skipped"]) for row in document["rows"]] == [
        ("a", True, ""),
        ("b", None, "no zram: why"),
    ]
    assert document["quick"] is True and document["machine"]["cores"] >= 1
