# SPDX-License-Identifier: Apache-2.0
"""What is measured in a place, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.bench.trackers.places import Failed, Measured, Place
from tests.bench.trackers.points import PAGES_PER_GIB, Point, Probe, Steady

PAGES_PER_MIB: Final = PAGES_PER_GIB // 1024
TRACKERS: Final = ("rwp", "zap", "idle", "damon")
HEAT_MIB: Final = 16


@dataclass(frozen=True, slots=True)
class Amounts:
    """What to measure in a place. ``touched_parts``: 1/n of the pages; 0: none."""

    trials: int  # each of so many
    rounds: int  # while the working set grows
    touched_mib: int  # the VM in which the working set grows
    touched_parts: tuple[int, ...] = (0, 256, 64, 16, 4, 1)
    sizes_mib: tuple[int, ...] = ()  # the VMs in which `working_set_mib` are touched
    working_set_mib: int = 64
    other_rounds: int = 3  # of each of the rest, except of the KVM guest
    mapped_mib: int = 0  # a VM whose memory other processes have mapped as well; 0: none
    mappers: int = 8
    steady_mib: int = 0
    steady: tuple[tuple[int, int], ...] = ()  # seconds between scans, pairs of windows with a scan and without
    kvm_mib: int = 0
    kvm_rounds: int = 3
    kvm_parts: tuple[int, ...] = (0, 256, 64, 16, 4, 1)
    limit_seconds: float = 240.0


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
    heated: list[Point] = field(default_factory=list)  # beside a VMM that is busy in memory of its own
    steady: list[Steady] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def trackers(self) -> list[str]:
        return [name for name in TRACKERS if any(point.tracker == name for point in self.by_touched)]

    def touched_by(self, tracker: str) -> list[Point]:
        return [point for point in self.by_touched if point.tracker == tracker]

    def guests(self) -> dict[str, list[Point]]:
        """Those in which the working set grows, by what they are."""
        return {
            name: points for name, points in (("plain process", self.by_touched), ("KVM guest", self.kvm)) if points
        }

    def sizes_by(self, tracker: str) -> list[Point]:
        return [point for point in self.by_size if point.tracker == tracker]

    def as_json(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("by_touched", "by_size", "mapped", "kvm", "heated", "steady")}
        return {
            "title": self.title,
            "release": self.release,
            "emulated": self.emulated,
            "failures": self.failures,
            "probes": {probe.tracker: {"possible": probe.possible, "detail": probe.detail} for probe in self.probes},
            **{name: [point.as_json() for point in points] for name, points in parts.items()},
        }


def _touched(pages: int, parts: Sequence[int]) -> str:
    return ",".join(str(pages // part if part else 0) for part in parts)


@dataclass(slots=True)
class Bench:
    """Fills in ``results``. What fails is noted there, and the rest goes on."""

    place: Place
    results: PlaceResults
    amounts: Amounts
    say: Callable[[str], None]

    def run(self) -> None:
        limit = self.amounts.limit_seconds
        self.results.probes += [each for each in self.place.run(["probe"], limit) if isinstance(each, Probe)]
        self._grow_working_set()
        self._grow_vm()
        self._map_elsewhere()
        self._kvm()
        self._steady()

    def _each(self, arguments: Sequence[str], limit_seconds: float) -> Iterator[list[Measured]]:
        """Of each tracker that is possible there; each in a guest of its own."""
        for probe in self.results.probes:
            if probe.possible:
                try:
                    command = ["--trackers", probe.tracker, *arguments]
                    yield self.place.run(command, limit_seconds)
                except Failed as failure:
                    self.results.failures.append(str(failure))
                    yield failure.measured

    def _points(self, arguments: Sequence[str], rounds: int) -> list[Point]:
        """All trackers in turn, and again: so that a disturbance does not meet one of them alone."""
        found: dict[tuple[str, str, int, int, int], Point] = {}
        for _ in range(self.amounts.trials):
            for measured in self._each([*arguments, "--rounds", str(rounds)], self.amounts.limit_seconds):
                for point in measured:
                    if isinstance(point, Point):
                        before = found.get(point.what)
                        found[point.what] = before.with_rounds_of(point) if before else point
        return list(found.values())

    def _grow_working_set(self) -> None:
        mib = self.amounts.touched_mib
        self.say(f"{self.results.title}: working set grows, VM of {mib} MiB")
        touched = _touched(mib * PAGES_PER_MIB, self.amounts.touched_parts)
        self.results.by_touched += self._points(["--mib", str(mib), "--touched", touched], self.amounts.rounds)

    def _grow_vm(self) -> None:
        touched = str(self.amounts.working_set_mib * PAGES_PER_MIB)
        for mib in self.amounts.sizes_mib:
            self.say(f"{self.results.title}: working set of {self.amounts.working_set_mib} MiB, VM of {mib} MiB")
            self.results.by_size += self._points(["--mib", str(mib), "--touched", touched], self.amounts.other_rounds)

    def _map_elsewhere(self) -> None:
        mib = self.amounts.mapped_mib
        touched = _touched(mib * PAGES_PER_MIB, (16,))
        for mappers in (0, self.amounts.mappers) if mib else ():
            self.say(f"{self.results.title}: memory mapped by {mappers} other processes")
            arguments = ["--mib", str(mib), "--touched", touched, "--mappers", str(mappers)]
            self.results.mapped += self._points(arguments, self.amounts.other_rounds)

    def _kvm(self) -> None:
        mib = self.amounts.kvm_mib
        if not mib:
            return
        self.say(f"{self.results.title}: a KVM guest of {mib} MiB")
        guest = ["--guest", "kvm", "--mib", str(mib), "--touched"]
        touched = _touched(mib * PAGES_PER_MIB, self.amounts.kvm_parts)
        self.results.kvm += self._points([*guest, touched], self.amounts.kvm_rounds)
        self.say(f"{self.results.title}: the same while its VMM is at work in {2 * HEAT_MIB} MiB of its own")
        touched = _touched(mib * PAGES_PER_MIB, (16,))
        self.results.heated += self._points([*guest, touched, "--heat", str(HEAT_MIB)], self.amounts.kvm_rounds)

    def _steady(self) -> None:
        mib = self.amounts.steady_mib
        for seconds, windows in self.amounts.steady if mib else ():
            self.say(f"{self.results.title}: a guest of {mib} MiB that does not rest, a scan each {seconds} s")
            arguments = ["--mib", str(mib), "--touched", str(mib * PAGES_PER_MIB)]
            arguments += ["--steady", str(seconds), "--windows", str(windows)]
            for measured in self._each(arguments, self.amounts.limit_seconds + 2 * seconds * windows):
                self.results.steady += [each for each in measured if isinstance(each, Steady)]
