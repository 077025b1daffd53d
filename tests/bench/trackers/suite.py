# SPDX-License-Identifier: Apache-2.0
"""What is measured in a place, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.bench.trackers.places import Place
from tests.bench.trackers.points import PAGES_PER_GIB, Point, Probe, Steady

PAGES_PER_MIB: Final = PAGES_PER_GIB // 1024
TRACKERS: Final = ("rwp", "zap", "idle", "damon")
STEADY_SECONDS: Final = 10
HEAT_MIB: Final = 16


@dataclass(frozen=True, slots=True)
class Amounts:
    """What to measure in a place. ``touched_parts``: 1/n of the pages; 0: none."""

    rounds: int
    touched_mib: int  # the VM in which the working set grows
    touched_parts: tuple[int, ...] = (0, 256, 64, 16, 4, 1)
    sizes_mib: tuple[int, ...] = ()  # the VMs in which `working_set_mib` are touched
    working_set_mib: int = 64
    mapped_mib: int = 0  # a VM whose memory other processes have mapped as well; 0: none
    mappers: int = 8
    steady_mib: int = 0
    steady_windows: int = 3
    kvm_mib: int = 0
    kvm_rounds: int = 10
    limit_seconds: float = 600.0


@dataclass(slots=True)
class PlaceResults:
    """Of one boot: nothing of it is compared with another's."""

    key: str
    title: str
    release: str
    emulated: bool
    probes: list[Probe] = field(default_factory=list)
    by_touched: list[Point] = field(default_factory=list)
    by_size: list[Point] = field(default_factory=list)
    mapped: list[Point] = field(default_factory=list)
    kvm: list[Point] = field(default_factory=list)
    steady: list[Steady] = field(default_factory=list)

    def trackers(self) -> list[str]:
        return [name for name in TRACKERS if any(point.tracker == name for point in self.by_touched)]

    def touched_by(self, tracker: str) -> list[Point]:
        return [point for point in self.by_touched if point.tracker == tracker]

    def sizes_by(self, tracker: str) -> list[Point]:
        return [point for point in self.by_size if point.tracker == tracker]

    def as_json(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("by_touched", "by_size", "mapped", "kvm", "steady")}
        return {
            "title": self.title,
            "release": self.release,
            "emulated": self.emulated,
            "probes": {probe.tracker: {"possible": probe.possible, "detail": probe.detail} for probe in self.probes},
            **{name: [point.as_json() for point in points] for name, points in parts.items()},
        }


def _points(place: Place, arguments: Sequence[str], limit_seconds: float) -> list[Point]:
    return [each for each in place.run(arguments, limit_seconds) if isinstance(each, Point)]


def _touched(pages: int, parts: Sequence[int]) -> str:
    return ",".join(str(pages // part if part else 0) for part in parts)


def measure(place: Place, results: PlaceResults, amounts: Amounts, say: Callable[[str], None]) -> None:
    """Fill in ``results``; BenchError when something cannot be measured that should be."""
    limit, rounds = amounts.limit_seconds, ["--rounds", str(amounts.rounds)]
    results.probes += [each for each in place.run(["probe"], limit) if isinstance(each, Probe)]
    say(f"{results.title}: working set grows, VM of {amounts.touched_mib} MiB")
    touched = _touched(amounts.touched_mib * PAGES_PER_MIB, amounts.touched_parts)
    results.by_touched += _points(place, ["--mib", str(amounts.touched_mib), "--touched", touched, *rounds], limit)
    for mib in amounts.sizes_mib:
        say(f"{results.title}: working set of {amounts.working_set_mib} MiB, VM of {mib} MiB")
        touched = str(amounts.working_set_mib * PAGES_PER_MIB)
        results.by_size += _points(place, ["--mib", str(mib), "--touched", touched, *rounds], limit)
    if amounts.mapped_mib:
        say(f"{results.title}: memory mapped by {amounts.mappers} other processes")
        touched = _touched(amounts.mapped_mib * PAGES_PER_MIB, (16,))
        for mappers in (0, amounts.mappers):
            arguments = ["--mib", str(amounts.mapped_mib), "--touched", touched, "--mappers", str(mappers), *rounds]
            results.mapped += _points(place, arguments, limit)
    if amounts.kvm_mib:
        say(f"{results.title}: a KVM guest of {amounts.kvm_mib} MiB")
        touched = _touched(amounts.kvm_mib * PAGES_PER_MIB, (256, 16, 4, 1))
        arguments = ["--guest", "kvm", "--mib", str(amounts.kvm_mib), "--touched", touched]
        arguments += ["--heat", str(HEAT_MIB), "--rounds", str(amounts.kvm_rounds)]
        results.kvm += _points(place, arguments, limit)
    if amounts.steady_mib:
        say(f"{results.title}: a guest that does not rest, a scan each {STEADY_SECONDS} s")
        arguments = ["--mib", str(amounts.steady_mib), "--touched", str(amounts.steady_mib * PAGES_PER_MIB)]
        arguments += ["--steady", str(STEADY_SECONDS), "--windows", str(amounts.steady_windows)]
        results.steady += [each for each in place.run(arguments, limit) if isinstance(each, Steady)]
