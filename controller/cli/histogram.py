# SPDX-License-Identifier: Apache-2.0
"""Draws the two histograms of a VM over one axis of age: bytes by age (in RAM or away), and promotions a minute.

Each bin is one row. What is in RAM and what is away differ in character as well as in colour, so a picture in a log
or on a monochrome terminal says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rich.text import Text

from frostline.controller.cli.screen import Glyphs
from frostline.v1 import common_pb2
from frostline.wire.units import format_duration, format_size

RESIDENT_STYLE: Final = "cyan"
EVICTED_STYLE: Final = "blue"
PROMOTION_STYLE: Final = "magenta"
# The least room in which two charts side by side can still be told apart.
_MIN_SIDE_BY_SIDE: Final = 74
_MAX_BAR: Final = 60
_MAX_BINS: Final = 64


@dataclass(frozen=True)
class Bin:
    label: str
    resident_bytes: int
    evicted_bytes: int
    promotions_per_minute: float

    @property
    def total_bytes(self) -> int:
        return self.resident_bytes + self.evicted_bytes


def bins_of(histogram: common_pb2.Histogram) -> list[Bin]:
    """The bins, with empty ones at the old end folded away. Fields of differing length are cut to the shortest."""
    rows = list(
        zip(
            histogram.min_age_seconds,
            histogram.resident_bytes,
            histogram.evicted_bytes,
            histogram.promotions_per_minute,
            strict=False,
        )
    )[:_MAX_BINS]
    while len(rows) > 1 and not any(rows[-1][1:]):
        rows.pop()
    ages = list(histogram.min_age_seconds)
    return [
        Bin(_label(ages, index), resident, evicted, _sane(promotions))
        for index, (_age, resident, evicted, promotions) in enumerate(rows)
    ]


def _sane(rate: float) -> float:
    # An agent's garbage (negative, not a number, endless) is drawn as nothing rather than as a crash.
    return rate if 0 <= rate < 1e18 else 0.0


def _label(ages: list[float], index: int) -> str:
    start = _age(ages[index])
    return f"{start} +" if index + 1 == len(ages) else f"{start} - {_age(ages[index + 1])}"


def _age(seconds: float) -> str:
    try:
        return format_duration(seconds, parts=2)
    except ValueError:
        return "?"


def stacked_bar(parts: list[tuple[int, str, str]], whole: int, width: int) -> Text:
    """A bar of `width` cells for `whole`: each part is (amount, character, style). Whatever is not nothing gets at
    least one cell, and the whole never more than `width`."""
    bar = Text()
    if whole <= 0 or width <= 0:
        return bar
    total = sum(amount for amount, _char, _style in parts)
    cells_left = min(width, max(1, round(total * width / whole))) if total > 0 else 0
    shown = [part for part in parts if part[0] > 0]
    for index, (amount, char, style) in enumerate(shown):
        still_to_come = len(shown) - index - 1
        share = round(amount * width / whole) if still_to_come else cells_left
        cells = max(1, min(share, cells_left - still_to_come)) if cells_left > 0 else 0
        bar.append(char * cells, style=style)
        cells_left -= cells
    return bar


def draw(histogram: common_pb2.Histogram, width: int, glyphs: Glyphs) -> list[Text]:
    """The picture as lines no wider than `width`."""
    lines = _lines(histogram, width, glyphs)
    for line in lines:
        line.truncate(width)
    return lines


def _lines(histogram: common_pb2.Histogram, width: int, glyphs: Glyphs) -> list[Text]:
    bins = bins_of(histogram)
    if not bins:
        return [Text("no histogram yet: it comes with the first scans")]
    if width >= _MIN_SIDE_BY_SIDE:
        return _side_by_side(bins, width, glyphs)
    return [*_bytes_chart(bins, width, glyphs), Text(""), *_promotions_chart(bins, width, glyphs)]


def _side_by_side(bins: list[Bin], width: int, glyphs: Glyphs) -> list[Text]:
    labels = max(len("idle for"), *(len(b.label) for b in bins))
    rate_width = max(len("promoted/min"), *(len(_rate(b)) for b in bins))
    free = width - labels - 2 - 2 - 8 - 3 - 2 - rate_width
    bar_width = min(_MAX_BAR, free * 2 // 3)
    rate_bar_width = min(_MAX_BAR // 2, free - bar_width)
    most_bytes = max(b.total_bytes for b in bins)
    most_rate = max(b.promotions_per_minute for b in bins)
    head = Text("idle for".rjust(labels) + "  ", style="bold")
    head.append(_legend(glyphs, bar_width + 2 + 8))
    head.append("   " + "promoted/min".rjust(rate_width), style="bold")
    lines = [head]
    for b in bins:
        line = Text(b.label.rjust(labels) + "  ")
        line.append(_padded(_bytes_bar(b, most_bytes, bar_width, glyphs), bar_width))
        line.append("  " + _size(b.total_bytes).rjust(8) + "   " + _rate(b).rjust(rate_width) + "  ")
        line.append(_rate_bar(b, most_rate, rate_bar_width, glyphs))
        line.rstrip()
        lines.append(line)
    return lines


def _bytes_chart(bins: list[Bin], width: int, glyphs: Glyphs) -> list[Text]:
    labels = max(len("idle for"), *(len(b.label) for b in bins))
    bar_width = min(_MAX_BAR, width - labels - 2 - 2 - 8)
    most = max(b.total_bytes for b in bins)
    head = Text("idle for".rjust(labels) + "  ", style="bold")
    head.append(_legend(glyphs, bar_width))
    lines = [head]
    for b in bins:
        line = Text(b.label.rjust(labels) + "  ")
        line.append(_padded(_bytes_bar(b, most, bar_width, glyphs), bar_width))
        line.append("  " + _size(b.total_bytes).rjust(8))
        lines.append(line)
    return lines


def _promotions_chart(bins: list[Bin], width: int, glyphs: Glyphs) -> list[Text]:
    labels = max(len("idle for"), *(len(b.label) for b in bins))
    rate_width = max(len(_rate(b)) for b in bins)
    bar_width = min(_MAX_BAR, width - labels - 2 - 2 - rate_width)
    most = max(b.promotions_per_minute for b in bins)
    lines = [Text("idle for".rjust(labels) + "  promotions a minute, by age then", style="bold")]
    for b in bins:
        line = Text(b.label.rjust(labels) + "  ")
        line.append(_padded(_rate_bar(b, most, bar_width, glyphs), bar_width))
        line.append("  " + _rate(b).rjust(rate_width))
        lines.append(line)
    return lines


def sparkline(values: list[float], glyphs: Glyphs) -> str:
    """One character a value, scaled to the largest; blank for nothing at all."""
    most = max(values, default=0.0)
    steps = len(glyphs.spark)
    return "".join(
        " " if value <= 0 or most <= 0 else glyphs.spark[min(steps - 1, int(value / most * steps))] for value in values
    )


def _legend(glyphs: Glyphs, width: int) -> Text:
    legend = Text()
    legend.append(glyphs.resident, style=RESIDENT_STYLE)
    legend.append(" in RAM  ")
    legend.append(glyphs.evicted, style=EVICTED_STYLE)
    legend.append(" away")
    return _padded(legend, width)


def _bytes_bar(b: Bin, most: int, width: int, glyphs: Glyphs) -> Text:
    return stacked_bar(
        [
            (b.resident_bytes, glyphs.resident, RESIDENT_STYLE),
            (b.evicted_bytes, glyphs.evicted, EVICTED_STYLE),
        ],
        most,
        width,
    )


def _rate_bar(b: Bin, most: float, width: int, glyphs: Glyphs) -> Text:
    # Rates below one a minute still are promotions: scale to thousandths before making whole numbers of them.
    return stacked_bar(
        [(round(b.promotions_per_minute * 1000), glyphs.promotion, PROMOTION_STYLE)], round(most * 1000), width
    )


def _rate(b: Bin) -> str:
    rate = b.promotions_per_minute
    if rate == 0:
        return "-"
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}" if rate >= 0.1 else "<0.1"


def _size(size_bytes: int) -> str:
    return format_size(size_bytes) if size_bytes else "-"


def _padded(text: Text, width: int) -> Text:
    text.pad_right(max(0, width - text.cell_len))
    return text
