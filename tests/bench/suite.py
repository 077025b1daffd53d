# SPDX-License-Identifier: Apache-2.0
"""All benches in one run, and the rows that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.bench import agent, attach, evict, faults, memory, pieces, scan
from tests.bench.errors import Skipped
from tests.bench.faults import BARE, FROSTLINE, ZRAM, FaultFigures
from tests.bench.row import Row, of_ratio, of_spread
from tests.bench.served import ServedVictim
from tests.bench.victim import ANY_CPU, Programs, Victim
from tests.bench.zram import zram_swap

ZRAM_BYTES: Final = 4 << 30
LARGE_MIB: Final = 1024
FAULT_ZRAM_LIMIT: Final = 1.9
FAULT_BARE_LIMIT: Final = 1.25
EVICT_LIMIT: Final = 0.9
ATTACH_STOP_LIMIT_US: Final = 1000.0
TAKEOVER_LIMIT_MS: Final = 200.0
PAGER_LIMIT_MIB: Final = 8.0
METADATA_LIMIT_PERCENT: Final = 0.25
AGENT_LIMIT_PERCENT: Final = 1.0


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of everything: what a run takes, and how steady its figures are."""

    fault_trials: int
    fault_blocks: int
    block_faults: int
    other_trials: int  # of the placements that are shown for information
    evict_rounds: int
    scan_rounds: int
    attach_rounds: int
    agent_seconds: float


# 20,000 faults a side and trial.
FULL: Final = Amounts(3, 10, 2000, 1, 7, 5, 20, 20.0)
QUICK: Final = Amounts(1, 5, 1000, 1, 3, 2, 5, 5.0)


@dataclass(slots=True)
class Results:
    rows: list[Row] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


