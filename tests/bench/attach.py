# SPDX-License-Identifier: Apache-2.0
"""How long attaching stops a VMM, and how long a VM waits for the successor of a pager that was killed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tests.bench.served import ServedVictim
from tests.bench.victim import Programs, Victim

ATTACH_MIB = 64


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    best: float
    worst: float
    rounds: int

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def spread_of(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values), len(values))


def measure_attach(programs: Programs, folder: Path, *, rounds: int) -> tuple[Spread, Spread]:
    """One victim, attached to and detached from again and again: µs its main thread was stopped, ms until served."""
    stops, ready = [], []
    with Victim(programs, ATTACH_MIB) as victim:
        for _ in range(rounds):
            with ServedVictim(victim, folder) as served:
                status = served.status()
                stops.append(status.attach_stop_ns / 1000)
                ready.append(status.takeover_ns / 1e6)
                served.detach()
        victim.verify(0, victim.pages)
    return spread_of(stops), spread_of(ready)


def measure_takeover(served: ServedVictim, *, rounds: int) -> Spread:
    """Kill -9, and a successor at once; ms until the VM's touch of a page that is away was answered.

    Everything must be away. Time begins with the signal, so it holds the end of the old process and the start of the
    new one.
    """
    took = []
    for round_ in range(rounds):
        killed_ns = served.kill()
        served.victim.process.send(f"touch {round_} 1")
        served.reap()
        served.spawn()
        _, answered_ns = served.victim.touched(1)
        took.append((answered_ns - killed_ns) / 1e6)
        served.connect()
    return spread_of(took)
