# SPDX-License-Identifier: Apache-2.0
"""The two plots: cost against the VM's size, and cost against what is touched. Times are of one boot a panel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "frostline"  # the same figures make the same file
matplotlib.rcParams["svg.fonttype"] = "none"

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from tests.bench.trackers.points import Point  # noqa: E402
from tests.bench.trackers.suite import PlaceResults  # noqa: E402

COLOURS: Final = {"rwp": "#0072b2", "zap": "#009e73", "idle": "#d55e00", "damon": "#cc79a7"}
MARKS: Final = {"rwp": "o", "zap": "s", "idle": "^", "damon": "D"}


def _line(
    axes: Axes, points: Sequence[Point], x: Callable[[Point], float], y: Callable[[Point], float], dotted: bool = False
) -> None:
    ordered = [point for point in sorted(points, key=x) if y(point) > 0]
    if ordered:
        name = ordered[0].tracker
        axes.plot(
            [x(point) for point in ordered], [y(point) for point in ordered], ":" if dotted else "-",
            color=COLOURS[name], marker=MARKS[name], markersize=4, linewidth=1.5, label=None if dotted else name,
        )  # fmt: skip


def _frame(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)


def _size(gib: float) -> str:
    return f"{gib:g} GiB" if gib >= 1 else f"{gib * 1024:g} MiB"


def _percent(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else "100"


def _ticks(axes: Axes, values: Iterable[float], text: Callable[[float], str]) -> None:
    """Where it was measured, and nowhere else."""
    places = sorted(set(values))
    axes.set_xticks(places, [text(value) for value in places])
    axes.set_xticks([], minor=True)


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One for all panels, below them: it hides no line."""
    lines = {text: line for each in axes for line, text in zip(*each.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=max(1, len(lines)), fontsize=8)


def _save(figure: Figure, path: Path) -> list[Path]:
    """As SVG and PNG, without a date."""
    written = [path.with_suffix(".svg"), path.with_suffix(".png")]
    figure.savefig(written[0], metadata={"Date": None})
    figure.savefig(written[1], dpi=120, metadata={"Software": None})
    return written


def plot_by_size(places: Sequence[PlaceResults], path: Path) -> list[Path]:
    """A panel a place: the scanner's part of one scan, at a fixed working set. Returns what was written."""
    shown = [place for place in places if len({point.pages for point in place.by_size}) > 1]
    if not shown:
        return []
    figure = Figure(figsize=(4.2 * len(shown), 3.8), layout="constrained")
    first: Axes | None = None
    for number, place in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), number + 1, sharey=first)
        first = first or axes
        for tracker in place.trackers():
            points = place.sizes_by(tracker)
            _line(axes, points, lambda point: point.gib, lambda point: point.scanner_ms)
            _line(axes, points, lambda point: point.gib, lambda point: point.guest_ms, dotted=True)
        axes.set_xscale("log", base=2)
        _ticks(axes, [point.gib for point in place.by_size], _size)
        axes.set_yscale("log")
        touched = place.by_size[0].touched * 4 // 1024
        _frame(axes, f"{place.title}\n{touched} MiB touched a scan", "size of the VM")
        if number == 0:
            axes.set_ylabel("ms a scan (solid: scanner, dotted: guest)", fontsize=8)
    _legend(figure, figure.axes)
    return _save(figure, path)


def plot_by_touched(place: PlaceResults, path: Path) -> list[Path]:
    """Three panels of one place: the scanner's part, the guest's, and their sum. Returns what was written."""
    parts: list[tuple[str, Callable[[Point], float]]] = [
        ("the scanner's part", lambda point: point.scanner_ms / point.gib),
        ("the guest's part", lambda point: point.guest_ms / point.gib),
        ("both", lambda point: point.total_ms / point.gib),
    ]
    if not place.by_touched:
        return []
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    figure.suptitle(f"{place.title}, VM of {place.by_touched[0].pages * 4 // 1024} MiB", fontsize=10)
    first: Axes | None = None
    for number, (title, cost) in enumerate(parts):
        axes = figure.add_subplot(1, 3, number + 1, sharey=first)
        first = first or axes
        for tracker in place.trackers():
            _line(axes, [point for point in place.touched_by(tracker) if point.touched],
                  lambda point: point.fraction * 100, cost)  # fmt: skip
        axes.set_xscale("log", base=4)
        axes.set_yscale("log")
        _ticks(axes, [point.fraction * 100 for point in place.by_touched if point.touched], _percent)
        _frame(axes, title, "pages touched between two scans, %")
        if number == 0:
            axes.set_ylabel("ms a scan and GiB", fontsize=8)
    _legend(figure, figure.axes)
    return _save(figure, path)