class Suite:
    def __init__(
        self, programs: Programs, folder: Path, amounts: Amounts, fault_threads: int, say: Callable[[str], None]
    ) -> None:
        self.programs: Final = programs
        self.folder: Final = folder
        self.amounts: Final = amounts
        self.fault_threads: Final = fault_threads
        self.results: Final = Results()
        self._say: Final = say
        self._zram: Path | None = None
        self._no_zram = ""

    def run(self) -> Results:
        with self._swap():
            self._all_faults()
            self._evict()
        self._attach()
        self._large()
        self._pieces()
        self._agent()
        return self.results

    @contextmanager
    def _swap(self) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                self._zram = stack.enter_context(zram_swap(ZRAM_BYTES))
            except Skipped as reason:
                self._no_zram = str(reason)
            yield
            self._zram = None

    def _add(self, row: Row) -> None:
        self.results.rows.append(row)

    def _faults(self, programs: Programs, trials: int) -> FaultFigures:
        return faults.measure(
            programs,
            self.folder,
            self._zram,
            trials=trials,
            blocks=self.amounts.fault_blocks,
            block_faults=self.amounts.block_faults,
            fault_threads=self.fault_threads,
        )

    def _fault_rows(
        self, figures: FaultFigures, key: str, where: str, limits: tuple[float | None, float | None]
    ) -> None:
        self.results.details[key] = figures.as_json()
        for other, name, limit in ((ZRAM, "swap-in from zram", limits[0]), (BARE, "bare userfaultfd", limits[1])):
            what = f"fault from `ram` / {name}, p50, {where}"
            if other in figures.sides:
                self._add(of_ratio(f"{key}.{other}", what, figures.ratio(FROSTLINE, other), limit))
            else:
                self._add(Row(f"{key}.{other}", what, skipped=self._no_zram))

    def _all_faults(self) -> None:
        """On one CPU a fault costs what its path costs; from one CPU to another mostly what waking that one costs."""
        here, there = self.programs.mover_cpu, self.programs.vm_cpu
        placements = [("fault", "one CPU", here, here), ("fault_unpinned", "unpinned", ANY_CPU, ANY_CPU)]
        if here != there:
            placements.append(("fault_two_cpus", "two CPUs", there, here))
        for key, where, vm_cpu, mover_cpu in placements:
            held = key == "fault"
            self._say(f"faults, {where}")
            figures = self._faults(
                replace(self.programs, vm_cpu=vm_cpu, mover_cpu=mover_cpu),
                self.amounts.fault_trials if held else self.amounts.other_trials,
            )
            self._fault_rows(figures, key, where, (FAULT_ZRAM_LIMIT, FAULT_BARE_LIMIT) if held else (None, None))

    def _evict(self) -> None:
        self._say("eviction")
        figures = evict.measure(self.programs, self.folder, self._zram, rounds=self.amounts.evict_rounds)
        self.results.details["evict"] = figures.as_json()
        what = "evict throughput / MADV_PAGEOUT to zram"
        if self._no_zram:
            self._add(Row("evict.zram", what, skipped=self._no_zram))
        else:
            self._add(of_ratio("evict.zram", what, figures.ratio(), EVICT_LIMIT, at_least=True))

    def _attach(self) -> None:
        self._say("attach and detach")
        stops, ready = attach.measure_attach(self.programs, self.folder, rounds=self.amounts.attach_rounds)
        self._add(of_spread("attach.stop", "attach: VMM stopped, worst", "µs", stops, ATTACH_STOP_LIMIT_US))
        self._add(of_spread("attach.ready", "attach: pager start to serving, worst", "ms", ready))
        self.results.details["attach"] = {"stop_us": stops.as_json(), "ready_ms": ready.as_json()}

    def _large(self) -> None:
        with (
            Victim(self.programs, LARGE_MIB) as victim,
            ServedVictim(victim, self.folder, self.fault_threads) as served,
        ):
            self._say("scans of 1 GiB")
            scans = scan.measure(served, rounds=self.amounts.scan_rounds)
            self.results.details["scan"] = scans.as_json()
            for name, values in scans.ms_per_gib.items():
                self._add(
                    Row(f"scan.{name.replace(' ', '_')}", f"scan by zap, {name}", "ms/GiB",
                        median(values), min(values), max(values), min(values))
                )  # fmt: skip
            costs = scans.refault_us
            self._add(
                Row(
                    "scan.refault",
                    "scan: the workload's next touch",
                    "µs/page",
                    median(costs),
                    min(costs),
                    max(costs),
                    min(costs),
                )
            )
            self._say("takeover after kill -9")
            served.age_everything()
            served.evict_everything()
            takeover = attach.measure_takeover(served, rounds=self.amounts.attach_rounds)
            self.results.details["takeover_ms"] = takeover.as_json()
            self._add(
                of_spread(
                    "takeover", "kill -9 to fault answered (1 GiB away), worst", "ms", takeover, TAKEOVER_LIMIT_MS
                )
            )
            self._memory(served)

    def _memory(self, served: ServedVictim) -> None:
        figures = memory.measure(served)
        self.results.details["memory"] = figures.as_json()
        pager_mib = figures.pager_bytes / (1 << 20)
        self._add(Row("memory.pager", "pager's memory beyond the vault", "MiB", pager_mib, limit=PAGER_LIMIT_MIB))
        self._add(
            Row("memory.metadata", "vault metadata of guest memory", "%", figures.metadata_percent,
                limit=METADATA_LIMIT_PERCENT)
        )  # fmt: skip

    def _pieces(self) -> None:
        self._say("pieces of a fault and of an eviction")
        self.results.details["pieces_ns_per_page"] = pieces.measure(self.programs)

    def _agent(self) -> None:
        self._say("the agent at rest")
        what = "agent's CPU at rest, one VM, of a core"
        try:
            percent = agent.cpu_percent_at_rest(self.programs, self.folder, self.amounts.agent_seconds)
            self._add(Row("agent.cpu", what, "%", percent, limit=AGENT_LIMIT_PERCENT))
        except Skipped as reason:
            self._add(Row("agent.cpu", what, skipped=str(reason)))
