# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.bench.trackers``: measure each tracker in up to three kernels, show tables, draw, write JSON.

A kernel that is not there is said and left out. A missed target fails the run, but for a quick one.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from rich.console import Console

from tests.bench.errors import BenchError, Skipped
from tests.bench.machine import available_bytes, this_machine
from tests.bench.report import show_machine
from tests.bench.trackers import markdown, plots, report
from tests.bench.trackers.places import PROGRAM, OwnKernel, booted
from tests.bench.trackers.suite import Amounts, Bench, PlaceResults
from tests.kernel import GuestError
from tests.kernel.idle import kept_idle_kernel
from tests.system.guest.kernel import GuestKernel

IDLE, DEBIAN, OWN = "idle", "debian", "own"
# An emulated CPU loses time to whatever else the machine does, and does not know of it: short rounds and many of them.
AMOUNTS: Final = {
    IDLE: Amounts(2, 12, 64, sizes_mib=(64, 256, 1024), mapped_mib=256, steady_mib=1024, steady=((10, 3),), kvm_mib=64),
    DEBIAN: Amounts(2, 6, 64, kvm_mib=64),
    OWN: Amounts(2, 3, 4096, sizes_mib=(1024, 4096, 16384), steady_mib=4096, steady=((10, 3), (30, 3), (120, 2))),
}
QUICK: Final = {
    IDLE: Amounts(
        1, 2, 64, (0, 16, 1), sizes_mib=(64, 128), mapped_mib=64, kvm_mib=16, kvm_rounds=2, kvm_parts=(0, 16, 1)
    ),
    DEBIAN: Amounts(1, 2, 64, (0, 16, 1), kvm_mib=16, kvm_rounds=2, kvm_parts=(0, 16, 1)),
    OWN: Amounts(1, 2, 256, (0, 16, 1), sizes_mib=(256, 1024)),
}
ROOM_PART: Final = 0.8
TITLES: Final = {
    IDLE: "7.3 with page_idle, emulated",
    DEBIAN: "Debian's 7.3, emulated",
    OWN: "this machine's own kernel",
}


@dataclass(frozen=True, slots=True)
class Run:
    program: Path
    folder: Path
    idle_kernel: Path | None
    amounts: dict[str, Amounts]
    console: Console
    began: float

    def place(self, key: str) -> PlaceResults:
        """Measure in one place. Skipped: it is not to be had here."""
        if key == OWN:
            results = PlaceResults(key, TITLES[key], os.uname().release, emulated=False)
            amounts = self._that_fit(self.amounts[key])
            Bench(OwnKernel(self.program), results, amounts, self._say).run()
            return results
        kernel = self._idle_kernel() if key == IDLE else None
        results = PlaceResults(key, TITLES[key], "", emulated=True)
        try:
            with booted(self.program, self.folder / key, kernel) as (place, results.release):
                Bench(place, results, self.amounts[key], self._say).run()
        except GuestError as error:
            if not results.by_touched:
                raise BenchError(f"{TITLES[key]}: {error}") from error
            results.failures.append(str(error))
        return results

    def _say(self, what: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        self.console.print(f"measuring at {minutes}:{seconds:02d}: {what}", style="dim", markup=False)

    def _idle_kernel(self) -> GuestKernel:
        kept = GuestKernel("with page_idle", self.idle_kernel, ()) if self.idle_kernel else kept_idle_kernel()
        if kept is None:
            raise Skipped("no kernel with page_idle is in the cache; `make test-kernel-idle` builds one")
        return kept

    @staticmethod
    def _that_fit(amounts: Amounts) -> Amounts:
        """VMs of real pages: only what leaves a part of the memory that is free now to the rest."""
        room_mib = int(available_bytes() * ROOM_PART) >> 20
        fitting = tuple(mib for mib in amounts.sizes_mib if mib <= room_mib)
        return replace(
            amounts,
            sizes_mib=fitting,
            touched_mib=min(amounts.touched_mib, room_mib),
            steady_mib=min(amounts.steady_mib, room_mib),
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.trackers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything: a look, not a figure to quote")
    parser.add_argument("--json", type=Path, default=Path("bench-trackers-report.json"), help="(%(default)s)")
    parser.add_argument(
        "--plots", type=Path, default=Path("build/bench-trackers"), help="folder of plots and tables (%(default)s)"
    )
    parser.add_argument("--programs", type=Path, default=Path("build/native/bench"), help="folder of the bench program")
    parser.add_argument("--idle-kernel", type=Path, help="bzImage of a kernel with page_idle and all of it built in")
    parser.add_argument("--only", choices=[IDLE, DEBIAN, OWN], action="append", help="measure only here")
    return parser.parse_args()


def _end(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # through every `with`: no kernel stays behind


def _draw(places: list[PlaceResults], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = plots.plot_by_size(places, folder / "cost-by-size")
    if places:
        most = max(places, key=lambda place: len(place.trackers()))
        written += plots.plot_by_touched(most, folder / "cost-by-touched")
    return written


def main() -> int:
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 170)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    program = (arguments.programs / PROGRAM).resolve()
    if os.geteuid() != 0 or not program.is_file():
        why = "needs root" if os.geteuid() else f"{program} is missing; `make build` builds it"
        console.print(f"bench-trackers: {why}", style="red", markup=False)
        return 2
    machine = this_machine()
    show_machine(console, machine)
    places: list[PlaceResults] = []
    skipped: list[str] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="frostline-trackers-") as folder:
        run = Run(
            program,
            Path(folder),
            arguments.idle_kernel,
            QUICK if arguments.quick else AMOUNTS,
            console,
            time.monotonic(),
        )
        for key in arguments.only or (IDLE, DEBIAN, OWN):
            try:
                places.append(run.place(key))
                report.show(console, places[-1])
                failed |= bool(places[-1].failures)
            except Skipped as reason:
                skipped.append(str(reason))
                console.print(f"skipped: {TITLES[key]}: {reason}", style="yellow", markup=False)
            except BenchError as error:
                failed = True
                console.print(f"bench-trackers: {error}", style="red", markup=False)
            except KeyboardInterrupt:
                return 128 + signal.SIGINT
    rows = [row for place in places for row in report.rows(place)]
    report.show_rows(console, rows)
    # All are of one boot, and of the best of many rounds: no noise explains a missed one.
    failed |= not arguments.quick and any(row.met is False for row in rows)
    written = _draw(places, arguments.plots)
    written.append(arguments.plots / "tables.md")
    written[-1].write_text(markdown.tables(places))
    report.write(arguments.json, report.document(machine, os.getloadavg()[0], arguments.quick, places, skipped))
    console.print("written: " + ", ".join(str(path) for path in [arguments.json, *written]), markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
