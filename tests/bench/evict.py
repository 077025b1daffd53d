# SPDX-License-Identifier: Apache-2.0
"""How fast memory leaves: the pager without a rate limit against process_madvise(MADV_PAGEOUT) to zram."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.bench.served import ServedVictim, mib_per_second
from tests.bench.stats import Ratio, ratio_of
from tests.bench.victim import MIB, Programs, Victim
from tests.bench.zram import compression_ratio

MEMORY_MIB: Final = 256


@dataclass(slots=True)
class EvictFigures:
    """MiB/s of each round."""

    frostline: list[float] = field(default_factory=list)
    frostline_wall: list[float] = field(default_factory=list)
    zram: list[float] = field(default_factory=list)
    details: dict[str, float] = field(default_factory=dict)

    def ratio(self) -> Ratio:
        return ratio_of(self.frostline, self.zram, high_is_good=True)

    def as_json(self) -> dict[str, Any]:
        sides = {"frostline": self.frostline, "frostline_wall": self.frostline_wall, "zram": self.zram}
        return {
            "mib_per_second": {
                name: {"median": median(values), "best": max(values), "rounds": len(values)}
                for name, values in sides.items()
                if values
            },
            "details": self.details,
        }


def measure(programs: Programs, folder: Path, zram: Path | None, *, rounds: int) -> EvictFigures:
    """Each round moves everything out on both sides, one after the other, and brings it back."""
    figures = EvictFigures()
    with ExitStack() as stack:
        ours = stack.enter_context(Victim(programs, MEMORY_MIB))
        served = stack.enter_context(ServedVictim(ours, folder))
        theirs = stack.enter_context(Victim(programs, MEMORY_MIB)) if zram is not None else None
        for _ in range(rounds):
            served.age_everything()
            busy, wall = mib_per_second(served.evict_everything())
            figures.frostline.append(busy)
            figures.frostline_wall.append(wall)
            status = served.status()
            if theirs is not None and zram is not None:
                figures.zram.append(theirs.bytes / MIB / (theirs.page_out_ns() / 1e9))
                figures.details["zram_compression"] = compression_ratio(zram)
                theirs.sweep_ns(1)
            served.drain()
        figures.details["frostline_compression"] = status.evicted_bytes / max(1, status.stored_bytes)
        figures.details["pool_waste_percent"] = 100 * (1 - status.stored_bytes / max(1, status.pool_bytes))
        ours.verify(0, ours.pages)
    return figures
