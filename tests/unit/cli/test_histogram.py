# SPDX-License-Identifier: Apache-2.0
"""The drawn histogram: in proportion, legible without colour, whatever the numbers and the width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.controller.cli.histogram import bins_of, draw, sparkline, stacked_bar
from frostline.controller.cli.screen import ASCII, UNICODE
from frostline.v1 import common_pb2
from tests.unit.cli.servicer import sample_histogram


def _lines(histogram: common_pb2.Histogram, width: int = 100) -> list[str]:
    return [line.plain for line in draw(histogram, width, UNICODE)]


def test_bars_are_in_proportion_and_labelled() -> None:
    lines = _lines(sample_histogram())
    by_label = {line[: line.index("  ", 5)].strip(): line for line in lines[1:]}
    full = by_label["4m - 8m"].count("▒")
    assert by_label["8m - 16m"].count("▒") == pytest.approx(full * 180 / 260, abs=1)
    assert by_label["0s - 2s"].count("█") == pytest.approx(full * 212 / 260, abs=1)
    mixed = by_label["2m - 4m"]
    assert mixed.count("█") == pytest.approx(full * 36 / 260, abs=1)
    assert mixed.count("▒") == pytest.approx(full * 130 / 260, abs=1)
    assert "166 MiB" in mixed and mixed.rstrip().endswith("■")
    assert "5,210" in by_label["0s - 2s"] and "<0.1" in by_label["8m - 16m"]


def test_empty_bins_at_the_old_end_are_folded_and_others_are_not() -> None:
    histogram = common_pb2.Histogram(
        min_age_seconds=[0, 60, 120, 240],
        resident_bytes=[5, 0, 7, 0],
        evicted_bytes=[0, 0, 0, 0],
        promotions_per_minute=[0, 0, 0, 0],
    )
    assert [b.label for b in bins_of(histogram)] == ["0s - 1m", "1m - 2m", "2m - 4m"]


def test_the_last_bin_is_open() -> None:
    histogram = common_pb2.Histogram(
        min_age_seconds=[0, 60], resident_bytes=[1, 1], evicted_bytes=[0, 0], promotions_per_minute=[0, 0]
    )
    assert bins_of(histogram)[-1].label == "1m +"


def test_no_histogram_says_so() -> None:
    assert "no histogram yet" in _lines(common_pb2.Histogram())[0]


def test_all_zero_is_drawn_without_bars() -> None:
    histogram = common_pb2.Histogram(
        min_age_seconds=[0, 60], resident_bytes=[0, 0], evicted_bytes=[0, 0], promotions_per_minute=[0, 0]
    )
    (row,) = _lines(histogram)[1:]
    assert "█" not in row and "-" in row


@given(
    st.lists(
        st.tuples(
            st.floats(min_value=0, max_value=1e9),
            st.integers(min_value=0, max_value=2**63),
            st.integers(min_value=0, max_value=2**63),
            st.floats(min_value=0, max_value=1e15),
        ),
        max_size=20,
    ),
    st.integers(min_value=60, max_value=200),
)
def test_never_wider_than_asked_and_never_a_crash(rows: list[tuple[float, int, int, float]], width: int) -> None:
    histogram = common_pb2.Histogram(
        min_age_seconds=[r[0] for r in rows],
        resident_bytes=[r[1] for r in rows],
        evicted_bytes=[r[2] for r in rows],
        promotions_per_minute=[r[3] for r in rows],
    )
    for glyphs in (UNICODE, ASCII):
        for line in draw(histogram, width, glyphs):
            assert line.cell_len <= width


@given(st.lists(st.integers(min_value=0, max_value=2**62), min_size=1, max_size=3), st.integers(1, 200))
def test_every_part_that_is_something_is_seen(amounts: list[int], width: int) -> None:
    parts = [(amount, char, "") for amount, char in zip(amounts, "abc", strict=False)]
    bar = stacked_bar(parts, sum(amounts), width).plain
    assert len(bar) <= width
    something = [char for amount, char, _style in parts if amount > 0]
    if something and len(something) <= width:
        assert len(bar) == width
        assert set(bar) == set(something)


def test_fields_of_differing_length_are_survived() -> None:
    histogram = common_pb2.Histogram(min_age_seconds=[0, 60, 120], resident_bytes=[1], evicted_bytes=[1, 2])
    assert _lines(histogram)


def test_a_negative_or_endless_age_is_survived() -> None:
    histogram = common_pb2.Histogram(
        min_age_seconds=[-1, float("inf"), float("nan")],
        resident_bytes=[1, 1, 1],
        evicted_bytes=[0, 0, 0],
        promotions_per_minute=[float("nan"), -5, float("inf")],
    )
    assert len(_lines(histogram)) == 4


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 4], UNICODE) == " ▃▅█"
    assert sparkline([], UNICODE) == ""
    assert sparkline([0, 0], ASCII) == "  "
