# SPDX-License-Identifier: Apache-2.0
"""What a scan by the zap tracker costs a GiB, and what the workload then pays to touch its memory again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from frostline.native import PAGE_BYTES, Record
from tests.bench.served import ServedVictim

GIB: Final = 1 << 30
SPARSE_STEP: Final = 16
FULL, SPARSE, IDLE = "all touched", f"1/{SPARSE_STEP} touched", "nothing touched"


@dataclass(slots=True)
class ScanFigures:
    ms_per_gib: dict[str, list[float]] = field(default_factory=lambda: {FULL: [], SPARSE: [], IDLE: []})
    refault_us: list[float] = field(default_factory=list)
    longest_stop_us: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "ms_per_gib": {
                name: {"median": median(values), "best": min(values), "rounds": len(values)}
                for name, values in self.ms_per_gib.items()
            },
            "refault_us_per_page": {"median": median(self.refault_us), "best": min(self.refault_us)},
            "longest_stop_us": self.longest_stop_us,
        }


def _ms_per_gib(record: Record, memory_bytes: int) -> float:
    return (record.end_ns - record.start_ns) / 1e6 * GIB / memory_bytes


def measure(served: ServedVictim, *, rounds: int) -> ScanFigures:
    """The victim must be all in memory. Each round scans it after a sweep, after a sparse one, and after none."""
    figures = ScanFigures()
    victim = served.victim
    before: dict[str, Callable[[], object]] = {
        FULL: lambda: None,  # swept below
        SPARSE: lambda: victim.sweep_ns(SPARSE_STEP),
        IDLE: lambda: None,
    }
    served.scan()
    for _ in range(rounds):
        after_arming = victim.sweep_ns(1)
        mapped = victim.sweep_ns(1)
        figures.refault_us.append((after_arming - mapped) / 1000 / (victim.bytes / PAGE_BYTES))
        for name, touch in before.items():
            touch()
            figures.ms_per_gib[name].append(_ms_per_gib(served.scan(), victim.bytes))
    figures.longest_stop_us = served.status().scan_stop_max_ns / 1000
    return figures
