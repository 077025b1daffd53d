# SPDX-License-Identifier: Apache-2.0
"""What one touch of a page that is away costs the thread that touches it: Frostline, swap on zram, bare userfaultfd."""

from __future__ import annotations

from array import array
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.bench.errors import BenchError
from tests.bench.served import ServedVictim
from tests.bench.stats import Ratio, percentile, ratio_of
from tests.bench.victim import Programs, Victim
from tests.bench.zram import compression_ratio

MEMORY_MIB: Final = 128
FROSTLINE, ZRAM, BARE = "frostline", "zram", "bare"


@dataclass(slots=True)
class Side:
    """Times of one way, in ns, block by block."""

    blocks: list[array[int]] = field(default_factory=list)

    def medians(self) -> list[float]:
        return [median(block) for block in self.blocks]

    def summary(self) -> dict[str, float]:
        everything = [time for block in self.blocks for time in block]
        return {
            "faults": len(everything),
            "p50_us": percentile(everything, 50) / 1000,
            "p99_us": percentile(everything, 99) / 1000,
            "best_block_p50_us": min(self.medians()) / 1000,
        }


@dataclass(frozen=True, slots=True)
class FaultFigures:
    sides: dict[str, Side]
    details: dict[str, float]

    def ratio(self, left: str, right: str) -> Ratio:
        return ratio_of(self.sides[left].medians(), self.sides[right].medians())

    def as_json(self) -> dict[str, Any]:
        return {"sides": {name: side.summary() for name, side in self.sides.items()}, "details": self.details}


def _ensure_away(victim: Victim, what: str) -> None:
    left = victim.resident_pages()
    if left > victim.pages // 100:
        raise BenchError(f"{left} of {victim.pages} pages are still in memory after {what}")


def measure(
    programs: Programs,
    folder: Path,
    zram: Path | None,
    *,
    trials: int,
    blocks: int,
    block_faults: int,
    fault_threads: int,
) -> FaultFigures:
    """``trials`` times everything is moved away and ``blocks`` blocks of random touches run on each side in turn."""
    if blocks * block_faults > MEMORY_MIB * 256:
        raise BenchError(f"{blocks} blocks of {block_faults} faults are more than {MEMORY_MIB} MiB have pages")
    details: dict[str, float] = {}
    with ExitStack() as stack:
        victims = {FROSTLINE: stack.enter_context(Victim(programs, MEMORY_MIB))}
        if zram is not None:
            victims[ZRAM] = stack.enter_context(Victim(programs, MEMORY_MIB))
        victims[BARE] = stack.enter_context(Victim(programs, MEMORY_MIB, bare=True))
        served = stack.enter_context(ServedVictim(victims[FROSTLINE], folder, fault_threads))
        sides = {name: Side() for name in victims}
        bare_server: list[int] = []
        for trial in range(trials):
            for victim in victims.values():
                victim.order(trial + 1)
            served.age_everything()
            served.evict_everything()
            _ensure_away(victims[FROSTLINE], "evicting")
            victims[BARE].punch()
            if zram is not None:
                victims[ZRAM].page_out_ns()
                _ensure_away(victims[ZRAM], "MADV_PAGEOUT")
                details["zram_compression"] = compression_ratio(zram)
            status = served.status()
            details["frostline_compression"] = status.evicted_bytes / max(1, status.stored_bytes)
            for block in range(blocks):
                for name, victim in victims.items():
                    sides[name].blocks.append(victim.touch(block * block_faults, block_faults))
                bare_server.append(victims[BARE].bare_median_ns())
            for victim in victims.values():
                victim.verify(0, blocks * block_faults)
        status = served.status()
        details["frostline_server_p50_us"] = status.fault_percentile_ns(500) / 1000
        details["bare_server_p50_us"] = median(bare_server) / 1000
        details["checksum_errors"] = status.checksum_errors
    return FaultFigures(sides, details)
