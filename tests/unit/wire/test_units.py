# SPDX-License-Identifier: Apache-2.0
"""Sizes, durations and rates: what is read, what is refused and with which words, and that both ways agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.wire.units import (
    MAX_SIZE_BYTES,
    UnitError,
    format_duration,
    format_rate,
    format_size,
    format_size_exact,
    parse_duration,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1.5GiB", 3 * 2**29),
        ("512 MiB", 2**29),
        ("512mib", 2**29),
        ("1048576", 2**20),
        (4096, 4096),
        (" 1 TiB ", 2**40),
        ("0", 0),
        ("7 B", 7),
        ("0.1KiB", 102),
        (f"{MAX_SIZE_BYTES}", MAX_SIZE_BYTES),
    ],
)
def test_sizes_are_read(text: str | int, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("512MB", "'512MiB'"),
        ("512 M", "'512MiB'"),
        ("2g", "'2GiB'"),
        ("-1", "negative"),
        ("-5 MiB", "negative"),
        (-1, "negative"),
        ("1.5", "whole number of bytes"),
        ("", "not a size"),
        ("MiB", "not a size"),
        ("1e9", "not a size"),
        ("1 GiB 5", "not a size"),
        ("1,5 GiB", "not a size"),
        ("٣ GiB", "not a size"),
        ("3 parsec", "unknown unit"),
        ("8 EiB", "too large"),
        ("9" * 60, "too large"),
        ("1" * 5000, "not a size"),
        (True, "not a size"),
        (None, "not a size"),
    ],
)
def test_bad_sizes_say_what_would_be_right(text: str, hint: str) -> None:
    with pytest.raises(UnitError) as caught:
        parse_size(text)
    assert hint in str(caught.value)
    assert len(str(caught.value)) < 220


@given(st.integers(min_value=0, max_value=MAX_SIZE_BYTES))
def test_an_exact_size_reads_back(size_bytes: int) -> None:
    assert parse_size(format_size_exact(size_bytes)) == size_bytes


@given(st.integers(min_value=0, max_value=7 * 2**60))
def test_a_shown_size_is_within_half_a_percent_and_short(size_bytes: int) -> None:
    shown = format_size(size_bytes)
    assert len(shown) <= 8
    assert abs(parse_size(shown) - size_bytes) <= size_bytes * 0.005 + 1


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (98304, "96.0 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (3 * 2**29, "1.50 GiB"),
        (2**63 - 1, "8.00 EiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, shown: str) -> None:
    assert format_size(size_bytes) == shown


def test_a_negative_size_is_never_shown() -> None:
    with pytest.raises(UnitError):
        format_size(-1)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("2m", 120),
        ("2min", 120),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("250ms", 0.25),
        ("1.5h", 5400),
        ("1d2h3m4s5ms", 93784.005),
        (7, 7),
        (0.5, 0.5),
        ("0s", 0),
    ],
)
def test_durations_are_read(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("90", "'90s'"),
        ("", "not a duration"),
        ("-5s", "negative"),
        (-5, "negative"),
        ("30m1h", "out of order"),
        ("1m1min", "out of order"),
        ("5 weeks", "not a duration"),
        ("1s x", "not a duration"),
        ("200y", "not a duration"),
        ("40000d", "100 years"),
        (float("nan"), "100 years"),
        (float("inf"), "100 years"),
        (True, "not a duration"),
    ],
)
def test_bad_durations_say_what_would_be_right(text: str | float, hint: str) -> None:
    with pytest.raises(UnitError) as caught:
        parse_duration(text)
    assert hint in str(caught.value)


@given(st.integers(min_value=0, max_value=10**12))
def test_a_duration_of_whole_milliseconds_reads_back(milliseconds: int) -> None:
    assert round(parse_duration(format_duration(milliseconds / 1000)) * 1000) == milliseconds


@pytest.mark.parametrize(
    ("seconds", "parts", "shown"),
    [
        (0, 4, "0s"),
        (0.25, 4, "250ms"),
        (12.5, 4, "12.5s"),
        (90, 4, "1m30s"),
        (7200, 4, "2h"),
        (93784.005, 4, "1d2h3m4.005s"),
        (93784.005, 2, "1d2h"),
        (3 * 86400 + 300, 2, "3d"),
        (90.7, 2, "1m30s"),
        (59.9, 2, "59.9s"),
    ],
)
def test_durations_for_people(seconds: float, parts: int, shown: str) -> None:
    assert format_duration(seconds, parts=parts) == shown


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused_but_never_crashes(text: str) -> None:
    for parse in (parse_size, parse_duration, parse_rate):
        try:
            assert parse(text) >= 0
        except UnitError as error:
            assert len(str(error)) < 400


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [("64 MiB/s", 2**26), ("1GiB/min", 2**30 // 60), ("1048576", 2**20), (5, 5), ("unlimited", 0)],
)
def test_rates_are_read(text: str | int, bytes_per_second: int) -> None:
    assert parse_rate(text) == bytes_per_second


@pytest.mark.parametrize("text", ["64 MiB", "64MB/s", "1 GiB/fortnight", "", "0 B/s", "1 B/h", "/s", "-1/s"])
def test_bad_rates_are_refused(text: str) -> None:
    with pytest.raises(UnitError):
        parse_rate(text)


def test_rates_for_people() -> None:
    assert format_rate(2**26) == "64.0 MiB/s"
    assert format_rate(0) == "unlimited"
